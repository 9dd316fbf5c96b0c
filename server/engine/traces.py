"""Numbers that a request makes at every position, a column for each: probes' values, or sizes of edits.

A position may be computed again, with the same values after a preemption and with others in place of a draft that was
rejected; and the engine may have run past the end of the response when that is asked about. So the latest positions
are kept as they are; older ones only as sums, unless all of them are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = 256  # positions that can still be taken back
Values = NDArray[np.float32]


@dataclass
class Sums:
    """Of the positions that were computed, by column."""

    count: int
    total: NDArray[np.float64]
    low: Values
    high: Values
    last: Values

    @classmethod
    def none(cls, columns: int) -> Sums:
        zeros = np.zeros(columns, np.float32)
        return cls(0, np.zeros(columns), zeros + np.inf, zeros - np.inf, zeros)

    def with_rows(self, rows: Values) -> Sums:
        """These and ``rows`` [n, columns] after them."""
        if not len(rows):
            return self
        return Sums(
            self.count + len(rows),
            self.total + rows.sum(0, dtype=np.float64),
            np.minimum(self.low, rows.min(0)),
            np.maximum(self.high, rows.max(0)),
            rows[-1].copy(),
        )


class Trace:
    """``columns`` numbers by position. ``whole``: every position's are kept."""

    def __init__(self, columns: int, whole: bool = False) -> None:
        self.columns = columns
        self.whole = whole
        self.until = 0  # position up to which values are in the sums
        self._sums = Sums.none(columns)
        self._rows: Values = np.empty((0, columns), np.float32)  # of the positions from there on, and room for more
        self._known = np.empty(0, bool)  # which of these positions were computed; others were in the prefix cache
        self._count = 0

    @property
    def end(self) -> int:
        """The first position of which nothing is known."""
        return self.until + self._count

    def see(self, start: int, values: Values) -> None:
        """The values [n, columns] of the positions from ``start``; what was known of later ones is forgotten."""
        if start > self.end:
            self._skip(start)
        values = values[max(self.until - start, 0) :]
        if not len(values):
            return
        at = max(start - self.until, 0)
        self._room(at + len(values))
        self._rows[at : at + len(values)] = values
        self._known[at : at + len(values)] = True
        self._count = at + len(values)
        if not self.whole and self._count > 2 * KEPT:
            self._fold(self._count - KEPT)

    def sums(self, end: int | None = None) -> Sums:
        """Of the positions before ``end``."""
        count = self._count if end is None else min(max(end - self.until, 0), self._count)
        return self._sums.with_rows(self._rows[:count][self._known[:count]])

    def rows(self, start: int, end: int | None = None) -> tuple[list[int], Values]:
        """The positions from ``start`` to ``end`` that were computed and are kept, and their values."""
        first = max(start - self.until, 0)
        count = self._count if end is None else min(max(end - self.until, 0), self._count)
        chosen = np.flatnonzero(self._known[first:count]) + first
        return (chosen + self.until).tolist(), self._rows[chosen]

    def _skip(self, start: int) -> None:
        """The positions up to ``start`` are not computed here."""
        if not self.whole:
            self._fold(self._count)
            self.until = start
            return
        self._room(start)
        self._known[self._count : start] = False
        self._count = start

    def _fold(self, count: int) -> None:
        """Moves the first ``count`` rows into the sums."""
        self._sums = self._sums.with_rows(self._rows[:count][self._known[:count]])
        left = self._count - count
        self._rows[:left] = self._rows[count : self._count].copy()
        self._known[:left] = self._known[count : self._count].copy()
        self._count, self.until = left, self.until + count

    def _room(self, count: int) -> None:
        if count > len(self._rows):
            size = max(count, 2 * len(self._rows), 64)
            more = size - len(self._rows)
            self._rows = np.concatenate([self._rows, np.empty((more, self.columns), np.float32)])
            self._known = np.concatenate([self._known, np.zeros(more, bool)])


def plain(values: NDArray[Any]) -> list[Any]:
    """JSON's numbers, None for what JSON has not."""
    told = values.astype(object)
    told[~np.isfinite(values)] = None
    out: list[Any] = told.tolist()
    return out
