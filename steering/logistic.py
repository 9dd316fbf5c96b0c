"""Logistic regression by Newton's method, many small problems at once; the optimum of scikit-learn's, without it."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_STEPS = 100
_TOLERANCE = 1e-8  # of the gradient, relative to the number of examples


def fit(x: Tensor, labels: Tensor, l2: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights [B, p] and intercepts [B] that minimise Σ_i log(1 + e^−m_i) + (l2/2)·‖w‖² with m_i = ±(w·x_i + b).

    x: [B, n, p] float64, B problems over the same n examples. labels: [n] of 0 and 1, both present.
    The intercept is not penalised, and l2 > 0 makes the optimum unique and finite. Raises ``ValueError`` where the
    arguments are not so, and ``ArithmeticError`` if Newton's steps, halved until the loss falls, do not get there.
    """
    if l2 <= 0:
        raise ValueError(f"l2 is {l2}; wanted: above 0")
    if not 0 < int(labels.sum()) < len(labels):
        raise ValueError("both classes need at least one example")
    batch, n, p = x.shape
    design = torch.cat([x, x.new_ones(batch, n, 1)], dim=2)  # [B, n, p + 1], the intercept last
    y = labels.to(x)
    penalty = torch.full((p + 1,), l2).to(x)
    penalty[-1] = 0
    w = x.new_zeros(batch, p + 1)
    for _ in range(_MAX_STEPS):
        margin = (design @ w[:, :, None])[:, :, 0]
        odds = torch.sigmoid(margin)
        gradient = ((odds - y)[:, None, :] @ design)[:, 0] + penalty * w
        if float(gradient.abs().max()) <= _TOLERANCE * n:
            return w[:, :-1], w[:, -1]
        curvature = (design * (odds * (1 - odds))[:, :, None]).mT @ design + torch.diag(penalty)
        curvature[:, -1, -1] += 1e-12  # an intercept on a plateau
        step = torch.linalg.solve(curvature, gradient)
        w = _descend(design, y, penalty, w, gradient, step)
    raise ArithmeticError(f"logistic regression did not converge in {_MAX_STEPS} steps")


def _loss(design: Tensor, y: Tensor, penalty: Tensor, w: Tensor) -> Tensor:
    """[B], with log(1 + e^m) computed without overflow."""
    margin = (design @ w[:, :, None])[:, :, 0]
    return (torch.nn.functional.softplus(margin) - y * margin).sum(1) + 0.5 * (penalty * w * w).sum(1)


def _descend(design: Tensor, y: Tensor, penalty: Tensor, w: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """w less the step, halved for each problem until its loss has fallen by a fair part of what the slope promises."""
    before = _loss(design, y, penalty, w)
    promised = (gradient * step).sum(1)
    size = torch.ones_like(before)
    for _ in range(40):
        after = _loss(design, y, penalty, w - size[:, None] * step)
        short = after > before - 1e-4 * size * promised + 1e-12 * before.abs()
        if not short.any():
            break
        size = torch.where(short, size / 2, size)
    return w - size[:, None] * step
