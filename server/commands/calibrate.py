"""Find the layer and scale at which a stored vector does what you want, and little else.

Asks a running server your prompts, unsteered and steered, and beside them with random directions of the same norm;
measures the damage on neutral text; and stores what it recommends as a new version of the vector, with the evidence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from steersman.clients.calibration import calibrate, save
from steersman.clients.calibration_picture import html, png
from steersman.clients.calibration_spec import Calibration, CalibrationSpec
from steersman.clients.jobs import read_examples
from steersman.clients.scorers import LEXICONS
from steersman.server.commands import remote
from steersman.server.commands.measuring import Measurement


def configure(parser: argparse.ArgumentParser) -> None:
    remote.connection(parser)
    parser.add_argument("vector", metavar="NAME[@VERSION]")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt to a line; .jsonl; .json")
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--lexicon", choices=sorted(LEXICONS), help="score answers by word lists")
    scorer.add_argument("--regex", metavar="PATTERN", help="score answers by whether they match")
    scorer.add_argument("--classifier", metavar="FOLDER", help="score by a Hugging Face text classifier; with --label")
    scorer.add_argument("--tokens", nargs="+", metavar="TOKEN", help="score by the first token's probability")
    parser.add_argument("--count", action="store_true", help="with --regex: count the matches")
    parser.add_argument("--label", help="with --classifier: whose probability is the score")
    parser.add_argument("--decrease", action="store_true", help="the score is to fall")
    parser.add_argument("--layers", type=_integers, metavar="4,8", help="[all of the vector's]")
    parser.add_argument("--scales", type=_numbers, default=[], metavar="0.5,1")
    parser.add_argument(
        "--target-kl",
        type=_numbers,
        metavar="0.25,0.5",
        help="nats; find scales for them [0.25,0.5,3 without --scales]",
    )
    parser.add_argument("--damage", choices=("kl", "perplexity"), default="kl", help="[%(default)s]")
    parser.add_argument("--max-damage", type=float, default=1.0, metavar="NATS", help="per token [%(default)s]")
    parser.add_argument("--neutral", type=Path, metavar="FILE", help="texts for the damage [some that come with this]")
    parser.add_argument("--seeds", type=int, default=5, help="random directions [%(default)s]")
    parser.add_argument("--standard-errors", type=float, default=3.0, help="to beat them by [%(default)s]")
    parser.add_argument("--instruction", help="what the direction does, in words: asked for as a control")
    parser.add_argument("--max-tokens", type=int, default=40, help="of each answer [%(default)s]")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    _measurement().configure(parser, "picture, numbers and answers")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """0 where something is recommended, 1 where nothing is or it fails."""
    return _measurement().run(args)


def _measurement() -> Measurement[CalibrationSpec, Calibration]:
    return Measurement("calibrate", "recommended", _spec, calibrate, save, _show, png, html)


def _spec(args: argparse.Namespace) -> CalibrationSpec:
    scorer: dict[str, Any]
    if args.lexicon is not None:
        scorer = {"by": "lexicon", "name": args.lexicon}
    elif args.regex is not None:
        scorer = {"by": "regex", "pattern": args.regex, "count": args.count}
    elif args.classifier is not None:
        scorer = {"by": "classifier", "folder": args.classifier, "label": args.label}
    else:
        scorer = {"by": "tokens", "tokens": args.tokens}
    if args.count and args.regex is None:
        raise ValueError("--count goes with --regex")
    if (args.label is None) != (args.classifier is None):
        raise ValueError("--label and --classifier go together")
    fields = {
        "vector": args.vector,
        "prompts": read_examples(args.prompts, "prompts"),
        "scorer": scorer,
        "goal": "decrease" if args.decrease else "increase",
        "layers": args.layers,
        "scales": args.scales,
        "target_kl": args.target_kl,
        "damage": args.damage,
        "max_damage": args.max_damage,
        "neutral": None if args.neutral is None else read_examples(args.neutral, "texts"),
        "seeds": args.seeds,
        "min_standard_errors": args.standard_errors,
        "instruction": args.instruction,
        "max_tokens": args.max_tokens,
        "repetition_penalty": args.repetition_penalty,
    }
    try:
        return CalibrationSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _show(found: Calibration) -> None:
    told = f"{found.vector}: mean score unsteered {found.unsteered:.4g}"
    if found.prompted is not None:
        told += f", asked for in words {found.prompted:.4g}"
    console = Console()
    table = Table("layer", "scale", "effect", "damage", "random directions", "beaten by", title=told)
    for cell in found.cells:
        control, mark = cell.random, " *" if cell is found.best else ""
        beaten = "" if control is None else "all" if control.beaten_by is None else f"{control.beaten_by:.1f} s.e."
        table.add_row(
            str(cell.layer),
            f"{cell.scale:.4g}{mark}",
            f"{cell.effect:.4g}",
            f"{cell.damage:.3g}",
            "" if control is None else f"{control.mean:.4g}",
            beaten,
        )
    console.print(table)


def _numbers(text: str) -> list[float]:
    """For argparse."""
    return [float(part) for part in text.split(",")]


def _integers(text: str) -> list[int]:
    """For argparse."""
    return [int(part) for part in text.split(",")]
