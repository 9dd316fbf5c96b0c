"""Hallucination benchmarks on a running server: POPE, MME or CHAIR, without steering and with it, paired.

Question files are in the benchmarks' own formats: POPE's JSON lines, MME's folders or tab-separated files, and for
CHAIR JSON lines of {"image", "objects"} or COCO's instances_*.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steersman.clients.evaluation import asking, benchmark
from steersman.clients.evaluation.asking import Settings
from steersman.clients.evaluation.benchmark import STEERED, UNSTEERED, Benchmark
from steersman.clients.evaluation.chair import CAPTION, Chair
from steersman.clients.evaluation.mme import Mme
from steersman.clients.evaluation.pope import Pope
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.server.commands import remote

TOKENS = {"pope": 16, "mme": 16, "chair": 512}  # at most, of an answer


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="benchmark", required=True)
    for name, about in (
        ("pope", "is there such an object? answered yes or no"),
        ("mme", "two questions about an image, one yes and one no, in subtasks"),
        ("chair", "objects in captions that are not in the image"),
    ):
        action = actions.add_parser(name, help=about)
        remote.connection(action)
        kind = "FILE" if name != "mme" else "FILE|DIR"
        action.add_argument("--questions", type=Path, nargs="+", required=True, metavar=kind, help="one table for each")
        action.add_argument("--images", type=Path, metavar="DIR", required=name != "mme")
        action.add_argument("--steering", type=remote.json_or_file, metavar="JSON|@FILE", help="asked a second time so")
        action.add_argument("--out", type=Path, metavar="FILE", help="write scores and every answer, as JSON")
        action.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
        action.add_argument("--suffix", default="", metavar="TEXT", help="what follows every question")
        action.add_argument("--max-tokens", type=int, default=TOKENS[name], help="[%(default)s]")
        action.add_argument("--concurrency", type=int, default=16, help="questions at a time [%(default)s]")
        if name == "chair":
            action.add_argument("--synonyms", type=Path, metavar="FILE", help="of objects, the authors' synonyms.txt")
            action.add_argument("--captions", type=Path, metavar="FILE", help="COCO's captions_*.json")
            action.add_argument("--prompt", default=CAPTION, help="[%(default)s]")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        chosen = [_read(args, questions) for questions in args.questions]
        for each in chosen:
            asking.missing(each.questions)
        found = []
        with remote.client(args) as server:
            for questions, each in zip(args.questions, chosen, strict=True):
                found.append(_measure(args, server, questions.name, each))
                Console().print(_table(questions.name, found[-1]["summary"]))
    except (SteersmanError, httpx.HTTPError, ValueError) as error:
        param = f" ({error.param})" if isinstance(error, SteersmanError) and error.param else ""
        raise SystemExit(f"steersman eval {args.benchmark}: {error}{param}") from None
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"results": found}, indent=1) + "\n")
    return 0


def _read(args: argparse.Namespace, questions: Path) -> Benchmark:
    if args.benchmark == "pope":
        return Pope.read(questions, args.images, args.limit)
    if args.benchmark == "mme":
        return Mme.read(questions, args.images or questions, args.limit)
    return Chair.read(questions, args.images, args.synonyms, args.captions, args.prompt, args.limit)


def _measure(args: argparse.Namespace, server: Steersman, questions: str, chosen: Benchmark) -> dict[str, Any]:
    model = server.served_model()
    settings = Settings(model, args.max_tokens, args.suffix, args.concurrency)
    conditions: dict[str, Mapping[str, Any] | None] = {UNSTEERED: None}
    if args.steering is not None:
        conditions = {UNSTEERED: {"default": False}, STEERED: args.steering}
    answers = {}
    with _progress() as bar:
        for name, steering in conditions.items():
            task = bar.add_task(name, total=len(chosen.questions))

            def advance(count: int, task: Any = task) -> None:
                bar.advance(task, count)

            answers[name] = asking.ask(server, chosen.questions, steering, settings, advance)
    about = {"model": model, "steering": args.steering, "questions": questions, "suffix": args.suffix}
    return benchmark.result(chosen, {**about, "max_tokens": args.max_tokens}, answers)


def _table(name: str, summary: Mapping[str, Any]) -> Table:
    """Of a change, the 95 % interval over images."""
    steered = summary.get(STEERED)
    table = Table(name, UNSTEERED, *((STEERED, "change", "95 %") if steered else ()))
    for score, value in summary[UNSTEERED].items():
        row = [escape(score), f"{value:.4f}"]
        if steered:
            change = summary["change"][STEERED][score]
            low, high = change["interval_95"]
            row += [f"{steered[score]:.4f}", f"{change['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        table.add_row(*row)
    return table


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
