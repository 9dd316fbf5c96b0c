"""Make a direction from contrast examples, with the activations of a running server's model.

The examples are pairs (JSON lines of {"positive", "negative"} and perhaps "prompt"), or two files of texts, one to a
line. The result is stored on the server, and its name and version printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steersman.clients.extraction_picture import html, png
from steersman.clients.jobs import JobFailed, PromptAs, follow, read_examples, read_pairs
from steersman.clients.pictures import PlotsMissing
from steersman.clients.sdk import SteersmanError
from steersman.server.commands import remote
from steersman.steering.extraction_methods import METHODS


def configure(parser: argparse.ArgumentParser) -> None:
    remote.connection(parser)
    parser.add_argument("--name", required=True, help="of the new asset")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help=".jsonl, or .json with a list 'pairs'")
    parser.add_argument(
        "--prompt-as",
        choices=get_args(PromptAs),
        default="chat",
        help="take the pairs' prompts as a user's message, as text to go on from, or not at all [%(default)s]",
    )
    for side in ("positive", "negative"):
        parser.add_argument(f"--{side}", type=Path, metavar="FILE", help=".txt, a text to a line; or .jsonl")
    parser.add_argument("--method", choices=(*METHODS, "shift", "heads"), default="mean_difference")
    parser.add_argument("--layers", default="all", help="all, 4, 4,8,12 or 4-12 [%(default)s]")
    parser.add_argument("--site", help="where activations are read [resid_post; attn_z for heads]")
    parser.add_argument("--token", default="mean", help="last, mean, or a position; -1 is the last [%(default)s]")
    parser.add_argument("--length", choices=("gap", "unit"), help="gap: scale 1 moves one mean to the other [gap]")
    parser.add_argument("--heads", type=int, metavar="K", help="of method heads: how many to choose")
    parser.add_argument("--description", default="")
    parser.add_argument("--licence", default="")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the job's result: what was measured by layer")
    parser.add_argument("--png", type=Path, help="picture of it (needs the extra 'plots')")
    parser.add_argument("--html", type=Path, help="page with picture and numbers (needs the extra 'plots')")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        with remote.client(args) as server, _progress() as bar:
            task = bar.add_task("waiting", total=None)

            def tell(job: Mapping[str, Any]) -> None:
                counts = job["counts"]
                bar.update(task, description=job["state"], completed=counts["done"], total=counts["total"] or None)

            result = follow(server, _job(args), tell)
    except (SteersmanError, JobFailed, httpx.HTTPError, ValueError) as error:
        raise SystemExit(f"steersman extract: {error}") from None
    for ref in result["assets"]:
        print(ref)
    if result["held_out"]:
        Console(stderr=True).print(f"[dim]{_separation(result['layers'], result['held_out']['auc'])}[/dim]")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    try:
        if args.png is not None:
            args.png.write_bytes(png(result))
        if args.html is not None:
            args.html.write_text(html(result), encoding="utf-8")
    except (PlotsMissing, ValueError) as error:
        raise SystemExit(f"steersman extract: {error}") from None
    return 0


def _separation(layers: Sequence[int], auc: Sequence[float]) -> str:
    """How well the held-out examples were told apart, and where best."""
    best = [layer for layer, value in zip(layers, auc, strict=True) if value == max(auc)]
    where = f"layer {best[0]}" if len(best) == 1 else f"{len(best)} of {len(layers)} layers, first layer {best[0]}"
    return f"held-out examples: AUC {max(auc):.3f} at {where}"


def _job(args: argparse.Namespace) -> dict[str, Any]:
    about: dict[str, Any] = {
        "kind": "extract",
        "name": args.name,
        "method": args.method,
        "layers": layers(args.layers),
        "token": args.token if args.token in ("last", "mean") else _integer("token", args.token),
        "description": args.description,
        "licence": args.licence,
    }
    if args.pairs is not None:
        about["pairs"] = read_pairs(args.pairs, args.prompt_as)
    for side in ("positive", "negative"):
        if (file := getattr(args, side)) is not None:
            about[side] = read_examples(file, side)
    if args.heads is not None:
        about["heads"] = {"k": args.heads}
    return {**about, **{key: value for key in ("site", "length") if (value := getattr(args, key)) is not None}}


def layers(text: str) -> str | list[int]:
    """``all`` and ``4-12`` as they are; ``4`` and ``4,8,12`` as a list."""
    if text == "all" or "-" in text:
        return text
    return [_integer("layers", part) for part in text.split(",")]


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--{option}: {text!r} is not a number") from None


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
