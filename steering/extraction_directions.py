"""Directions from activations: pure functions of two sets of states, one direction per layer.

States are [n, L, d]: n examples, L layers, any float type; the arithmetic is in float64. Directions come back as
[L, d] float32 on the CPU, of unit length but for `mean_shifts` (whose length is the shift itself, as that of
:func:`~steersman.steering.extraction.difference_of_means`). They point from negative to positive. Functions of *pairs*
take as many positives as negatives, example i of one belonging to example i of the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steersman.steering.extraction import difference_of_means
from steersman.steering.logistic import fit


def pca_of_differences(positive: Tensor, negative: Tensor, *, centred: bool = True) -> Tensor:
    """The first principal component of the pairs' differences δ_i = h⁺_i − h⁻_i.

    ``centred``: v maximises Σ_i (v·(δ_i − δ̄))², which is RepE's reading and repeng's ``pca_diff``: what differs from
    pair to pair, and blind to what all pairs share. Not centred: Σ_i (v·δ_i)², which is repeng's ``pca_center`` (PCA of
    each state less its pair's mean) and the PCA of steering-vectors (of the differences and their negatives).

    Sign, as RepE and repeng choose it: more pairs have v·h⁺_i > v·h⁻_i than have less. On a tie, which they leave to
    chance, v·δ̄ > 0. Sources: Zou et al. 2023 (arXiv 2310.01405), repeng 0.4 ``extract.py``.
    """
    _check(positive, negative, pairs=True)

    def one(p: Tensor, n: Tensor) -> Tensor:
        differences = p - n
        rows = differences - differences.mean(0) if centred else differences
        v = _top_direction(rows)
        at = differences @ v
        votes = int((at > 0).sum()) - int((at < 0).sum())
        return -v if (votes or float(at.mean())) < 0 else v

    return _by_layer(one, positive, negative)


def linear_probe(positive: Tensor, negative: Tensor, *, l2: float = 1.0) -> Tensor:
    """The normal w of the logistic regression σ(w·x + b) of positive against negative, with (l2/2)·‖w‖² in its loss.

    The same optimum as scikit-learn's ``LogisticRegression(C=1/l2)``; l2 = 1 is its default too.
    """
    _check(positive, negative)

    def one(p: Tensor, n: Tensor) -> Tensor:
        x = torch.cat([p, n])
        centred = x - x.mean(0)
        basis = _span(centred)
        labels = torch.cat([torch.ones(len(p)), torch.zeros(len(n))]).to(x)
        weight, _ = fit((centred @ basis.T)[None], labels, l2)
        return _unit(basis.T @ weight[0])

    return _by_layer(one, positive, negative)


def whitened_mean_difference(positive: Tensor, negative: Tensor, *, shrinkage: float = 0.1) -> Tensor:
    """Fisher's linear discriminant, Σ⁻¹(μ⁺ − μ⁻), Σ the pooled covariance within the two classes.

    There are rarely more examples than dimensions, so Σ is shrunk: (1 − s)·Σ + s·(tr Σ/d)·I with 0 < s ≤ 1. At s = 1
    it is the difference of means; near 0, what varies within a class counts ever less. Sources: Fisher 1936; Ledoit and
    Wolf 2004 for the shrinkage; Marks and Tegmark 2023 (arXiv 2310.06824) for its use on activations.
    """
    _check(positive, negative)
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage}; wanted: above 0, at most 1")
    if len(positive) + len(negative) < 3:
        raise ValueError("a covariance within classes needs at least 3 examples")

    def one(p: Tensor, n: Tensor) -> Tensor:
        gap = p.mean(0) - n.mean(0)
        within = torch.cat([p - p.mean(0), n - n.mean(0)]) / (len(p) + len(n) - 2) ** 0.5  # withinᵀ·within = Σ
        ridge = shrinkage * float(within.square().sum()) / within.shape[1]
        if ridge == 0:
            return _unit(gap)  # nothing varies within the classes
        # Woodbury: (ridge·I + (1−s)·ZᵀZ)⁻¹g = (g − (1−s)·Zᵀ(ridge·I + (1−s)·ZZᵀ)⁻¹Zg)/ridge, of the size of n, not d
        z = (1 - shrinkage) ** 0.5 * within
        inner = ridge * torch.eye(len(z)).to(z) + z @ z.T
        return _unit(gap - z.T @ torch.linalg.solve(inner, z @ gap))

    return _by_layer(one, positive, negative)


def mean_shifts(before: Tensor, after: Tensor, groups: Tensor | None = None) -> Tensor:
    """Shift vectors, mean(after_i − before_i): [L, d], or [G, L, d] with ``groups``, [n] numbers from 0 to G − 1.

    Example i is the same input under two prompts, two models, or with and without a feature; each group (a concept, a
    cluster) gets its own. Source: Khayatan et al. 2025 (xl-vlms). To add it relative to each state's own norm, as the
    physics-steering work adds its feature-minus-control delta, is op ``add`` with ``relative: "norm"``.
    """
    _check(after, before, pairs=True)
    if groups is None:
        return difference_of_means(after, before).cpu()
    count = int(groups.max()) + 1 if len(groups) else 0
    if groups.shape != (len(before),) or set(groups.tolist()) != set(range(count)):
        raise ValueError(f"groups must hold one number for each of {len(before)} examples, none left out from 0 on")
    return torch.stack([mean_shifts(before[groups == g], after[groups == g]) for g in range(count)])


def scaled_to_gap(directions: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Directions [L, d] rescaled so that adding one moves the negatives' mean along it to the positives'.

    That is v̂·(v̂·(μ⁺ − μ⁻)). Scale 1 then means the same for every method. A direction whose means are the wrong way
    round is turned.
    """
    _check(positive, negative)
    v = directions.double() / directions.double().norm(dim=-1, keepdim=True)
    gap = positive.double().mean(0).cpu() - negative.double().mean(0).cpu()
    return (v * (v * gap).sum(-1, keepdim=True)).float()


