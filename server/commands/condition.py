"""Conditional steering (CAST): fit a condition to labelled prompts on a running server, and check it as it is served.

Prompts are JSON lines of {"prompt", "label"} and perhaps "split"; without a file those that the project ships are
taken, 60 harmful and 60 harmless ones in the splits fit and test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steersman.clients import conditions
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.server.commands import extract, remote
from steersman.steering.directions import chosen_layers
from steersman.steering.errors import located


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    fit = actions.add_parser("fit", help="store a condition vector, and a profile that edits where it holds")
    check = actions.add_parser("check", help="how often a stored profile's gates decide as the labels say")
    for action in (fit, check):
        remote.connection(action)
        action.add_argument("prompts", nargs="?", type=Path, metavar="FILE.jsonl")
        action.add_argument("--positive", default="harmful", metavar="LABEL", help="what the gate is to find [harmful]")
        action.add_argument("--split", help="take only lines that state this split")
        action.add_argument("--profile", metavar="NAME", required=action is check)
    fit.add_argument("--name", required=True, help="of the condition's vector")
    fit.add_argument("--over", choices=conditions.OVER, default="last_prompt", help="what is read [%(default)s]")
    fit.add_argument("--layers", default="all", help="where to look: all, 4, 4,8,12 or 4-12 [%(default)s]")
    fit.add_argument("--site", default="resid_post")
    fit.add_argument(
        "--then", type=remote.json_object, action="append", default=[], metavar="JSON",
        help="an intervention of the profile; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        examples = conditions.read_examples(args.prompts, args.positive, args.split)
        with remote.client(args) as server, _progress() as bar:
            task = bar.add_task("prompts", total=len(examples))

            def advance(count: int) -> None:
                bar.advance(task, count)

            action = _fit if args.action == "fit" else _check
            return action(args, server, examples, advance)
    except (SteersmanError, httpx.HTTPError, ValueError) as error:
        raise SystemExit(f"steersman condition: {error}") from None


def _fit(args: argparse.Namespace, server: Steersman, examples: list[conditions.Example], advance: Any) -> int:
    if bool(args.profile) != bool(args.then):
        raise ValueError("--profile and --then go together: the profile's name, and what it does")
    model = server.model()
    if args.site not in model["sites"]:
        raise ValueError(f"--site: this server steers {', '.join(model['sites'])}")
    with located("--layers"):
        layers = chosen_layers(extract.layers(args.layers), tuple(model["sites"][args.site]), model["n_layers"])
    found = conditions.fit(server, examples, layers, args.site, args.over, advance)
    ref = server.add(found.asset(args.name, model))["ref"]
    gate = found.gate(ref)
    print(ref)
    print(json.dumps({"when": gate}))
    notes = Console(stderr=True)
    if args.profile:
        profile = conditions.profile(args.profile, model, args.then, gate)
        plan = server.resolve({"default": False, **profile["steering"]})  # what it cannot mean is not stored
        print(server.add(profile)["ref"])
        for step in plan["interventions"]:
            if min(step["layers"]) <= found.layer:
                notes.print(
                    f"[dim]{step['path']}: before the condition's layer {found.layer} the prompt's last token is not "
                    "edited, only what follows it; --layers looks at earlier ones[/dim]"
                )
        for warning in plan["warnings"]:
            notes.print(f"[dim]{escape(warning)}[/dim]")
    bound = found.condition.bound
    notes.print(
        f"[dim]layer {found.layer}, {bound.side} {bound.threshold:.3f}: F1 {bound.f1:.3f} in cross-validation[/dim]"
    )
    return 0


def _check(args: argparse.Namespace, server: Steersman, examples: list[conditions.Example], advance: Any) -> int:
    decided = conditions.decisions(server, [e.prompt for e in examples], {"profile": args.profile}, advance)
    print(json.dumps(conditions.Score.of(decided, examples).to_json()))
    return 0


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
