"""Say what is wrong with this machine for steering, and how to cure it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model's folder: is its architecture supported?")
    parser.add_argument("--mend", action="store_true", help="apply the cures that are safe")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from steersman.server import environment

    return environment.main([*(["--mend"] if args.mend else []), *([args.model] if args.model else [])])
