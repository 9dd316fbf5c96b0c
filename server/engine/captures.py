"""Taking activations of a request's prompt out of a worker: rows are copied to the host as the layers run.

Rows are read after the edits of their place, in float32, and kept until they are asked for. Where tensor-parallel ranks
hold a part each, the parts are put together and the leading rank keeps the whole. A prompt may be computed in any
chunks, and again from its start after a preemption; a captured request computes all of it (``intake``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.kernels.reference import Reduce
from steersman.server.engine.resident import Shard
from steersman.steering.plan import Place
from steersman.steering.sites import Site

BLOCK = 256  # rows that are on the device in float32 at once: it has little memory to spare


@dataclass(frozen=True)
class Wanted:
    """What is captured of one prompt. It travels with the request."""

    places: tuple[Place, ...]
    positions: tuple[int, ...]  # ascending
    mean: bool = False  # of them, instead of every row

    def to_json(self) -> dict[str, Any]:
        return {
            "places": [[place.layer, place.site.value] for place in self.places],
            "runs": [list(run) for run in _runs(self.positions)],
            "mean": self.mean,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Wanted:
        places = tuple(Place(int(layer), Site(site)) for layer, site in data["places"])
        positions = tuple(p for a, b in data["runs"] for p in range(a, b))
        return cls(places, positions, bool(data["mean"]))


class Capture:
    """One request's rows on this rank."""

    def __init__(self, wanted: Wanted) -> None:
        self.places = frozenset(wanted.places)
        self._wanted = wanted
        self._positions: NDArray[np.int64] = np.array(wanted.positions, dtype=np.int64)
        self._seen: dict[Place, int] = {}  # of the positions, how many from the first on are known
        self._rows: dict[Place, Tensor] = {}  # [positions, width] float32, or [width] float64, their sum

    def see(self, place: Place, start: int, count: int, read: Callable[[NDArray[np.int64]], Tensor | None]) -> None:
        """A pass computes ``count`` positions from ``start``; ``read`` gives [n, width] float32 of some of these rows.

        It is called for all that are wanted, also where they are known already, and returns None on a rank that keeps
        nothing. Raises LookupError where positions before these were not computed here: on every rank, before any read.
        """
        first, end = (int(i) for i in np.searchsorted(self._positions, [start, start + count]))
        seen = self._seen.get(place, 0)
        if first == end:
            return
        if first > seen:
            raise LookupError(f"position {self._positions[seen]} of a captured prompt was not computed here")
        for low in range(first, end, BLOCK):
            high = min(low + BLOCK, end)
            found = read(self._positions[low:high] - start)
            if found is not None:
                self._keep(place, low, found, new=max(seen - low, 0))
        self._seen[place] = max(seen, end)

    def _keep(self, place: Place, low: int, found: Tensor, new: int) -> None:
        """Rows of the positions from the ``low``-th on, of which those from ``new`` on were not known."""
        if self._wanted.mean:
            total = self._rows.setdefault(place, torch.zeros(found.shape[1], dtype=torch.float64))
            total += found[new:].cpu().double().sum(0)
        else:
            if place not in self._rows:
                self._rows[place] = torch.empty(len(self._positions), found.shape[1])
            self._rows[place][low : low + len(found)] = found

    def manifest(self) -> list[list[Any]]:
        """[layer, site, *shape] of what is here, in the order of :meth:`read`. Raises LookupError where rows lack."""
        for place, seen in self._seen.items():
            if seen < len(self._positions):
                raise LookupError(f"{place.name}: of {len(self._positions)} positions {seen} were computed")
        return [[place.layer, place.site.value, *rows.shape] for place, rows in self._kept()]

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of all arrays one after another, in the order of the manifest."""
        out, at = [], 0
        for _, rows in self._kept():
            size = 4 * rows.numel()
            low, high = max(start - at, 0), min(end - at, size)
            if low < high:
                out.append(self._float(rows).view(-1).view(torch.uint8)[low:high].numpy().tobytes())
            at += size
        return b"".join(out)

    def _kept(self) -> Iterator[tuple[Place, Tensor]]:
        return ((place, self._rows[place]) for place in self._wanted.places if place in self._rows)

    def _float(self, rows: Tensor) -> Tensor:
        return (rows / len(self._positions)).float() if self._wanted.mean else rows


class Captured(Protocol):
    """A request's rows in a pass."""

    start: int  # position of the first
    count: int

    @property
    def capture(self) -> Capture | None: ...

    @property
    def rows(self) -> slice: ...


class Captures:
    """The captures of one pass."""

    def __init__(self, owners: Sequence[Captured]) -> None:
        self._owners = [(owner, owner.capture) for owner in owners if owner.capture is not None]
        self.places: frozenset[Place] = frozenset().union(*(capture.places for _, capture in self._owners))

    def read(
        self,
        place: Place,
        x: Tensor,
        residual: Tensor | None,
        shard: Shard | None,
        reduce: Reduce | None,
        keeps: bool,
        failed: Callable[[Any, Exception], None],
    ) -> None:
        """Reads one place of ``x`` [T, d] after its edits; keeps: whether this rank does. ``failed`` gets an owner."""
        for owner, capture in self._owners:
            if place not in capture.places:
                continue

            def rows(chosen: NDArray[np.int64], first: int = owner.rows.start) -> Tensor | None:
                return _stream(x, residual, torch.from_numpy(chosen + first), shard, reduce, keeps)

            try:
                capture.see(place, owner.start, owner.count, rows)
            except Exception as error:
                failed(owner, error)


NOTHING = Captures(())


def _stream(
    x: Tensor, residual: Tensor | None, rows: Tensor, shard: Shard | None, reduce: Reduce | None, keeps: bool
) -> Tensor | None:
    """[n, width] float32 on this device, put together from the ranks where each holds a part; None: not kept."""
    whole = shard is None or reduce is None
    if whole and not keeps:
        return None
    rows = rows.to(x.device)
    own = x[rows].float()
    if residual is not None:
        own += residual[rows].float()
    if shard is None or reduce is None:
        return own
    out = own.new_zeros(len(own), shard.width)
    out[:, shard.start : shard.stop] = own
    out = reduce(out)
    return out if keeps else None


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of ascending positions."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(positions), 1) if b != a + 1), len(positions)]
    return ((positions[a], positions[b - 1] + 1) for a, b in pairwise(cuts) if a < b)
