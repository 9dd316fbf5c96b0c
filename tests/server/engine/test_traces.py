"""Values by position, against a dictionary that forgets nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.server.engine.traces import KEPT, Trace, plain


def rows(*values: float) -> np.ndarray:
    return np.array([[v, -v] for v in values], np.float32)


def told(trace: Trace, end: int | None = None) -> list[float]:
    """Of the first column."""
    found = trace.sums(end)
    assert found.total[1] == pytest.approx(-found.total[0])
    assert found.high[1] == -found.low[0]
    return [found.count, *(float(n[0]) for n in (found.total, found.low, found.high, found.last))]


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_computed_last_counts(whole: bool) -> None:
    trace = Trace(2, whole)
    trace.see(4, rows(1, 2))  # four positions were in the cache
    trace.see(6, rows(3, 99, 99))  # two drafts
    trace.see(7, rows(4))  # both rejected
    assert told(trace, 8) == [4, 10.0, 1.0, 4.0, 4.0]
    trace.see(5, rows(2, 3, 4, 5))  # preempted
    assert told(trace, 9) == [5, 15.0, 1.0, 5.0, 5.0]
    assert told(trace, 6) == [2, 3.0, 1.0, 2.0, 2.0]
    assert trace.rows(0, 7)[0] == [4, 5, 6]
    assert trace.rows(5, 7)[1][:, 0].tolist() == [2.0, 3.0]


def test_old_values_are_kept_as_sums_alone() -> None:
    trace, values = Trace(2), [float(i % 7) for i in range(5 * KEPT)]
    for i in range(0, len(values), 3):
        trace.see(i, rows(*values[i : i + 3]))
    assert len(trace._rows) <= 4 * KEPT
    assert told(trace) == [len(values), sum(values), 0.0, 6.0, values[-1]]
    end = len(values) - KEPT + 1
    assert told(trace, end) == [end, sum(values[:end]), 0.0, 6.0, values[end - 1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 30), st.integers(1, 400), st.integers(-9, 9)), min_size=1, max_size=12),
    st.booleans(),
)
def test_any_order_of_passes(passes: list[tuple[int, int, int]], whole: bool) -> None:
    """Each begins before or after the end of what is known; what comes after a pass is forgotten."""
    trace, known, end = Trace(2, whole), dict[int, float](), 0
    for step, count, value in passes:
        start = max(end + step, 0)
        start = max(start, trace.until)  # nothing older is taken back
        trace.see(start, rows(*[value] * count))
        known = {p: v for p, v in known.items() if p < start} | dict.fromkeys(range(start, start + count), float(value))
        end = start + count
    values = list(known.values())
    assert told(trace) == pytest.approx([len(values), sum(values), min(values), max(values), values[-1]])
    kept = {p: v for p, v in known.items() if p >= trace.until}
    positions, found = trace.rows(0)
    assert dict(zip(positions, found[:, 0].tolist(), strict=True)) == kept
    assert not whole or trace.until == 0


def test_json_has_no_infinity() -> None:
    assert plain(np.array([[1.5, np.nan], [np.inf, -2.0]], np.float32)) == [[1.5, None], [None, -2.0]]
