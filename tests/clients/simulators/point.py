"""A point that goes where it is told, one centimetre a command, and policies that know where it should go."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman.clients.robot import Actions
from steersman.clients.simulators.simulator import Floats, Measured, Picture, Seen

CHUNK = 4
NEAR = 0.05


class Point:
    """A ``Simulator``. Its gripper is whatever was asked for last."""

    name = "point"
    instruction = "go to the goal"
    moves = np.array([True, True, True, False])
    seconds = 0.1

    def __init__(self) -> None:
        self.done: list[Floats] = []
        self.looks = 0

    def reset(self, seed: int) -> None:
        self.goal = np.random.default_rng(seed).uniform(0.1, 0.3, 3)
        self.at, self.gripper = np.zeros(3), 0.0

    def observe(self) -> Seen:
        self.looks += 1
        pictures = {name: np.full((4, 4, 3), i, np.uint8) for i, name in enumerate(("side", "top"))}
        return Seen(pictures, np.append(self.goal - self.at, self.gripper))

    def act(self, action: Floats) -> None:
        self.done.append(np.array(action))
        self.at = self.at + 0.01 * np.clip(action[:3], -1, 1)
        self.gripper = float(action[3])

    def measure(self) -> Measured:
        distance = float(np.linalg.norm(self.goal - self.at))
        return Measured(self.at.copy(), distance, distance < NEAR)

    def film(self) -> Picture:
        shade = int(255 * min(1.0, self.at[2] / 0.4))
        return np.full((8, 10, 3), shade, np.uint8)


class Guide:
    """A ``Link``: straight to the goal; its steering ``{"up": x}`` adds x to every motion upwards.

    ``slow`` holds an answer back until it is set.
    """

    def __init__(self, steering: Mapping[str, Any] | None = None, slow: threading.Event | None = None) -> None:
        self.steering, self.slow = steering, slow
        self.asked: list[Seen] = []
        self.closed = threading.Event()

    def ask(self, seen: Seen, instruction: str) -> Actions:
        assert not self.closed.is_set()
        self.asked.append(seen)
        if self.slow is not None:
            self.slow.wait(30)
        left, actions = seen.state[:3].copy(), []
        for _ in range(CHUNK):
            action = np.clip(100 * left, -1, 1)
            left = left - 0.01 * action
            actions.append([*action, 0.7])
        about: dict[str, Any] = {"strays": 1}
        found = np.array(actions)
        if self.steering is not None:
            found[:, 2] += self.steering["up"]
            about["steering"] = {"interventions": [{"tokens": 3}, {"tokens": 2}]}
        return Actions(found, about)

    def close(self) -> None:
        self.closed.set()
