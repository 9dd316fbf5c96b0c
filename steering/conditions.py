"""Conditions on a prompt (CAST): a direction and a bound on its cosine, found from labelled prompts.

Lee et al. 2024, "Programming Refusal with Conditional Activation Steering" (arXiv 2409.05907): the states of a prompt
are averaged over its tokens at one layer, h̄, and an edit is made only where h̄ is like a condition vector c. States
here are [n, L, d], one h̄ for each prompt and layer, as a gate with ``over: prompt_mean`` sees them (all tokens of the
prompt, its first included) or, with ``over: last_prompt``, the last token's.

Where this differs from the paper and its code (IBM's activation-steering):

* c is the unit difference of the classes' mean states, there the first principal component of the paired states;
* a prompt's score is the cosine of h̄ and c. There it is that of h̄ and tanh((c cᵀ/cᵀc)·h̄), which has lost the sign of
  c·h̄: prompts on both far sides of c look alike;
* a bound is fitted to scores of prompts that c was not made from (:func:`cross_scores`), there of the same ones;
* ``above`` and ``below`` say where the gate is open. The code's ``condition_comparator_threshold_is`` says where the
  threshold is instead: "larger" steers where the similarity is *smaller* than the threshold, so that it is our
  ``below``, and "smaller" is our ``above``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest
from steersman.steering.extraction import difference_of_means

Side = Literal["above", "below"]


@dataclass(frozen=True)
class Bound:
    """Where a score means yes, and how well that tells two sets of prompts apart."""

    side: Side
    threshold: float
    f1: float  # of the positives
    margin: float  # from the threshold to the nearest score, in standard deviations of all scores


@dataclass(frozen=True)
class Condition:
    """A gate's condition: a unit direction [d] at ``layer``, the row of the states that it was fitted to."""

    layer: int
    direction: Tensor
    bound: Bound

    def gate(self, vector: str, layer: int, over: str) -> dict[str, Any]:
        """The ``when`` of a request, for the direction stored as ``vector``; ``layer``: of the model."""
        bound: dict[str, Any] = {self.bound.side: round(self.bound.threshold, 6)}
        return {"vector": vector, "layer": layer, "measure": "cosine", **bound, "over": over}


def directions(positive: Tensor, negative: Tensor) -> Tensor:
    """[L, d] unit vectors from negative to positive; states [n, L, d] and [m, L, d]."""
    found = difference_of_means(positive, negative)
    norms = found.norm(dim=-1, keepdim=True)
    if not (norms > 0).all():
        raise InvalidRequest("both sets of prompts have the same mean state at some layer")
    return found / norms


def scores(states: Tensor, vectors: Tensor) -> Tensor:
    """[n, L] cosines of states [n, L, d] with vectors [L, d]: what a gate of measure ``cosine`` reads."""
    return torch.cosine_similarity(states.float(), vectors.float()[None], dim=-1)


def cross_scores(positive: Tensor, negative: Tensor, folds: int = 5) -> tuple[Tensor, Tensor]:
    """Each prompt's scores [n, L] and [m, L] along directions that were made without it.

    Prompt i is in fold i mod ``folds``. Scores of the prompts that a direction was made from are too good: with fewer
    prompts than dimensions they may be told apart by noise alone.
    """
    if min(len(positive), len(negative)) < 2 * folds:
        raise InvalidRequest(
            f"{len(positive)} and {len(negative)} prompts; a condition needs {2 * folds} on either side"
        )
    out = positive.new_empty(positive.shape[:2]).float(), negative.new_empty(negative.shape[:2]).float()
    for fold in range(folds):
        kept = [torch.arange(len(side)) % folds != fold for side in (positive, negative)]
        made = directions(positive[kept[0]], negative[kept[1]])
        for into, side, rest in zip(out, (positive, negative), kept, strict=True):
            into[~rest] = scores(side[~rest], made)
    return out


def f1(predicted: Sequence[bool], actual: Sequence[bool]) -> float:
    """2·TP / (2·TP + FP + FN); 0 where nothing is or was said to be positive."""
    right = sum(p and a for p, a in zip(predicted, actual, strict=True))
    return 2 * right / (sum(predicted) + sum(actual)) if right else 0.0


def best_bound(positive: Tensor, negative: Tensor) -> Bound:
    """The bound on one layer's scores [n] and [m] with the greatest F1; of equals the one with the widest margin.

    Every threshold halfway between two neighbouring scores is tried, in both directions.
    """
    values = torch.cat([positive, negative]).double()
    yes = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    order = values.argsort()
    values, yes = values[order], yes[order]
    steps = values.diff()
    spread = float(values.std())
    if not (steps > 0).any():
        raise InvalidRequest("every prompt has the same score, so no threshold tells them apart")
    below = yes.cumsum(0)[:-1]  # positives up to each gap
    count = torch.arange(1, len(values), dtype=torch.float64)
    total = float(yes.sum())
    sides: dict[Side, Tensor] = {
        "above": 2 * (total - below) / (len(values) - count + total),
        "below": 2 * below / (count + total),
    }
    found = [
        Bound(side, float((values[i] + values[i + 1]) / 2), float(value), float(steps[i]) / 2 / spread)
        for side, curve in sides.items()
        for i, value in enumerate(curve)
        if steps[i] > 0
    ]
    return max(found, key=lambda b: (round(b.f1, 9), b.margin))


def fit(positive: Tensor, negative: Tensor, folds: int = 5) -> tuple[Condition, list[Bound]]:
    """The best condition on states [n, L, d] and [m, L, d], and each layer's best bound.

    The layer, the threshold and its side are searched together, by F1 on :func:`cross_scores` and then by margin; the
    direction is made from all prompts.
    """
    if positive.dim() != 3 or positive.shape[1:] != negative.shape[1:]:
        shapes = f"{[*positive.shape]} and {[*negative.shape]}"
        raise InvalidRequest(f"states are {shapes}; wanted: [n, L, d] and [m, L, d]")
    p, n = cross_scores(positive, negative, folds)
    bounds = [best_bound(p[:, row], n[:, row]) for row in range(p.shape[1])]
    best = max(range(len(bounds)), key=lambda i: (round(bounds[i].f1, 9), bounds[i].margin, -i))
    return Condition(best, directions(positive, negative)[best], bounds[best]), bounds


def holds(bound: Bound, values: Tensor) -> Tensor:
    """Whether a gate with this bound is open, for scores of any shape."""
    return values > bound.threshold if bound.side == "above" else values < bound.threshold
