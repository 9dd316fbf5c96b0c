"""The methods of ``extraction_directions`` by the names that jobs and commands use, and how good a direction is.

States are [n, L, d] float32; see ``extraction_directions`` for what each method computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from steersman.steering import extraction_directions as directions
from steersman.steering.extraction import difference_of_means
from steersman.steering.extraction_layers import Separation, separation

Length = Literal["gap", "unit"]
HELD_OUT: Final = 5  # every fifth example
MIN_HELD_OUT: Final = 10  # examples of a side below which none are held out


@dataclass(frozen=True)
class Method:
    make: Callable[[Tensor, Tensor], Tensor]  # positive, negative -> [L, d]
    paired: bool = False  # whether example i of one side belongs to example i of the other


def _uncentred(positive: Tensor, negative: Tensor) -> Tensor:
    return directions.pca_of_differences(positive, negative, centred=False)


METHODS: Final[Mapping[str, Method]] = {
    "mean_difference": Method(difference_of_means),
    "pca": Method(directions.pca_of_differences, paired=True),
    "pca_uncentred": Method(_uncentred, paired=True),
    "linear_probe": Method(directions.linear_probe),
    "lda": Method(directions.whitened_mean_difference),
}


def extract(method: str, positive: Tensor, negative: Tensor, length: Length = "gap") -> Tensor:
    """[L, d] float32, pointing from negative to positive.

    length: "gap", adding it once moves the negatives' mean along it to the positives' (``scaled_to_gap``; for
    mean_difference that is the difference itself), or "unit". Raises ValueError where a layer has no direction.
    """
    made = METHODS[method].make(positive, negative)
    if not made.norm(dim=-1).all():
        raise ValueError("the two sides do not differ, so there is no direction")
    if length == "unit":
        return made / made.norm(dim=-1, keepdim=True)
    return directions.scaled_to_gap(made, positive, negative)


@dataclass(frozen=True)
class HeldOut:
    """How well directions made without every fifth example tell these apart, layer by layer."""

    positive: int  # examples held out
    negative: int
    accuracy: Tensor  # [L] share on their side of the middle between the seen means, either side counting half
    separation: Separation  # d′, and the chance that a positive lies above a negative

    def to_json(self) -> dict[str, Any]:
        """d′ is None where the examples of a side do not vary along the direction."""
        d_prime = [d if math.isfinite(d) else None for d in self.separation.d_prime.tolist()]
        return {
            "positive": self.positive,
            "negative": self.negative,
            "accuracy": self.accuracy.tolist(),
            "auc": self.separation.auc.tolist(),
            "d_prime": d_prime,
        }


def held_out(method: str, positive: Tensor, negative: Tensor) -> HeldOut | None:
    """None with fewer than ten examples on a side."""
    if min(len(positive), len(negative)) < MIN_HELD_OUT:
        return None
    seen, unseen = zip(*(_split(side) for side in (positive, negative)), strict=True)
    made = METHODS[method].make(*seen)
    middle = sum(_along(made, side).mean(0) for side in seen) / 2
    p, n = (_along(made, side) for side in unseen)
    accuracy = ((p > middle).double().mean(0) + (n < middle).double().mean(0)) / 2
    return HeldOut(len(p), len(n), accuracy, separation(made, *unseen))


def _along(directions: Tensor, states: Tensor) -> Tensor:
    """[n, L] float64."""
    return (states.double() * directions.double()).sum(-1)


def _split(states: Tensor) -> tuple[Tensor, Tensor]:
    unseen = torch.arange(len(states)) % HELD_OUT == HELD_OUT - 1
    return states[~unseen], states[unseen]
