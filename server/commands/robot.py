"""Drive a simulated robot with a served policy, unsteered and steered, and measure what steering changes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.clients.simulators.tasks import KNOWN, named
from steersman.server.commands.remote import json_or_file

FILMS = (".gif", ".mp4")
PLOTS = (".png", ".pdf", ".svg")


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run episodes; with --steering, every seed unsteered and steered")
    server = os.environ.get("STEERSMAN_SERVER", "http://localhost:8000")
    run.add_argument(
        "--task", type=_task, default=KNOWN[0], help=f"of Meta-World or LIBERO: {', '.join(KNOWN)} [%(default)s]"
    )
    run.add_argument("--openvla-gripper", action="store_true", help="LIBERO: the policy's gripper is 0 closed, 1 open")
    run.add_argument("--server", default=server, metavar="URL", help="http:// or ws:// [%(default)s]")
    run.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    run.add_argument("--episodes", type=_positive, default=10, help="[%(default)s]")
    run.add_argument("--seed", type=int, default=0, help="of the first episode; the others' follow it [%(default)s]")
    run.add_argument("--steps", type=_positive, default=100, help="actions in an episode [%(default)s]")
    run.add_argument("--chunk", type=_positive, help="actions carried out before looking again [all of an answer's]")
    run.add_argument("--deadline", type=_seconds, default=5.0, help="for an answer; then it holds still [%(default)s]")
    run.add_argument("--steering", type=json_or_file, metavar="JSON|@FILE", help="the steering object")
    run.add_argument("--out", type=Path, help="write everything that was measured, as JSON")
    run.add_argument("--plot", type=_named(PLOTS), help=f"write a plot, as {', '.join(PLOTS)}")
    run.add_argument("--video", type=_named(FILMS), help=f"write a film, as {', '.join(FILMS)}")
    run.add_argument("--filmed", type=_positive, default=3, help="how many seeds are in the film [%(default)s]")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        from steersman.server.commands import robot_run  # the extra `robots` need not be installed for other commands
    except ImportError as error:
        raise SystemExit(f"steersman robot run: {error}: pip install 'steersman[robots]'") from None
    robot_run.run(args)
    return 0


def _task(text: str) -> str:
    try:
        return named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError("must be seconds, more than 0 and less than 3600")
    return value


def _named(endings: Sequence[str]) -> Any:
    def file(text: str) -> Path:
        if Path(text).suffix not in endings:
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(endings)}")
        return Path(text)

    return file
