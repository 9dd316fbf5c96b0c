"""A Gaussian mixture over standardised features, and its score −ln p(v): how unlike known-good answers one is.

"Anatomy of a Lie" (CAD) fits K = 5 full Gaussians to features of answers known to be right, and takes the surprisal of
a new answer's features for its score. With z = (v − centre)/spread, and Σₖ = LₖLₖᵀ,

    ln p(v) = logsumexpₖ [ ln wₖ − ½(d·ln 2π + 2·Σᵢ ln Lₖᵢᵢ + ‖Lₖ⁻¹(z − μₖ)‖²) ],

the density of z, not of v: as scikit-learn's ``GaussianMixture.score_samples`` after a ``StandardScaler``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Covariances = Literal["full", "diag"]
Floats = NDArray[np.float64]


class Mixture:
    """K Gaussians in d dimensions. Raises ValueError for numbers that are none."""

    def __init__(
        self,
        center: Sequence[float],
        spread: Sequence[float],
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        covariances: Sequence[Any],
        kind: Covariances = "full",
    ) -> None:
        """``covariances``: [K, d, d], or with ``kind`` diag [K, d] variances; ``weights`` sum up to 1."""
        self.center = _array("center", center, (len(center),))  # [d]
        d = len(self.center)
        self.spread = _array("spread", spread, (d,))  # [d]
        self.weights = _array("weights", weights, (len(weights),))  # [K]
        k = len(self.weights)
        self.means = _array("means", means, (k, d))  # [K, d], of z
        given = _array("covariances", covariances, (k, d, d) if kind == "full" else (k, d))
        if not d or not k:
            raise ValueError("a mixture needs a feature and a component")
        if (self.spread <= 0).any() or (self.weights <= 0).any():
            raise ValueError("spread and weights must be positive")
        if abs(self.weights.sum() - 1) > 1e-6:
            raise ValueError(f"weights must sum up to 1, not to {self.weights.sum():.6g}")
        full = given if kind == "full" else given[:, :, None] * np.eye(d)
        if not np.allclose(full, full.transpose(0, 2, 1), rtol=1e-6, atol=1e-9):
            raise ValueError("covariances must be symmetric")
        try:
            self._roots: Floats = np.linalg.cholesky(full).astype(np.float64)  # [K, d, d], lower
        except np.linalg.LinAlgError:
            raise ValueError("covariances must be positive definite") from None

    def score(self, values: Any) -> Floats:
        """[n] −ln p of each row of ``values`` [n, d], in nats: the larger, the less usual."""
        z = (np.asarray(values, dtype=np.float64) - self.center) / self.spread
        away = z.T[None] - self.means[:, :, None]  # [K, d, n]
        distances = (np.linalg.solve(self._roots, away) ** 2).sum(1)  # [K, n]
        volumes = 2 * np.log(np.diagonal(self._roots, axis1=1, axis2=2)).sum(1)
        constants = np.log(self.weights) - 0.5 * (z.shape[1] * np.log(2 * np.pi) + volumes)
        logs = constants[:, None] - 0.5 * distances
        found: Floats = -np.logaddexp.reduce(logs, axis=0)
        return found


def _array(name: str, values: Any, shape: tuple[int, ...]) -> Floats:
    try:
        found = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise ValueError(f"{name} must be numbers of the shape {list(shape)}") from None
    if found.shape != shape:
        raise ValueError(f"{name} has the shape {list(found.shape)}, wanted: {list(shape)}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return found
