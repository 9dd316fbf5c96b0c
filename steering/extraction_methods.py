"""The methods of ``extraction_directions`` by the names that jobs and commands use, and how good a direction is.

States are [n, L, d] float32; see ``extraction_directions`` for what each method computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from steersman.steering import extraction_directions as directions
from steersman.steering.extraction import difference_of_means
from steersman.steering.extraction_layers import separation

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


def held_out_auc(method: str, positive: Tensor, negative: Tensor) -> list[float] | None:
    """[L], how well directions made without every fifth example tell these apart: 0.5 is chance, 1 perfect.

    The chance that a held-out positive lies above a held-out negative. None with fewer than ten examples on a side.
    """
    if min(len(positive), len(negative)) < MIN_HELD_OUT:
        return None
    seen, unseen = zip(*(_split(side) for side in (positive, negative)), strict=True)
    return [float(value) for value in separation(METHODS[method].make(*seen), *unseen).auc]


def _split(states: Tensor) -> tuple[Tensor, Tensor]:
    unseen = torch.arange(len(states)) % HELD_OUT == HELD_OUT - 1
    return states[~unseen], states[unseen]
