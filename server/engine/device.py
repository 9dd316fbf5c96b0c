"""Edits on a GPU: plans in tables on the device, and one kernel launch for all rows at a place.

The host's work per step is one small copy, the entry of each row, and only when the batch's composition has
changed. Everything that a kernel reads stays at its address, so that launches can be captured in CUDA graphs;
copies are queued on the current stream, before the pass that needs them.

What needs the host between two layers stays with :mod:`steersman.server.engine.layout`: gates, probes, injections, and
programs whose dots or norms are partial sums over tensor-parallel ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.program import Program
from steersman.kernels.reference import Reduce
from steersman.kernels.tables import NONE, Tables, TablesFull, supports
from steersman.server.engine.layout import Run, Work
from steersman.server.engine.resident import Resident, Shard
from steersman.steering.plan import Place
from steersman.steering.sites import Site

FLOATS_PER_WORD = 4  # of directions, for one word of programs
ENTRIES_PER_PLAN = 2  # sets of interventions that a plan's tokens combine, on average


class Kernel(Protocol):
    """``kernels.triton_edit.edit`` or ``kernels.cuda_edit.edit``; see there."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        entries: Tensor,
        tables: Tables,
        place: int,
        *,
        norms: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> None: ...


class _Entry(NamedTuple):
    number: int
    places: frozenset[Place]


class DevicePlans:
    """The plans of one rank on its device, and which entry each row of the batch has in this pass."""

    def __init__(
        self,
        kernel: Kernel,
        places: Sequence[Place],
        shards: Mapping[Place, Shard],
        device: torch.device,
        *,
        rows: int,
        plans: int,
        nbytes: int,
    ) -> None:
        """``rows``: of the largest batch. ``nbytes``: what directions may take; programs take a quarter more."""
        self._kernel = kernel
        self._index = {place: i for i, place in enumerate(places)}
        self._shards = shards
        floats = nbytes // 4
        self.tables = Tables(
            len(places), device, entries=ENTRIES_PER_PLAN * plans, words=floats // FLOATS_PER_WORD, floats=floats
        )
        self.entries = torch.full((rows,), NONE, dtype=torch.int32, device=device)
        self.places: frozenset[Place] = frozenset()  # where some row of this pass is edited
        self.sites: frozenset[Site] = frozenset()  # and at which sites
        self._filled = 0  # rows of ``entries`` that may name one
        self._laid_out: tuple[Run, ...] | None = ()  # None: ``entries`` may name what is gone
        self._lacking: list[Run] = []  # of what is laid out
        self._found: tuple[frozenset[Place], frozenset[Site]] = frozenset(), frozenset()
        self._kept: OrderedDict[tuple[Resident, int], _Entry] = OrderedDict()

    def takes(self, resident: Resident) -> bool:
        """Whether the plan's edits need nothing of the host while a pass runs.

        A site counts as sharded where any layer's is: pipeline stages have other layers and must agree, as a stage
        that runs a pass without a graph hands on another number of rows.
        """
        sharded = {place.site for place in self._shards}
        return (
            not resident.reads
            and not resident.plan.injections
            and not resident.plan.restorations
            and all(
                supports(Program(tuple(blocks), blocks[0].write.width), place.site in sharded)
                for place, blocks in resident.plan.blocks.items()
            )
        )

    def lay_out(self, runs: Sequence[Run]) -> list[Run]:
        """The coming pass edits these rows, but for those that it returns: the tables cannot hold them beside the rest.

        Who comes first in the batch, and so has been in it for longest, has room first.
        """
        key = tuple(runs)
        if key != self._laid_out:
            self._laid_out = None
            entries = np.full(max(self._filled, max((r.end for r in runs), default=0)), NONE, np.int32)
            found = self._entries(dict.fromkeys((r.resident, r.mask) for r in runs))
            self._lacking = [run for run in runs if (run.resident, run.mask) not in found]
            for run in runs:
                if (entry := found.get((run.resident, run.mask))) is not None:
                    entries[run.first : run.end] = entry.number
            self._fill(entries)
            self._laid_out = key
            places = frozenset[Place]().union(*(e.places for e in found.values()))
            self._found = places, frozenset(place.site for place in places)
        self.places, self.sites = self._found
        return self._lacking

    def rest(self) -> None:
        """No pass is running. The entries stay: without :attr:`places` nothing is launched that would read them."""
        self.places, self.sites = frozenset(), frozenset()

    def edit(self, place: Place, x: Tensor, residual: Tensor | None) -> None:
        """Edits the rows of x [T, d] in place."""
        self._kernel(x, residual, self.entries, self.tables, self._index[place])

    def edit_and_measure(
        self, place: Place, x: Tensor, residual: Tensor | None, work: Work, reduce: Reduce | None = None
    ) -> Tensor:
        """The same; [rows, n_blocks] how large each block's edit was beside the stream, for the rows of ``work``.

        reduce: adds up over tensor-parallel ranks, where x is one rank's shard.
        """
        blocks = work.interventions.shape[1]
        norms = torch.zeros(len(x), max(blocks, self.tables.blocks), device=x.device)
        squares = torch.zeros(len(x), device=x.device)
        self._kernel(x, residual, self.entries, self.tables, self._index[place], norms=norms, squares=squares)
        rows = torch.from_numpy(work.rows).to(x.device)
        sizes, square = norms[rows, :blocks], squares[rows]
        if reduce is not None:
            sizes, square = reduce(sizes.square()).sqrt(), reduce(square)
        return sizes / square.sqrt().clamp_min(1e-30)[:, None]

    def at(self, sites: Collection[Site]) -> frozenset[Place]:
        return frozenset(place for place in self._index if place.site in sites)

    def drop(self, resident: Resident) -> None:
        """The plan is resident no more."""
        for key in [k for k in self._kept if k[0] is resident]:
            self._remove(key)

    # -- parts ------------------------------------------------------------------------------------

    def _entries(self, needed: Collection[tuple[Resident, int]]) -> dict[tuple[Resident, int], _Entry]:
        """Those of ``needed`` that there is room for."""
        out = {}
        for key in needed:
            if (entry := self._kept.get(key) or self._add_with_room(key, needed)) is not None:
                self._kept.move_to_end(key)
                out[key] = entry
        return out

    def _add_with_room(self, key: tuple[Resident, int], needed: Collection[tuple[Resident, int]]) -> _Entry | None:
        """A new entry, in place of those used least recently where there is no room; None: all are needed too."""
        while True:
            try:
                entry = self._kept[key] = self._add(*key)
                return entry
            except TablesFull:
                oldest = next((k for k in self._kept if k not in needed), None)
                if oldest is None:
                    return None
                self._remove(oldest)

    def _add(self, resident: Resident, mask: int) -> _Entry:
        programs = {  # other pipeline stages have the other layers
            place: program for place, program in resident.programs(mask).items() if place in self._index
        }
        index = self.tables.add({self._index[place]: program for place, program in programs.items()})
        return _Entry(index, frozenset(programs))

    def _remove(self, key: tuple[Resident, int]) -> None:
        self.tables.remove(self._kept.pop(key).number)
        self._laid_out = None  # the index may come to mean another plan

    def _fill(self, entries: Any) -> None:
        source = torch.from_numpy(entries)
        if self.entries.is_cuda:
            source = source.pin_memory()
        self.entries[: len(entries)].copy_(source, non_blocking=True)
        named = np.flatnonzero(entries != NONE)
        self._filled = int(named[-1]) + 1 if len(named) else 0
