"""Directions against the real repeng and steering-vectors on the same states, and directions planted in noise."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.steering.extraction import difference_of_means
from steersman.steering.extraction_directions import (
    linear_probe,
    mean_shifts,
    pca_of_differences,
    scaled_to_gap,
    whitened_mean_difference,
)
from tests.steering.foreign import expected
from tests.steering.library import noise

Method = Callable[[Tensor, Tensor], Tensor]
L, D = 3, 24


def uncentred(positive: Tensor, negative: Tensor) -> Tensor:
    return pca_of_differences(positive, negative, centred=False)


METHODS: dict[str, Method] = {
    "pca": pca_of_differences,
    "uncentred pca": uncentred,
    "probe": linear_probe,
    "whitened": whitened_mean_difference,
}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[L], layer by layer."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def sides() -> tuple[Tensor, Tensor]:
    states = expected()["states"]
    return states[::2], states[1::2]


# -- the real libraries -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "method"),
    [
        ("repeng.pca_diff", pca_of_differences),
        ("repeng.pca_center", uncentred),
        ("steering_vectors.pca", uncentred),
        ("steering_vectors.mean", difference_of_means),
    ],
)
def test_the_same_directions_with_the_same_signs_as_the_library(library: str, method: Method) -> None:
    wanted = expected()[library]
    got = method(*sides())
    assert got.shape == wanted.shape
    assert cosine(got, wanted).min() >= 0.99999
    torch.testing.assert_close(got.norm(dim=1), wanted.norm(dim=1), rtol=1e-4, atol=0)


def test_the_probe_is_scikit_learns_on_states_less_their_pairs_means() -> None:
    """As steering-vectors' logistic aggregator prepares them. Their mean is zero, so no intercept is no matter."""
    positive, negative = sides()
    half = (positive - negative) / 2
    assert cosine(linear_probe(half, -half), expected()["steering_vectors.logistic"]).min() >= 0.999


def test_centring_matters_on_these_states() -> None:
    """Else the comparisons above could not tell the two readings apart."""
    assert cosine(pca_of_differences(*sides()), uncentred(*sides())).abs().min() < 0.99


# -- planted directions -----------------------------------------------------------------------------


