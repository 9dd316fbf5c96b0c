"""Paired episodes: every seed once unsteered and once steered, and what steering changed, with its uncertainty."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.clients.simulators.episode import METRICS, Episode, Limits, run
from steersman.clients.simulators.simulator import Simulator
from steersman.clients.simulators.watchdog import Link, Watchdog

UNSTEERED, STEERED = "unsteered", "steered"
COUNTS = ("answers", "late", "strays", "edited")
RESAMPLES = 10_000
FORMAT = 1

Steering = Mapping[str, Any]
Episodes = Mapping[str, Sequence[Episode]]  # by condition, in the order of the seeds


def conditions(steering: Steering | None) -> dict[str, Steering | None]:
    """What every seed is run under."""
    return {UNSTEERED: None} if steering is None else {UNSTEERED: None, STEERED: steering}


def run_all(
    simulator: Simulator,
    connect: Callable[[Steering | None], Link],
    asked: Mapping[str, Steering | None],
    seeds: Sequence[int],
    limits: Limits,
    deadline: float,
    *,
    filmed: int = 0,
    tell: Callable[[str, Episode], None] = lambda condition, episode: None,
) -> dict[str, list[Episode]]:
    """One seed after the other, under each condition in turn. The first ``filmed`` seeds have frames."""
    found: dict[str, list[Episode]] = {name: [] for name in asked}
    with _watchdogs(connect, asked, deadline) as watchdogs:
        for i, seed in enumerate(seeds):
            for name, watchdog in watchdogs.items():
                episode = run(simulator, watchdog, seed, limits, film=i < filmed)
                found[name].append(episode)
                tell(name, episode)
    return found


@contextmanager
def _watchdogs(
    connect: Callable[[Steering | None], Link], asked: Mapping[str, Steering | None], deadline: float
) -> Iterator[dict[str, Watchdog]]:
    made = {name: Watchdog(partial(connect, steering), deadline) for name, steering in asked.items()}
    try:
        yield made
    finally:
        for watchdog in made.values():
            watchdog.close()


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of the mean's bootstrap distribution, over episodes; the same numbers give the same interval."""
    draw = np.random.default_rng(0)
    means = differences[draw.integers(len(differences), size=(RESAMPLES, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summary(episodes: Episodes) -> dict[str, Any]:
    """Means by condition; where there are two, the mean of steered − unsteered over pairs, with 95 % intervals."""
    metrics = {name: [e.metrics() for e in each] for name, each in episodes.items()}
    out: dict[str, Any] = {
        name: {metric: float(np.mean([m[metric] for m in each])) for metric in METRICS}
        for name, each in metrics.items()
    }
    for name, each in episodes.items():
        out[name] |= {count: sum(getattr(e, count) for e in each) for count in COUNTS}
    if STEERED in episodes:
        if [e.seed for e in episodes[STEERED]] != [e.seed for e in episodes[UNSTEERED]]:
            raise ValueError("pairs must have one seed each")
        changes = {}
        for metric in METRICS:
            pairs = zip(metrics[STEERED], metrics[UNSTEERED], strict=True)
            differences = np.array([steered[metric] - plain[metric] for steered, plain in pairs])
            changes[metric] = {"mean": float(differences.mean()), "interval_95": interval(differences)}
        out["change"] = changes
    return out


def result(settings: Mapping[str, Any], episodes: Episodes) -> dict[str, Any]:
    """All of it, as JSON."""
    each = {name: [e.about() for e in found] for name, found in episodes.items()}
    return {"format": FORMAT, **settings, "summary": summary(episodes), "episodes": each}


def write(result: Mapping[str, Any], out: Path) -> None:
    """One line for each episode, so that a file can be read and compared."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    episodes = (f'  "{name}": [\n   {_lines(each)}\n  ]' for name, each in result["episodes"].items())
    rest = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "episodes")
    whole = ",\n".join(episodes)
    part.write_text("{\n" + ",\n".join([*rest, f' "episodes": {{\n{whole}\n }}']) + "\n}\n")
    part.replace(out)


def _lines(each: Sequence[Any]) -> str:
    return ",\n   ".join(map(json.dumps, each))
