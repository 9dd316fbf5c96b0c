"""Moments against numpy over the same values, in whatever parts they come and are taken apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.kernels.moments import Moments

SERIES = 3


def parts(sizes: list[int], seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(5.0 * i, 1.0 + i, size=(SERIES, n)) for i, n in enumerate(sizes)]


def check(found: Moments, values: np.ndarray) -> None:
    assert found.count.tolist() == [values.shape[1]] * SERIES
    assert found.mean == pytest.approx(values.mean(1), rel=1e-9, abs=1e-9)
    assert found.square == pytest.approx(values.var(1) * values.shape[1], rel=1e-9, abs=1e-9)
    assert found.deviation == pytest.approx(values.std(1), rel=1e-6, abs=1e-5)  # the root of what cancels


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31), st.data())
def test_parts_add_up_and_come_apart(sizes: list[int], seed: int, data: st.DataObject) -> None:
    values, states = parts(sizes, seed), [Moments.none(SERIES)]
    for part in values:
        states.append(states[-1].plus(Moments.of(part)))
    check(states[-1], np.concatenate(values, 1))
    cut = data.draw(st.integers(0, len(values) - 1))
    check(states[-1].since(states[cut]), np.concatenate(values[cut:], 1))
    again = Moments.from_json(states[-1].to_json())
    assert again.to_json() == states[-1].to_json()


def test_nothing_since_then_and_nothing_at_all() -> None:
    known = Moments.of(parts([7], 0)[0])
    for empty in (known.since(known), Moments.none(SERIES), Moments.none(SERIES).plus(Moments.none(SERIES))):
        assert empty.to_json() == {"count": [0.0] * 3, "mean": [0.0] * 3, "square": [0.0] * 3}
        assert empty.deviation.tolist() == [0.0] * 3
    assert known.plus(Moments.none(SERIES)).to_json() == known.to_json()


def test_some_series_alone() -> None:
    first, second = parts([5, 9], 1)
    known = Moments.of(first)
    rows = np.array([0, 2])
    known.put(rows, known.at(rows).plus(Moments.of(second[rows])))
    assert known.count.tolist() == [14, 5, 14]
    assert known.mean[1] == first[1].mean()
    assert known.mean[2] == pytest.approx(np.concatenate([first[2], second[2]]).mean())
