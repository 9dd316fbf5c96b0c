"""How far a steered model's next tokens are from the unsteered model's, from what servers tell: the likeliest tokens.

A server returns the k likeliest tokens of a position (and the prompt's own next one), not the whole distribution, so
the divergence KL(p‖q) is bounded from below: never more than the true one, and 0 for equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Logprobs = Mapping[str, float]
"""Token id -> ln p, of one position."""


def kl_bound(base: Logprobs, other: Logprobs, k: int) -> float:
    """A lower bound of KL(base‖other) in nats, of the k likeliest tokens of each (and maybe one more).

    Tokens fall into classes: each that both tell of, alone; those that only ``base`` tells of, as one class B; all
    others, R. Merging tokens never raises a divergence. ``other`` gives no token of B more than its k-th likeliest
    has; within that, B and R share what is left of it as makes the divergence smallest.
    """
    shared = base.keys() & other.keys()
    total = sum(_term(math.exp(base[t]), math.exp(other[t])) for t in shared)
    left = max(1.0 - sum(math.exp(other[t]) for t in shared), 0.0)
    alone = base.keys() - shared
    p_alone = sum(math.exp(base[t]) for t in alone)
    p_rest = max(1.0 - sum(math.exp(base[t]) for t in shared) - p_alone, 0.0)
    highest = math.exp(sorted(other.values(), reverse=True)[k - 1]) if len(other) >= k else 1.0
    even = left * p_alone / (p_alone + p_rest) if p_alone + p_rest else 0.0
    q_alone = min(even, len(alone) * highest)
    total += _term(p_alone, q_alone) + _term(p_rest, left - q_alone)
    return max(total, 0.0)


def _term(p: float, q: float) -> float:
    """p·ln(p/q). Told probabilities are rounded, so what is left of them is not known below 1e-6."""
    return p * math.log(p / max(q, 1e-6)) if p > 0 else 0.0


def mean_kl(base: Sequence[Logprobs | None], other: Sequence[Logprobs | None], k: int) -> float:
    """The mean of :func:`kl_bound` over a text's positions; the first has no prediction and is None."""
    if len(base) != len(other):
        raise ValueError(f"{len(base)} and {len(other)} positions")
    told = [kl_bound(p, q, k) for p, q in zip(base, other, strict=True) if p is not None and q is not None]
    if not told:
        raise ValueError("the text has no second token, so nothing is predicted")
    return math.fsum(told) / len(told)


def read_prompt_logprobs(choice: Mapping[str, Any]) -> list[Logprobs | None]:
    """``prompt_logprobs`` of one choice of a completion."""
    return [
        None if told is None else {token: float(each["logprob"]) for token, each in told.items()}
        for told in choice["prompt_logprobs"]
    ]
