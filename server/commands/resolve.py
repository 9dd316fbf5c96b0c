"""Dry run: show what a steering object would do, and to which tokens of a prompt."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import httpx

from steersman.clients.sdk import SteersmanError
from steersman.server.commands import remote


def configure(parser: argparse.ArgumentParser) -> None:
    remote.configure(parser)
    parser.add_argument("prompt", nargs="?", help="a user message to resolve it for")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    about = {"messages": [{"role": "user", "content": args.prompt}]} if args.prompt else {}
    try:
        with remote.client(args) as server:
            print(json.dumps(server.resolve(remote.steering(args), **about), indent=2))
    except (SteersmanError, httpx.HTTPError) as error:
        raise SystemExit(f"steersman resolve: {error}") from None
    return 0
