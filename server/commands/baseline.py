"""Record which norms are usual at each layer, from known-good traffic of a running server.

Either this command sends the prompts of a file, or it waits while others send theirs; what statistics look at meanwhile
is the baseline, which is stored on the server. Serve with --steering-norm-baseline NAME to count outliers by it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from steersman.clients.jobs import read_examples
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.server.commands import remote
from steersman.steering.baselines import make_baseline, seen_between
from steersman.steering.formats import native

AT_ONCE = 8  # requests


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    record = actions.add_parser("record", help="learn from known-good traffic, and store what was learnt")
    remote.connection(record)
    record.add_argument("--name", required=True, help="of the new asset")
    source = record.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help="send these: a prompt to a line; or .jsonl")
    source.add_argument("--seconds", type=float, metavar="N", help="send nothing, and look for so long")
    record.add_argument("--max-tokens", type=int, default=64, help="of each answer to --prompts [%(default)s]")
    record.add_argument("--description", default="")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        with remote.client(args) as server:
            model = remote.served_model(server)
            before = server.norms()
            if args.prompts is not None:
                _send(server, read_examples(args.prompts, "prompts"), args.max_tokens)
            else:
                time.sleep(args.seconds)
            seen = seen_between(before, server.norms(), model.n_layers)
            asset = make_baseline(args.name, model, seen, args.description)
            told = server.add(native.to_json(asset))
    except (SteersmanError, httpx.HTTPError, ValueError) as error:
        raise SystemExit(f"steersman baseline: {error}") from None
    print(f"{told['name']}@{told['version']}")
    return 0


def _send(server: Steersman, prompts: Sequence[Any], max_tokens: int) -> None:
    served = server.served_model()

    def ask(prompt: Any) -> None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        server.chat(messages, model=served, max_tokens=max_tokens)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in pool.map(ask, prompts):
            assert done is None  # raises what the request raised