def _check(positive: Tensor, negative: Tensor, pairs: bool = False) -> None:
    if positive.dim() != 3 or negative.shape[1:] != positive.shape[1:]:
        raise ValueError(f"states must be [n, L, d] on both sides, not {[*positive.shape]} and {[*negative.shape]}")
    if not len(positive) or not len(negative):
        raise ValueError("both sides need at least one example")
    if pairs and len(positive) != len(negative):
        raise ValueError(f"pairs are wanted; there are {len(positive)} and {len(negative)} examples")
    if not torch.isfinite(positive).all() or not torch.isfinite(negative).all():
        raise ValueError("states hold NaN or infinity")


def _by_layer(one: Callable[[Tensor, Tensor], Tensor], positive: Tensor, negative: Tensor) -> Tensor:
    """``one`` of the states [n, d] float64 of each layer, stacked."""
    layers = range(positive.shape[1])
    return torch.stack([one(positive[:, i].double(), negative[:, i].double()) for i in layers]).float().cpu()


def _top_direction(rows: Tensor) -> Tensor:
    """The right singular vector of the largest singular value, [d], by the smaller of the two Gram matrices."""
    n, d = rows.shape
    values, vectors = torch.linalg.eigh(rows @ rows.T if n < d else rows.T @ rows)
    if not values[-1] > 0:
        raise ValueError("the differences do not vary, so they have no principal component")
    return _unit(rows.T @ vectors[:, -1] if n < d else vectors[:, -1])


def _span(rows: Tensor) -> Tensor:
    """An orthonormal basis [r, d] of a space that holds the rows, in which the optimum lies: r < n where n < d."""
    n, d = rows.shape
    if n >= d:
        return torch.eye(d).to(rows)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > values[-1] * 1e-12
    if not values[-1] > 0:
        raise ValueError("all examples are the same")
    return (vectors[:, kept] / values[kept].sqrt()).T @ rows


def _unit(v: Tensor) -> Tensor:
    norm = v.norm()
    if not norm > 0:
        raise ValueError("the two sides do not differ, so there is no direction")
    return v / norm
