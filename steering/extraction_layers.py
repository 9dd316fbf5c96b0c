"""Which layer to steer at: how well a direction separates the classes there, or what steering with it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Separation:
    """How far apart the classes lie along each layer's direction, on examples that the direction was not made from."""

    d_prime: Tensor  # [L] (mean⁺ − mean⁻) of v̂·h, over the root of the mean of the two variances; inf without variance
    auc: Tensor  # [L] the chance that a positive lies above a negative, ties half; 0.5 is chance

    @property
    def best(self) -> int:
        """The row of the greatest area under the curve, then of the greatest d′, then the first."""
        return max(range(len(self.auc)), key=lambda i: (float(self.auc[i]), float(self.d_prime[i]), -i))


def separation(directions: Tensor, positive: Tensor, negative: Tensor) -> Separation:
    """directions: [L, d]. positive, negative: [n, L, d], [m, L, d], held-out states."""
    if positive.shape[1:] != directions.shape or negative.shape[1:] != directions.shape:
        shapes = f"{[*directions.shape]}, {[*positive.shape]} and {[*negative.shape]}"
        raise ValueError(f"wanted: directions [L, d] and states [n, L, d] on both sides, not {shapes}")
    if min(len(positive), len(negative)) < 2:
        raise ValueError("both sides need at least two examples")
    v = directions.double() / directions.double().norm(dim=-1, keepdim=True)
    p, n = (positive.double() * v).sum(-1), (negative.double() * v).sum(-1)  # [n, L]
    spread = ((p.var(0) + n.var(0)) / 2).sqrt()
    gap = p.mean(0) - n.mean(0)
    difference = p[:, None] - n[None]
    auc = (difference > 0).double().mean((0, 1)) + (difference == 0).double().mean((0, 1)) / 2
    d_prime = torch.where(gap == 0, torch.zeros_like(gap), gap / spread)
    return Separation(d_prime.float(), auc.float())


@dataclass(frozen=True)
class Candidate:
    """One direction tried on the model, and what came of it; scores are of refusal, or of another behaviour."""

    layer: int  # 0-based, of the block that it was read and is added at
    position: int  # of the token that it was read at, from the prompt's end: −1 is the last
    bypass: float  # mean score of prompts that show the behaviour, with the direction ablated everywhere: low is good
    induce: float  # mean score of prompts that do not, with the direction added at its layer: high is good
    kl: float  # mean KL to the unsteered model of the next token of prompts that do not, with it ablated: low is good


def select_by_effect(
    candidates: Sequence[Candidate],
    n_layers: int,
    *,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    last_share: float = 0.2,
) -> Candidate:
    """The candidate that removes the behaviour best, among those that can cause it and do little else.

    Left out are: NaN scores; the last `last_share` of the layers, too near the output to be a cause; kl > `max_kl`;
    induce < `min_induce`. Of the rest the lowest `bypass` wins, the first of equals. The defaults and the rule are
    those of Arditi et al. 2024 (arXiv 2406.11717) and its code. Raises ``ValueError`` when none is left, saying why.
    """
    reasons = dict.fromkeys(("not a number", "too late a layer", f"kl above {max_kl}", f"induce below {min_induce}"), 0)
    nan, late, harmful, weak = reasons
    left = []
    for candidate in candidates:
        if not 0 <= candidate.layer < n_layers:
            raise ValueError(f"layer {candidate.layer} is not one of {n_layers}")
        if any(math.isnan(score) for score in (candidate.bypass, candidate.induce, candidate.kl)):
            reasons[nan] += 1
        elif candidate.layer >= int(n_layers * (1 - last_share)):
            reasons[late] += 1
        elif candidate.kl > max_kl:
            reasons[harmful] += 1
        elif candidate.induce < min_induce:
            reasons[weak] += 1
        else:
            left.append(candidate)
    if not left:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "there were none"
        raise ValueError(f"no direction is left of {len(candidates)} candidates: {told}")
    return min(left, key=lambda candidate: candidate.bypass)
