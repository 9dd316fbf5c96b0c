"""One episode: a robot in a simulator, driven by a policy behind a deadline, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steersman.clients.simulators.simulator import Floats, Picture, Simulator
from steersman.clients.simulators.watchdog import Watchdog

METRICS = {  # and their units
    "success": "",
    "displacement": " (m)",
    "mean_height": " (m)",
    "speed": " (m/s)",
    "early_speed": " (m/s)",  # in the first quarter: an arm that arrives later, but arrives, has gone as far
    "final_distance": " (m)",
    "nearest_distance": " (m)",
}


@dataclass(frozen=True)
class Limits:
    """``chunk``: how many actions of each answer are carried out before the robot looks again; None: all of them."""

    steps: int  # actions in an episode
    chunk: int | None = None


@dataclass
class Episode:
    """What was measured. An episode runs for all its steps, also after success, so that all take equally long."""

    seed: int
    positions: Floats  # [steps + 1, 3], metres
    distance: float  # metres from the goal, at the end
    nearest: float  # metres, the least there was
    succeeded_at: int | None  # the first step after which the task was done
    seconds: float  # of the robot's time
    answers: int  # in time
    late: int  # deadlines that passed, for each of which the robot held still for one step
    strays: int  # tokens that stood for no action
    edited: int  # tokens that steering edited
    latencies: list[float]  # seconds of each answer
    frames: list[Picture] = field(default_factory=list)  # one for each step where they were asked for

    @property
    def success(self) -> bool:
        return self.succeeded_at is not None

    def metrics(self) -> dict[str, float]:
        """``METRICS``; a second is one of the robot's time."""
        steps = np.linalg.norm(np.diff(self.positions, axis=0), axis=1)
        return {
            "success": float(self.success),
            "displacement": float(np.linalg.norm(self.positions[-1] - self.positions[0])),
            "mean_height": float(self.positions[:, 2].mean()),
            "speed": float(steps.sum() / self.seconds),
            "early_speed": float(steps[: math.ceil(len(steps) / 4)].mean() * len(steps) / self.seconds),
            "final_distance": self.distance,
            "nearest_distance": self.nearest,
        }

    def about(self) -> dict[str, Any]:
        """As JSON."""
        fields = ("seed", "succeeded_at", "answers", "late", "strays", "edited")
        about = {name: getattr(self, name) for name in fields}
        median = float(np.median(self.latencies)) if self.latencies else None
        metrics = {name: round(value, 5) for name, value in self.metrics().items()}
        return {**about, **metrics, "median_latency_seconds": median}


def still(simulator: Simulator, last: Floats) -> Floats:
    """The action that moves nothing and leaves the rest (a gripper) as it was asked for last."""
    return np.where(simulator.moves, 0.0, last)


def run(simulator: Simulator, watchdog: Watchdog, seed: int, limits: Limits, film: bool = False) -> Episode:
    """Raises NoAnswer when the policy has gone silent, ValueError for actions that are not this robot's."""
    simulator.reset(seed)
    measured = simulator.measure()
    positions, nearest, succeeded_at = [measured.position], measured.distance, None
    last = np.zeros(len(simulator.moves))
    answers = late = strays = edited = 0
    latencies: list[float] = []
    frames: list[Picture] = []
    step = 0
    while step < limits.steps:
        answer = watchdog.ask(simulator.observe(), simulator.instruction)
        if answer is None:
            late += 1
            actions = still(simulator, last)[None]
        else:
            answers += 1
            latencies.append(answer.seconds)
            about = answer.actions.about
            strays += about["strays"]
            edited += sum(one["tokens"] for one in about.get("steering", {}).get("interventions", ()))
            actions = _checked(answer.actions.actions, simulator)[: limits.chunk]
        for last in actions[: limits.steps - step]:
            simulator.act(last)
            step += 1
            measured = simulator.measure()
            positions.append(measured.position)
            nearest = min(nearest, measured.distance)
            if measured.success and succeeded_at is None:
                succeeded_at = step
            if film:
                frames.append(simulator.film())
    return Episode(
        seed=seed,
        positions=np.stack(positions),
        distance=measured.distance,
        nearest=nearest,
        succeeded_at=succeeded_at,
        seconds=limits.steps * simulator.seconds,
        answers=answers,
        late=late,
        strays=strays,
        edited=edited,
        latencies=latencies,
        frames=frames,
    )


def _checked(actions: Floats, simulator: Simulator) -> Floats:
    dims = len(simulator.moves)
    if actions.ndim != 2 or not len(actions) or actions.shape[1] != dims or not np.isfinite(actions).all():
        raise ValueError(f"actions must be finite, [n, {dims}] for {simulator.name}, not {list(actions.shape)}")
    return actions
