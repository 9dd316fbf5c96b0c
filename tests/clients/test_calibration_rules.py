from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.clients.calibration_rules import (
    LARGEST,
    CalibrationError,
    Reached,
    beaten_by,
    layers_to_control,
    reach,
    recommend,
)
from steersman.clients.calibration_spec import Cell, Control


def found(measure: Callable[[float], float], target: float) -> tuple[Reached, list[float]]:
    asked: list[float] = []

    async def at(scale: float) -> float:
        asked.append(scale)
        return measure(scale)

    return asyncio.run(reach(at, target)), asked


@given(
    st.sampled_from([0.05, 0.25, 0.5, 3.0]),
    st.floats(0.01, 500),
    st.floats(1, 3),
)
def test_rising_measures_are_brought_to_the_target(target: float, unit: float, power: float) -> None:
    reached, asked = found(lambda scale: (scale / unit) ** power, target)
    assert reached.kl == pytest.approx(target, rel=0.02)
    assert reached.kl == (reached.scale / unit) ** power
    assert len(asked) <= 35


def test_the_targets_side_of_one_does_not_matter() -> None:
    for unit in (1e-3, 1e3):
        assert found(lambda scale, unit=unit: scale / unit, 0.5)[0].scale == pytest.approx(unit / 2, rel=0.02)


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(CalibrationError, match=r"no scale up to 4096 reaches 3 nats: 0\.4 at the last"):
        found(lambda scale: min(scale, 0.4), 3.0)
    with pytest.raises(CalibrationError, match="jumps near scale"):
        found(lambda scale: 2.0 if scale > 5 else 0.0, 0.5)
    assert max(found(lambda scale: scale, LARGEST)[1]) == LARGEST


def test_a_small_jump_gives_the_nearest() -> None:
    reached, _ = found(lambda scale: 0.47 if scale < 0.5 else 0.6, 0.5)
    assert reached.kl == 0.47


def test_standard_errors_by_hand() -> None:
    """Gaps 2 and 4, variance 2, over 2 prompts: 1. Seeds' means 0 and 2, variance 2, over 2 seeds: 1."""
    controls = [[0.0, 0.0], [2.0, 2.0]]
    assert beaten_by([3.0, 5.0], controls) == pytest.approx(3 / math.sqrt(2))
    assert beaten_by([3.0, 5.0], controls, sign=-1) == pytest.approx(-3 / math.sqrt(2))
    assert beaten_by([1.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]) is None


def test_noise_is_seldom_far_from_noise() -> None:
    """With the null hypothesis true, three standard errors are beaten about as seldom as they should be."""
    rng = np.random.default_rng(0)
    draws = [
        beaten_by(scores.tolist(), controls.tolist())
        for scores, controls in ((rng.normal(size=20), rng.normal(size=(10, 20))) for _ in range(2000))
    ]
    assert abs(fmean(d for d in draws if d is not None)) < 0.1
    assert np.mean([d is not None and d > 3 for d in draws]) < 0.01


def cell(layer: int, scale: float, effect: float, damage: float, beats: float | str | None = 9.0) -> Cell:
    """Scores lie evenly around the effect, the same for all cells: two cells never differ by chance."""
    random = None if beats == "unmeasured" else Control([0.0, 0.0], 0.0, beats)  # type: ignore[arg-type]
    return Cell(layer, scale, effect, damage, None, [effect - 0.05, effect, effect + 0.05], "", random)


@pytest.mark.parametrize(
    ("cells", "best"),
    [
        ([cell(1, 1, 0.5, 0.1), cell(1, 2, 0.8, 0.2), cell(1, 3, 0.9, 5.0)], 1),  # the last one does too much damage
        ([cell(1, 1, 0.5, 0.1), cell(2, 1, 0.8, 0.2, 2.9)], 0),  # no better than chance
        ([cell(1, 1, 0.5, 0.1), cell(2, 1, 0.8, 0.2, "unmeasured")], 0),
        ([cell(1, 1, 0.5, 0.3), cell(2, 1, 0.5, 0.2)], 1),  # less damage for the same
        ([cell(1, 1, 0.5, 0.3, None)], 0),  # nothing varies, and it differs
        ([cell(1, 1, 0.1, 0.1)], None),  # not above the unsteered score
        ([], None),
    ],
)
def test_the_recommendation(cells: list[Cell], best: int | None) -> None:
    assert recommend(cells, unsteered=0.1, sign=1, max_damage=1.0, errors=3.0) == best
    turned = [
        replace(cell(c.layer, c.scale, -c.effect, c.damage, _beats(c)), scores=[-s for s in c.scores]) for c in cells
    ]
    assert recommend(turned, unsteered=-0.1, sign=-1, max_damage=1.0, errors=3.0) == best


def test_what_cannot_be_told_from_the_best_wins_by_its_damage() -> None:
    """The gaps to the best are −0.1, 0 and 0.3: their mean is half their standard error; 0.1 each have none."""
    best, close = cell(1, 2, 0.9, 0.8), cell(1, 1, 0.8, 0.2)
    best.scores, close.scores = [0.9, 0.9, 0.9], [1.0, 0.9, 0.6]
    assert recommend([best, close], unsteered=0.1, sign=1, max_damage=1.0, errors=3.0) == 1
    close.scores = [0.8, 0.8, 0.8]
    assert recommend([best, close], unsteered=0.1, sign=1, max_damage=1.0, errors=3.0) == 0


def test_layers_are_controlled_in_the_order_of_the_choice() -> None:
    best, close = cell(1, 2, 0.9, 0.8), cell(3, 1, 0.8, 0.2)
    close.scores = [1.0, 0.9, 0.6 + 0.05]
    assert layers_to_control([best, close], unsteered=0.1, sign=1, max_damage=1.0) == [3, 1]


def _beats(one: Cell) -> Any:
    return "unmeasured" if one.random is None else one.random.beaten_by


def test_no_spread_is_beaten_in_the_right_direction_only() -> None:
    low = cell(1, 1, -0.5, 0.1, None)
    assert recommend([low], unsteered=-1.0, sign=1, max_damage=1.0, errors=3.0) is None


def test_layers_are_tried_best_first() -> None:
    cells = [cell(1, 1, 0.5, 0.1), cell(2, 1, 0.9, 9.0), cell(3, 1, 0.7, 0.1), cell(3, 2, 0.2, 0.1), cell(4, 1, 0, 0)]
    assert layers_to_control(cells, unsteered=0.1, sign=1, max_damage=1.0) == [3, 1]
