"""Norm statistics of a policy's data sets: how actions in [-1, 1] are scaled back to the robot's units.

The form is OpenVLA's ``norm_stats`` in ``config.json``:
``{data set: {"action": {"q01": [dims], "q99": [dims], "mask": [dims]}}}``, ``mask`` all true where it is missing;
``"proprio"`` beside ``"action"`` has the same for the robot's state. π0's have ``mean`` and
``std`` in place of quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steersman.server.policies.policy import Floats
from steersman.steering.errors import InvalidRequest

SMALL = 1e-6  # openpi's, in every scale that it divides by


class Scaling(Protocol):
    """Of one data set's actions, or of its state."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[dims]; where it is false the value is not scaled."""

    @property
    def dims(self) -> int: ...

    def unnormalise(self, x: Floats) -> Floats:
        """``x`` [..., dims], from what the policy puts out to the robot's units."""

    def normalise(self, x: Floats) -> Floats:
        """The inverse."""


@dataclass(frozen=True)
class Quantiles:
    q01: Floats  # [dims]
    q99: Floats  # [dims]
    mask: NDArray[np.bool_]
    slack: float = 0.0  # added to the width of each dimension

    @property
    def dims(self) -> int:
        return len(self.q01)

    @property
    def _width(self) -> Floats:
        return self.q99 - self.q01 + self.slack

    def unnormalise(self, x: Floats) -> Floats:
        """From [-1, 1] to [q01, q99]."""
        return np.where(self.mask, 0.5 * (x + 1) * self._width + self.q01, x)

    def normalise(self, x: Floats) -> Floats:
        """The inverse; without slack a dimension that does not vary is 0."""
        width = self._width
        scaled = np.divide(2 * (x - self.q01), width, out=np.ones_like(x), where=width != 0) - 1
        return np.where(self.mask, scaled, x)


@dataclass(frozen=True)
class Moments:
    """As openpi scales for π0, (x − mean) / (std + 1e-6)."""

    mean: Floats  # [dims]
    std: Floats  # [dims]
    mask: NDArray[np.bool_]

    @property
    def dims(self) -> int:
        return len(self.mean)

    def unnormalise(self, x: Floats) -> Floats:
        return np.where(self.mask, x * (self.std + SMALL) + self.mean, x)

    def normalise(self, x: Floats) -> Floats:
        return np.where(self.mask, (x - self.mean) / (self.std + SMALL), x)


def quantiles(data: Any, path: str, slack: float = 0.0) -> Quantiles:
    """Raises ValueError for what is none."""
    q01, q99, mask = _read(data, ("q01", "q99"), path)
    if not (q01 <= q99).all():
        raise ValueError(f"{path}: q01 and q99 must be finite, and q01 at most q99")
    return Quantiles(q01, q99, mask, slack)


def moments(data: Any, path: str) -> Moments:
    """Raises ValueError for what is none."""
    mean, std, mask = _read(data, ("mean", "std"), path)
    if (std < 0).any():
        raise ValueError(f"{path}: std must not be negative")
    return Moments(mean, std, mask)


openpi_quantiles = partial(quantiles, slack=SMALL)


@dataclass(frozen=True)
class NormStats:
    actions: Mapping[str, Scaling]
    states: Mapping[str, Scaling]

    @classmethod
    def read(cls, data: Any, read: Callable[[Any, str], Scaling] = quantiles) -> NormStats:
        """Raises ValueError, naming the statistic, where a checkpoint's ``norm_stats`` are not as said above."""
        if not isinstance(data, Mapping) or not data:
            raise ValueError("norm_stats must have the statistics of at least one data set")
        actions: dict[str, Scaling] = {}
        states: dict[str, Scaling] = {}
        for key, about in data.items():
            if not isinstance(about, Mapping) or "action" not in about:
                raise ValueError(f"norm_stats.{key} has no 'action'")
            actions[key] = read(about["action"], f"norm_stats.{key}.action")
            if "proprio" in about:
                states[key] = read(about["proprio"], f"norm_stats.{key}.proprio")
        return cls(actions, states)

    def key(self, asked: str | None) -> str:
        """The data set that an observation means; it may leave it open where there is but one."""
        known = ", ".join(sorted(self.actions))
        if asked is None:
            if len(self.actions) > 1:
                raise InvalidRequest(f"say whose statistics the actions have: one of {known}", "unnorm_key")
            return next(iter(self.actions))
        if asked not in self.actions:
            raise InvalidRequest(f"this policy has no statistics of {asked[:200]!r}; it has {known}", "unnorm_key")
        return asked


def _read(data: Any, names: tuple[str, str], path: str) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    first, second = names
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must be an object with {first} and {second}")
    try:
        a, b = (np.array(data[name], np.float64) for name in names)
        mask = np.array(data.get("mask", np.ones(a.shape, np.bool_)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r}") from None
    if a.ndim != 1 or not len(a) or a.shape != b.shape or a.shape != mask.shape or mask.dtype != np.bool_:
        raise ValueError(f"{path}: {first}, {second} and mask must be lists of one length, mask of booleans")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{path}: {first} and {second} must be finite")
    return a, b, mask
