"""Choose, of stored vectors' layers, the one whose direction carries a behaviour, by trying each on the model.

Ablates each direction everywhere on prompts that show the behaviour, adds it at its layer on prompts that do not, and
measures how likely an answer is to begin as the behaviour does. The choice is stored as a new version of its vector.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from steersman.clients import conditions
from steersman.clients.selection import Selection, SelectionSpec, save, select
from steersman.clients.selection_picture import html, png
from steersman.server.commands import remote
from steersman.server.commands.measuring import Measurement


def configure(parser: argparse.ArgumentParser) -> None:
    remote.connection(parser)
    parser.add_argument("vectors", nargs="+", metavar="NAME[@VERSION]", help="each read at another token")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="labelled [those that come with this]")
    parser.add_argument("--positive", default="harmful", metavar="LABEL", help="shows the behaviour [%(default)s]")
    parser.add_argument("--split", help="take only lines that state this split")
    parser.add_argument("--tokens", nargs="+", required=True, metavar="TOKEN", help="answers that show it begin so")
    parser.add_argument("--scale", type=float, default=1.0, help="at which a direction is added [%(default)s]")
    parser.add_argument("--max-kl", type=float, default=0.1, metavar="NATS", help="of the ablation [%(default)s]")
    parser.add_argument("--min-induce", type=float, default=0.0, metavar="LOG-ODDS", help="[%(default)s]")
    parser.add_argument("--last-share", type=float, default=0.2, help="of the layers left out [%(default)s]")
    _measurement().configure(parser, "picture and numbers")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """0 where something is selected, 1 where nothing is or it fails."""
    return _measurement().run(args)


def _measurement() -> Measurement[SelectionSpec, Selection]:
    return Measurement("select", "selected", _spec, select, save, _show, png, html)


def _spec(args: argparse.Namespace) -> SelectionSpec:
    examples = conditions.read_examples(args.prompts, args.positive, args.split)
    fields = {
        "vectors": args.vectors,
        "showing": [e.prompt for e in examples if e.positive],
        "others": [e.prompt for e in examples if not e.positive],
        "tokens": args.tokens,
        "scale": args.scale,
        "max_kl": args.max_kl,
        "min_induce": args.min_induce,
        "last_share": args.last_share,
    }
    try:
        return SelectionSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _show(found: Selection) -> None:
    told = f"log-odds unsteered: {found.unsteered['showing']:.3g} where it shows, {found.unsteered['others']:.3g} else"
    table = Table("vector", "layer", "ablated", "added", "damage in nats", title=told)
    for candidate in found.candidates:
        mark = " *" if candidate is found.best else ""
        numbers = (f"{value:.3g}" for value in (candidate.bypass, candidate.induce, candidate.kl))
        table.add_row(found.vectors[candidate.position], f"{candidate.layer}{mark}", *numbers)
    Console().print(table)
