"""Norm statistics of a policy's data sets: how actions in [-1, 1] are scaled back to the robot's units.

The form is OpenVLA's ``norm_stats`` in ``config.json``:
``{data set: {"action": {"q01": [dims], "q99": [dims], "mask": [dims]}}}``, ``mask`` all true where it is missing;
``"proprio"`` beside ``"action"`` has the same for the robot's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.server.policies.policy import Floats
from steersman.steering.errors import InvalidRequest


@dataclass(frozen=True)
class Quantiles:
    q01: Floats  # [dims]
    q99: Floats  # [dims]
    mask: NDArray[np.bool_]  # [dims]; where it is false the value is not scaled

    @property
    def dims(self) -> int:
        return len(self.q01)

    def unnormalise(self, x: Floats) -> Floats:
        """``x`` [..., dims]: from [-1, 1] to [q01, q99] where the mask is set."""
        return np.where(self.mask, 0.5 * (x + 1) * (self.q99 - self.q01) + self.q01, x)

    def normalise(self, x: Floats) -> Floats:
        """The inverse; a dimension that does not vary is 0."""
        width = self.q99 - self.q01
        scaled = np.divide(2 * (x - self.q01), width, out=np.ones_like(x), where=width != 0) - 1
        return np.where(self.mask, scaled, x)


@dataclass(frozen=True)
class NormStats:
    actions: Mapping[str, Quantiles]
    states: Mapping[str, Quantiles]

    @classmethod
    def read(cls, data: Any) -> NormStats:
        """Raises ValueError, naming the statistic, where a checkpoint's ``norm_stats`` are not as said above."""
        if not isinstance(data, Mapping) or not data:
            raise ValueError("norm_stats must have the statistics of at least one data set")
        actions, states = {}, {}
        for key, about in data.items():
            if not isinstance(about, Mapping) or "action" not in about:
                raise ValueError(f"norm_stats.{key} has no 'action'")
            actions[key] = _read(about["action"], f"norm_stats.{key}.action")
            if "proprio" in about:
                states[key] = _read(about["proprio"], f"norm_stats.{key}.proprio")
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


def _read(data: Any, path: str) -> Quantiles:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must be an object with q01 and q99")
    try:
        q01, q99 = (np.array(data[name], np.float64) for name in ("q01", "q99"))
        mask = np.array(data.get("mask", np.ones(q01.shape, np.bool_)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r}") from None
    if q01.ndim != 1 or not len(q01) or q01.shape != q99.shape or q01.shape != mask.shape or mask.dtype != np.bool_:
        raise ValueError(f"{path}: q01, q99 and mask must be lists of one length, mask of booleans")
    if not (np.isfinite(q01).all() and np.isfinite(q99).all() and (q01 <= q99).all()):
        raise ValueError(f"{path}: q01 and q99 must be finite, and q01 at most q99")
    return Quantiles(q01, q99, mask)
