"""``steersman robot run``: the episodes, and what is shown and written of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from websockets.exceptions import WebSocketException

from steersman.clients.sdk import SteersmanError
from steersman.clients.simulators import pictures, study, tasks, watchdog
from steersman.clients.simulators.episode import METRICS, Episode, Limits

EXPECTED = (SteersmanError, httpx.HTTPError, WebSocketException, watchdog.NoAnswer, ImportError, ValueError)


def run(args: argparse.Namespace) -> None:
    """Raises SystemExit, with one line, for what can be expected to go wrong."""
    console = Console()

    def connect(steering: Mapping[str, Any] | None) -> watchdog.Link:
        return watchdog.link(args.server, steering=steering, api_key=args.api_key, timeout=args.deadline)

    def tell(condition: str, episode: Episode) -> None:
        done = "no success" if episode.succeeded_at is None else f"success at step {episode.succeeded_at}"
        end = f"{100 * episode.distance:.1f} cm off at the end, {episode.late} late"
        console.print(f"[dim]seed {episode.seed} {condition}: {done}, {end}[/dim]", highlight=False)

    try:
        episodes = study.run_all(
            tasks.make(args.task, openvla_gripper=args.openvla_gripper),
            connect,
            study.conditions(args.steering),
            range(args.seed, args.seed + args.episodes),
            Limits(args.steps, args.chunk),
            args.deadline,
            filmed=args.filmed if args.video else 0,
            tell=tell,
        )
        settings = {name: getattr(args, name) for name in ("task", "seed", "steps", "chunk", "deadline", "steering")}
        result = study.result(settings, episodes)
        console.print(_table(result["summary"], args.task))
        if args.out:
            study.write(result, args.out)
        if args.plot:
            pictures.plot(episodes, args.task, args.plot)
        if args.video:
            pictures.film(episodes, args.video)
    except EXPECTED as error:
        param = f" ({error.param})" if isinstance(error, SteersmanError) and error.param else ""
        raise SystemExit(f"steersman robot run: {error}{param}") from None


def _table(summary: Mapping[str, Any], task: str) -> Table:
    """Means; of a change, the 95 % interval over pairs."""
    shown = [name for name in (study.UNSTEERED, study.STEERED) if name in summary]
    changes = summary.get("change", {})
    table = Table(task, *shown, *(("change", "95 %") if changes else ()))
    for metric, unit in METRICS.items():
        row = [metric.replace("_", " ") + unit, *(f"{summary[name][metric]:.3f}" for name in shown)]
        if changes:
            low, high = changes[metric]["interval_95"]
            row += [f"{changes[metric]['mean']:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        table.add_row(*row)
    for count in study.COUNTS:
        table.add_row(
            f"{count}, in all", *(str(summary[name][count]) for name in shown), *([""] * 2 if changes else ())
        )
    return table
