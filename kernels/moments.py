"""Mean and spread of many series at once, updated as values come, merged and taken apart again.

With n values of mean m and sum of squared deviations q, two parts add up by Chan, Golub and LeVeque (1979):
n = n₁ + n₂, m = m₁ + δ·n₂/n, q = q₁ + q₂ + δ²·n₁·n₂/n, δ = m₂ − m₁; the same equations, solved for the second part,
give what has come since an earlier state. In float64, so that nothing of either is lost but where the first part is
many orders of magnitude larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass
class Moments:
    """Of each of some series."""

    count: NDArray[np.float64]  # [series] values
    mean: NDArray[np.float64]  # [series]; 0 where there is no value
    square: NDArray[np.float64]  # [series] sum of squared deviations from the mean

    @classmethod
    def none(cls, series: int) -> Moments:
        return cls(np.zeros(series), np.zeros(series), np.zeros(series))

    @classmethod
    def of(cls, values: Floats) -> Moments:
        """Of ``values`` [series, n], n at least 1."""
        mean = values.mean(1)
        return cls(np.full(len(values), float(values.shape[1])), mean, ((values - mean[:, None]) ** 2).sum(1))

    @property
    def deviation(self) -> NDArray[np.float64]:
        """[series] standard deviation of the values themselves, not an estimate of a larger population's."""
        found: NDArray[np.float64] = np.sqrt(self.square / np.maximum(self.count, 1))
        return found

    def at(self, series: Any) -> Moments:
        """Of some series, by index."""
        return Moments(self.count[series], self.mean[series], self.square[series])

    def put(self, series: Any, other: Moments) -> None:
        """Replaces those of some series."""
        self.count[series], self.mean[series], self.square[series] = other.count, other.mean, other.square

    def plus(self, other: Moments) -> Moments:
        """Of the values of both."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        square = self.square + other.square + delta**2 * self.count * share
        return Moments(count, self.mean + delta * share, square)

    def since(self, earlier: Moments) -> Moments:
        """Of the values that have come after ``earlier``, a state of the same series."""
        count = self.count - earlier.count
        some = np.maximum(count, 1)
        mean = np.where(count > 0, earlier.mean + (self.mean - earlier.mean) * self.count / some, 0.0)
        between = (mean - earlier.mean) ** 2 * earlier.count * count / np.maximum(self.count, 1)
        square = np.where(count > 0, np.maximum(self.square - earlier.square - between, 0.0), 0.0)
        return Moments(count, mean, square)

    def to_json(self) -> dict[str, list[float]]:
        return {"count": self.count.tolist(), "mean": self.mean.tolist(), "square": self.square.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Moments:
        return cls(*(np.asarray(data[name], dtype=np.float64) for name in ("count", "mean", "square")))