def planted(seed: int, n: int = 60, gap: float = 4.0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs whose sides differ along one unit direction per layer, by `gap` on average and `spread` around it."""
    v = torch.nn.functional.normalize(noise(L, D, seed=seed), dim=-1)
    shared = 3 * noise(n, L, D, seed=seed + 1)
    by = gap + spread * noise(n, L, 1, seed=seed + 2)
    jitter = 0.1 * noise(2, n, L, D, seed=seed + 3)
    return shared + by * v + jitter[0], shared + jitter[1], v


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["pca", "uncentred pca", "mean"])
def test_pairs_give_the_planted_direction_back(name: str, seed: int) -> None:
    positive, negative, v = planted(seed)
    found = {**METHODS, "mean": difference_of_means}[name](positive, negative)
    assert cosine(found, v).min() > 0.97


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whitening_and_probing_undo_what_varies_within_the_classes(seed: int) -> None:
    """A strong nuisance direction, along which few examples' means differ by chance, misleads the means alone."""
    v, nuisance = torch.linalg.qr(noise(D, 2, seed=seed).double())[0].T
    n = 80
    base = [noise(n, 1, D, seed=seed + i) + 30 * noise(n, 1, 1, seed=seed + 2 + i) * nuisance.float() for i in (0, 1)]
    base[0] -= base[0].mean(0)
    base[1] -= base[1].mean(0)
    positive, negative = base[0] + 2 * v.float() + 6 * nuisance.float(), base[1]
    means = cosine(difference_of_means(positive, negative), v.float())
    for method in (linear_probe, lambda p, n: whitened_mean_difference(p, n, shrinkage=1e-3)):
        assert cosine(method(positive, negative), v.float())[0] > 0.75 > 0.4 > means[0]


@pytest.mark.parametrize("shrinkage", [1e-3, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("n", [5, 60])
def test_whitening_is_the_formula(shrinkage: float, n: int) -> None:
    positive, negative, _ = planted(7, n)
    for layer in range(L):
        p, q = positive[:, layer].double(), negative[:, layer].double()
        within = torch.cat([p - p.mean(0), q - q.mean(0)])
        covariance = within.T @ within / (2 * n - 2)
        shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / D * torch.eye(D)
        wanted = torch.linalg.solve(shrunk, p.mean(0) - q.mean(0))
        got = whitened_mean_difference(positive, negative, shrinkage=shrinkage)[layer]
        torch.testing.assert_close(got.double(), wanted / wanted.norm(), rtol=1e-4, atol=1e-6)


def test_wholly_shrunk_is_the_difference_of_means() -> None:
    positive, negative, _ = planted(3)
    whole = whitened_mean_difference(positive, negative, shrinkage=1.0)
    assert cosine(whole, difference_of_means(positive, negative)).min() > 1 - 1e-6


# -- what holds for every method --------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [6, 40])  # fewer and more examples than dimensions
def test_swapped_sides_turned_space_and_order(name: str, n: int) -> None:
    method = METHODS[name]
    positive, negative, _ = planted(11, n)
    v = method(positive, negative)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.norm(dim=1), torch.ones(L))
    torch.testing.assert_close(method(negative, positive), -v, rtol=1e-3, atol=1e-5)
    shift = noise(1, L, D, seed=5)
    torch.testing.assert_close(method(positive + shift, negative + shift), v, rtol=1e-3, atol=1e-4)
    turn = torch.linalg.qr(noise(D, D, seed=6).double())[0].float()
    torch.testing.assert_close(method(positive @ turn, negative @ turn), v @ turn, rtol=1e-3, atol=1e-4)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method(positive[order], negative[order]), v, rtol=1e-3, atol=1e-4)
    alone = method(positive[:, 1:2], negative[:, 1:2])
    torch.testing.assert_close(alone[0], v[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_states_in_half_precision_are_summed_in_full(name: str) -> None:
    positive, negative, _ = planted(13)
    positive, negative = positive.bfloat16(), negative.bfloat16()
    torch.testing.assert_close(
        METHODS[name](positive, negative), METHODS[name](positive.float(), negative.float()), rtol=0, atol=0
    )


def test_the_sign_goes_with_the_majority_of_pairs_not_with_their_mean() -> None:
    """repeng's rule: three pairs of four say up, the fourth says down by more than they together."""
    v = torch.eye(D)[:1]
    steps = torch.tensor([1.0, 1.5, 2.0, -9.0])
    found = uncentred(steps[:, None, None] * v, torch.zeros(4, 1, D))
    torch.testing.assert_close(found, v)


def test_a_tie_goes_with_the_mean() -> None:
    v = torch.eye(D)[:1]
    for steps in ([1.0, 2, -9, -1], [1.0, 2, 9, -1, -2, -3]):
        found = uncentred(torch.tensor(steps)[:, None, None] * v, torch.zeros(len(steps), 1, D))
        torch.testing.assert_close(found, v * (1 if sum(steps) > 0 else -1))


# -- shifts and scale -------------------------------------------------------------------------------


def test_shifts_by_group() -> None:
    before, after = noise(6, L, D), noise(6, L, D, seed=1)
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    found = mean_shifts(before, after, groups)
    assert found.shape == (3, L, D)
    for g in range(3):
        torch.testing.assert_close(found[g], (after - before)[groups == g].mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean_shifts(before, after), (after - before).mean(0), rtol=1e-4, atol=1e-6)
    for bad in (torch.tensor([0, 1]), torch.tensor([0, 0, 0, 0, 0, 2]), torch.tensor([-1, 0, 0, 0, 0, 0])):
        with pytest.raises(ValueError, match="groups"):
            mean_shifts(before, after, bad)


@pytest.mark.parametrize("name", METHODS)
def test_scale_1_moves_one_mean_onto_the_other(name: str) -> None:
    positive, negative, _ = planted(17)
    v = METHODS[name](positive, negative)
    for directions in (v, -v, 7 * v):
        step = scaled_to_gap(directions, positive, negative)
        moved = ((negative + step).mean(0) * v).sum(-1)
        torch.testing.assert_close(moved, (positive.mean(0) * v).sum(-1), rtol=1e-4, atol=1e-5)
        assert cosine(step, v).min() > 1 - 1e-6


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_states_that_give_no_direction_are_refused(name: str) -> None:
    method = METHODS[name]
    some = noise(4, L, D)
    for positive, negative in (
        (some[0], some[1]),
        (some, noise(4, L, D + 1)),
        (some[:0], some[:0]),
        (some * torch.nan, some),
        (some, some),
    ):
        with pytest.raises(ValueError):
            method(positive, negative)


def test_pairs_are_wanted_where_pairs_are_used() -> None:
    for method in (pca_of_differences, uncentred, mean_shifts):
        with pytest.raises(ValueError, match="pairs"):
            method(noise(4, L, D), noise(5, L, D))
    for unpaired in (linear_probe, whitened_mean_difference):
        assert unpaired(noise(4, L, D), noise(5, L, D, seed=1)).shape == (L, D)


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.1, float("nan")])
def test_shrinkage_has_bounds(shrinkage: float) -> None:
    with pytest.raises(ValueError, match="shrinkage"):
        whitened_mean_difference(noise(4, L, D), noise(4, L, D, seed=1), shrinkage=shrinkage)
