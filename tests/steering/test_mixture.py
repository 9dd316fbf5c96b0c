"""The mixture's score against densities written out one by one, and against scikit-learn's where it is installed."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.steering.mixture import Mixture

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))  # K, d, seed


def random_mixture(k: int, d: int, seed: int, kind: str) -> tuple[dict[str, Any], np.ndarray]:
    """Its numbers, with correlated features of very different spread, and points near and far."""
    random = np.random.default_rng(seed)
    roots = random.normal(size=(k, d, d))
    full = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(d)
    about = {
        "center": random.normal(0, 100, d),
        "spread": 10.0 ** random.uniform(-3, 3, d),
        "weights": random.dirichlet(np.ones(k)) * 0.99 + 0.01 / k,
        "means": random.normal(0, 3, (k, d)),
        "covariances": full if kind == "full" else full.diagonal(axis1=1, axis2=2).copy(),
    }
    points = about["center"] + about["spread"] * random.normal(0, 1, (40, d)) * 10.0 ** random.uniform(-1, 1.5, (40, 1))
    return about, points


def plainly(about: dict[str, Any], v: np.ndarray, kind: str) -> float:
    """−ln p of one point by the textbook's formula, its logarithms summed exactly."""
    z = (v - about["center"]) / about["spread"]
    logs = []
    for w, mean, covariance in zip(about["weights"], about["means"], about["covariances"], strict=True):
        sigma = covariance if kind == "full" else np.diag(covariance)
        sign, volume = np.linalg.slogdet(sigma)
        assert sign == 1
        away = z - mean
        logs.append(math.log(w) - 0.5 * (len(z) * math.log(2 * math.pi) + volume + away @ np.linalg.inv(sigma) @ away))
    top = max(logs)
    return -(top + math.log(math.fsum(math.exp(x - top) for x in logs)))


@pytest.mark.parametrize("kind", ["full", "diag"])
@settings(max_examples=40, deadline=None)
@given(sizes=SIZES)
def test_the_formula(kind: Any, sizes: tuple[int, int, int]) -> None:
    about, points = random_mixture(*sizes, kind)
    found = Mixture(**about, kind=kind).score(points)
    assert found.shape == (len(points),)
    assert found == pytest.approx([plainly(about, v, kind) for v in points], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "diag"])
@settings(max_examples=40, deadline=None)
@given(sizes=SIZES)
def test_scikit_learns_score(kind: Any, sizes: tuple[int, int, int]) -> None:
    sklearn = pytest.importorskip("sklearn.mixture")
    about, points = random_mixture(*sizes, kind)
    model = sklearn.GaussianMixture(len(about["weights"]), covariance_type=kind)
    model.weights_, model.means_, model.covariances_ = about["weights"], about["means"], about["covariances"]
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    model.precisions_cholesky_ = _compute_precision_cholesky(model.covariances_, kind)
    wanted = -model.score_samples((points - about["center"]) / about["spread"])
    assert Mixture(**about, kind=kind).score(points) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_a_component_too_far_to_count_is_no_infinity() -> None:
    one = {"center": [0.0], "spread": [1.0], "weights": [0.5, 0.5], "means": [[0.0], [1e6]], "covariances": [[1.0]] * 2}
    near, far = Mixture(**one, kind="diag").score([[0.0], [1e8]])  # type: ignore[arg-type]
    assert near == pytest.approx(0.5 * math.log(2 * math.pi) + math.log(2))
    assert far == pytest.approx(0.5 * (1e8 - 1e6) ** 2, rel=1e-6)


GOOD: dict[str, Any] = {
    "center": [0.0, 1.0], "spread": [1.0, 2.0], "weights": [0.25, 0.75], "means": [[0.0, 0.0], [1.0, 1.0]],
    "covariances": [[[1.0, 0.5], [0.5, 1.0]], [[2.0, 0.0], [0.0, 1.0]]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spread": [1.0, 0.0]}, "spread and weights must be positive"),
        ({"spread": [1.0]}, r"spread has the shape \[1\], wanted: \[2\]"),
        ({"weights": [0.5, 0.6]}, "sum up to 1"),
        ({"weights": [1.5, -0.5]}, "must be positive"),
        ({"means": [[0.0, 0.0]]}, "means has the shape"),
        ({"means": [[0.0], [1.0, 2.0]]}, "means must be numbers"),
        ({"center": [0.0, math.nan]}, "center holds NaN"),
        ({"covariances": [[[1.0, 0.5], [0.4, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]}, "symmetric"),
        ({"covariances": [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]}, "positive definite"),
        ({"covariances": [[1.0, 1.0], [1.0, 1.0]]}, "covariances has the shape"),
        ({"kind": "diag", "covariances": [[1.0, 1.0], [1.0, -1.0]]}, "positive definite"),
    ],
)
def test_numbers_that_are_no_mixture(changes: dict[str, Any], message: str) -> None:
    Mixture(**GOOD)
    with pytest.raises(ValueError, match=message):
        Mixture(**{**GOOD, **changes})
