"""What the closed loop needs of a simulator: one task of one robot, seen by cameras and moved by actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Picture = NDArray[np.uint8]
"""[height, width, 3], RGB."""


@dataclass(frozen=True)
class Seen:
    """What a policy is shown."""

    pictures: Mapping[str, Picture]  # by camera, in the order in which the policy takes them
    state: Floats  # [state dims], in the robot's units


@dataclass(frozen=True)
class Measured:
    """How things stand, which no policy is told."""

    position: Floats  # [3], the tool's place: x, y, height above the table; metres
    distance: float  # metres from what the task asks for
    success: bool


class Simulator(Protocol):
    """One task. ``reset`` comes before everything else, and the same seed makes the same episode."""

    name: str
    instruction: str
    moves: NDArray[np.bool_]  # [dims], which numbers of an action are motions; the others (a gripper) are absolute
    seconds: float  # of the robot's time that one action takes

    def reset(self, seed: int) -> None: ...

    def observe(self) -> Seen: ...

    def act(self, action: Floats) -> None:
        """``action`` [dims], in the robot's units."""

    def measure(self) -> Measured: ...

    def film(self) -> Picture:
        """A picture for people."""
