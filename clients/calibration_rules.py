"""The rules of calibration, apart from any server: standard errors, the search for a divergence, the recommendation."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Final

from steersman.clients.calibration_spec import Cell

TOLERANCE: Final = 0.02  # of the target divergence
STEPS: Final = 20
LARGEST: Final = 4096.0  # a scale that does not reach the target means that the vector does next to nothing


class CalibrationError(Exception):
    """The calibration cannot be done as asked; the message says why. `param` is the field of the spec to blame."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def beaten_by(scores: Sequence[float], controls: Sequence[Sequence[float]], sign: int = 1) -> float | None:
    """By how many standard errors scores [n] of n prompts lie above controls' [seeds, n] (below, where sign is −1).

    The difference is that of the means over prompts and seeds. Its variance is that of the prompts' own differences
    (each from its mean over the seeds) over n, plus that of the seeds' means over the number of seeds: the one says
    how far other prompts, the other how far other random directions could have moved it. None where nothing varies.
    """
    gaps = [sign * (score - fmean(column)) for score, column in zip(scores, zip(*controls, strict=True), strict=True)]
    spread = variance(gaps) / len(gaps) + variance([fmean(row) for row in controls]) / len(controls)
    return fmean(gaps) / math.sqrt(spread) if spread > 0 else None


@dataclass(frozen=True)
class Reached:
    scale: float
    kl: float  # what was measured there


async def reach(measure: Callable[[float], Awaitable[float]], target: float) -> Reached:
    """The scale at which ``measure`` (nats, rising from 0 at scale 0) is ``target``, to 2 %.

    Doubles from 1 until the target is passed, then bisects, twenty steps at most; the nearest scale wins. Source: the
    bisection on KL of the SNMF steering code, whose targets are 0.25, 0.5 and 3 nats. Raises CalibrationError when no
    scale up to 4096 reaches it, or when none comes within a tenth: the measure jumps there.
    """
    tried: list[Reached] = []

    async def at(scale: float) -> float:
        tried.append(Reached(scale, await measure(scale)))
        return tried[-1].kl

    low, high = 0.0, 1.0
    while await at(high) < target:
        low, high = high, 2 * high
        if high > LARGEST:
            raise CalibrationError(
                f"no scale up to {LARGEST:g} reaches {target:g} nats: {tried[-1].kl:.4g} at the last", "target_kl"
            )
    for _ in range(STEPS):
        nearest = min(tried, key=lambda each: abs(each.kl - target))
        if abs(nearest.kl - target) <= TOLERANCE * target:
            return nearest
        middle = (low + high) / 2
        low, high = (middle, high) if await at(middle) < target else (low, middle)
    nearest = min(tried, key=lambda each: abs(each.kl - target))
    if abs(nearest.kl - target) > target / 10:
        raise CalibrationError(
            f"{target:g} nats cannot be reached: the divergence jumps near scale {nearest.scale:.4g}, "
            f"where it is {nearest.kl:.4g}",
            "target_kl",
        )
    return nearest


def moves(cell: Cell, unsteered: float, sign: int, max_damage: float) -> bool:
    """Whether a cell may be recommended, its random directions aside: it has an effect, and does little damage."""
    return sign * (cell.effect - unsteered) > 0 and cell.damage <= max_damage


def beats_random(cell: Cell, sign: int, standard_errors: float) -> bool:
    """Whether its random directions have been measured and are beaten."""
    if cell.random is None:
        return False
    if cell.random.beaten_by is None:  # neither prompts nor seeds vary: any difference is one
        return sign * (cell.effect - cell.random.mean) > 0
    return cell.random.beaten_by >= standard_errors


def layers_to_control(cells: Sequence[Cell], unsteered: float, sign: int, max_damage: float) -> list[int]:
    """The layers that have a cell worth recommending, in the order in which they would be recommended."""
    worth = [cell for cell in cells if moves(cell, unsteered, sign, max_damage)]
    out: list[int] = []
    while worth:
        out.append(_choice(worth, sign).layer)
        worth = [cell for cell in worth if cell.layer != out[-1]]
    return out


def recommend(cells: Sequence[Cell], unsteered: float, sign: int, max_damage: float, errors: float) -> int | None:
    """The index of the cell that does least damage, of those whose effect is as good as the greatest.

    Only cells that may be recommended and beat their random directions count. As good is what lies within one standard
    error (over the prompts, each compared with itself) of the greatest mean effect: the rule by which Breiman et al.
    1984 choose the simplest of the models that cannot be told from the best.
    """
    fit = [cell for cell in cells if moves(cell, unsteered, sign, max_damage) and beats_random(cell, sign, errors)]
    return cells.index(_choice(fit, sign)) if fit else None


def _choice(cells: Sequence[Cell], sign: int) -> Cell:
    best = max(cells, key=lambda cell: sign * cell.effect)

    def as_good(cell: Cell) -> bool:
        gaps = [sign * (most - score) for most, score in zip(best.scores, cell.scores, strict=True)]
        return fmean(gaps) <= math.sqrt(variance(gaps) / len(gaps))

    return min(filter(as_good, cells), key=lambda cell: cell.damage)
