"""Edits on a GPU: plans in tables on the device, and one kernel launch for all rows at a place.

The host's work per step is one small copy, the entry of each row, and only when the batch's composition has
changed. Everything that a kernel reads stays at its address, so that launches can be captured in CUDA graphs;
copies are queued on the current stream, before the pass that needs them.

Gates are columns of a buffer with a row for each row of the batch. One that each token decides is written by the
launch at the place where it is read, and looked up by those at later places; what a prompt has decided is copied there
with the entries. What rows carry from the sources of an injection to its targets is a buffer too, of as many rows as
its memory has room for: a pass with more of them injects on the host. What probes read is a third buffer, with a column
for each of a plan's reads; it and the gates are copied back after the pass (:mod:`steersman.server.engine.readback`).

What needs the host between two layers stays with :mod:`steersman.server.engine.layout`: token gates that hold, the
passes in which a prompt decides a gate, and programs, gates and probes whose dots or norms are partial sums over
tensor-parallel ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.arguments import PADDING
from steersman.kernels.program import Block, Code, Inject, Program, Source
from steersman.kernels.reference import Reduce
from steersman.kernels.tables import NONE, Buffers, Tables, TablesFull, supports
from steersman.server.engine.chain import Injected, Restored
from steersman.server.engine.fusion import FusedNorm, NormKernel
from steersman.server.engine.layout import Run, Work
from steersman.server.engine.readback import Readback
from steersman.server.engine.resident import Resident, Shard
from steersman.steering.plan import Place
from steersman.steering.sites import Site

FLOATS_PER_WORD = 4  # of directions, for one word of programs
ENTRIES_PER_PLAN = 2  # sets of interventions that a plan's tokens combine, on average
GATES = 16  # of one plan
SLOTS = 4  # injections of one plan
PROBES = 256  # reads of one plan's probes, one for each place
CARRIED = (Site.ATTN_OUT, Site.MLP_OUT)  # as wide as the stream, and whole on every rank


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


class Opened(NamedTuple):
    """A gate that is open for these rows, as their prompt has decided."""

    gate: int  # among the plan's
    first: int
    end: int  # past the last one


class _Entry(NamedTuple):
    number: int
    places: frozenset[Place]  # where it edits or reads


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
        d_model: int = 1,
        carry_nbytes: int = 0,
        probe_nbytes: int = 0,
    ) -> None:
        """``rows``: of the largest batch. ``nbytes``: what directions may take; programs take a quarter more.

        carry_nbytes: what may be carried to injections, for as many rows as have room there. probe_nbytes: the same of
        what probes read; on the host it takes as much for each of some passes.
        """
        self._kernel = kernel
        self._index = {place: i for i, place in enumerate(places)}
        self._shards = shards
        floats = nbytes // 4
        padded = -(-d_model // PADDING) * PADDING
        self.injected_rows = min(carry_nbytes // (4 * SLOTS * padded), rows)  # of a pass that injects here
        self.gates = torch.zeros(rows, GATES, device=device)
        self.probed_rows = min(probe_nbytes // (4 * PROBES), rows)  # of a pass that probes here
        buffers = Buffers(
            self.gates,
            carry=torch.zeros(self.injected_rows, SLOTS, padded, device=device),
            values=torch.zeros(self.probed_rows, PROBES, device=device),
        )
        self.tables = Tables(
            len(places), device, entries=ENTRIES_PER_PLAN * plans, words=floats // FLOATS_PER_WORD, floats=floats,
            buffers=buffers,
        )  # fmt: skip
        self.entries = torch.full((rows,), NONE, dtype=torch.int32, device=device)
        self.nobody = self.entries.clone()
        self.norm_kernel: NormKernel | None = None  # where norms are fused with edits
        self.told_gates, self.told_probes = Readback(self.gates), Readback(buffers.values)
        self.places: frozenset[Place] = frozenset()  # where some row of this pass is edited or a gate is read
        self.sites: frozenset[Site] = frozenset()  # and at which sites
        self._filled = 0  # rows of ``entries`` that may name one
        self._laid_out: object = (), ()  # the runs and what is open; None: ``entries`` may name what is gone
        self._lacking: list[Run] = []  # of what is laid out
        self._found: tuple[frozenset[Place], frozenset[Site]] = frozenset(), frozenset()
        self._kept: OrderedDict[tuple[Resident, int], _Entry] = OrderedDict()

    def takes(self, resident: Resident) -> bool:
        """Whether the plan's edits need nothing of the host while a pass runs, but where a prompt decides its gates.

        A site counts as sharded where any layer's is: pipeline stages have other layers and must agree, as a stage
        that runs a pass without a graph hands on another number of rows.
        """
        sharded = {place.site for place in self._shards}
        plan = resident.plan
        return (
            (not plan.probes or (self.probed_rows > 0 and len(plan.probes) <= PROBES))
            and all(probe.place.site not in sharded for probe in plan.probes)
            and (not plan.injections or (self.injected_rows > 0 and len(plan.injections) <= SLOTS))
            and all(injection.site in CARRIED for injection in plan.injections)
            and not plan.restorations
            and len(plan.gates) <= GATES
            and all(gate.encode is None for gate in plan.gates)
            and all(probe.encode is None for probe in plan.probes)
            and all(gate.per_request or not (gate.hold or gate.place.site in sharded) for gate in plan.gates)
            and all(
                supports(Program(tuple(blocks), blocks[0].write.width), place.site in sharded)
                for place, blocks in plan.blocks.items()
            )
        )

    def lay_out(self, runs: Sequence[Run], opened: Sequence[Opened] = ()) -> list[Run]:
        """The coming pass edits these rows, but for those that it returns: the tables cannot hold them beside the rest.

        Who comes first in the batch, and so has been in it for longest, has room first. ``opened``: of the gates that
        are decided once, those that are open.
        """
        key = tuple(runs), tuple(opened)
        if key != self._laid_out:
            self._laid_out = None
            entries = np.full(max(self._filled, max((r.end for r in runs), default=0)), NONE, np.int32)
            found = self._entries(dict.fromkeys((r.resident, r.mask) for r in runs))
            self._lacking = [run for run in runs if (run.resident, run.mask) not in found]
            for run in runs:
                if (entry := found.get((run.resident, run.mask))) is not None:
                    entries[run.first : run.end] = entry.number
            self._fill(entries)
            if any(run.resident.decides_once for run in runs):
                self._fill_gates(len(entries), opened)
            self._laid_out = key
            places = frozenset[Place]().union(*(e.places for e in found.values()))
            self._found = places, frozenset(place.site for place in places)
        self.places, self.sites = self._found
        return self._lacking

    def rest(self) -> None:
        """No pass is running. The entries stay: without :attr:`places` nothing is launched that would read them."""
        self.places, self.sites = frozenset(), frozenset()

    def edit(self, place: Place, x: Tensor, residual: Tensor | None, norm: FusedNorm | None = None) -> None:
        """Edits the rows of x [T, d] in place; with ``norm``, then adds and normalises all of them."""
        self._launch(place, x, residual, norm)

    def normalise(self, norm: FusedNorm, x: Tensor, residual: Tensor) -> None:
        """Adds and normalises, and edits nothing."""
        assert self.norm_kernel is not None
        self.norm_kernel(x, residual, norm.weight, norm.eps, self.nobody, self.tables, 0, form=norm.form)

    def edit_and_measure(
        self,
        place: Place,
        x: Tensor,
        residual: Tensor | None,
        work: Work,
        reduce: Reduce | None = None,
        norm: FusedNorm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`edit`; [rows, n_blocks] how large each block's edit was beside the stream, of the rows of ``work``.

        Also their gates, [rows, n_gates], where there are some.

        reduce: adds up over tensor-parallel ranks, where x is one rank's shard.
        """
        blocks = work.interventions.shape[1]
        norms = torch.zeros(len(x), max(blocks, self.tables.blocks), device=x.device)
        squares = torch.zeros(len(x), device=x.device)
        self._launch(place, x, residual, norm, norms=norms, squares=squares)
        rows = torch.from_numpy(work.rows).to(x.device)
        sizes, square = norms[rows, :blocks], squares[rows]
        if reduce is not None:
            sizes, square = reduce(sizes.square()).sqrt(), reduce(square)
        return sizes / square.sqrt().clamp_min(1e-30)[:, None], self.gates[rows] if work.gated else None

    def has(self, place: Place) -> bool:
        """Whether the place is on this rank's pipeline stage."""
        return place in self._index

    def at(self, sites: Collection[Site]) -> frozenset[Place]:
        return frozenset(place for place in self._index if place.site in sites)

    def has_room(self, resident: Resident, rows: int) -> bool:
        """Whether what the plan needs of each row has room in a pass of so many."""
        plan = resident.plan
        return (not plan.injections or rows <= self.injected_rows) and (not plan.probes or rows <= self.probed_rows)

    def settle(self, wait: bool) -> None:
        """Has noted what passes before have decided and read, see :class:`Readback`."""
        self.told_gates.settle(wait)
        self.told_probes.settle(wait)

    def drop(self, resident: Resident) -> None:
        """The plan is resident no more."""
        for key in [k for k in self._kept if k[0] is resident]:
            self._remove(key)

    # -- parts ------------------------------------------------------------------------------------

    def _launch(
        self, place: Place, x: Tensor, residual: Tensor | None, norm: FusedNorm | None, **sizes: Tensor
    ) -> None:
        where = self.entries, self.tables, self._index[place]
        if norm is None:
            self._kernel(x, residual, *where, **sizes)
            return
        assert self.norm_kernel is not None
        assert residual is not None
        self.norm_kernel(x, residual, norm.weight, norm.eps, *where, **sizes, form=norm.form)

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
        codes = self._codes(resident, mask)
        return _Entry(self.tables.add({self._index[place]: code for place, code in codes.items()}), frozenset(codes))

    def _codes(self, resident: Resident, mask: int) -> dict[Place, Code]:
        """By place; other pipeline stages have the other layers."""
        blocks: dict[Place, tuple[Block | Inject, ...]] = {}
        for place, program in resident.programs(mask).items():
            blocks[place] = program.blocks
        for place, chain in resident.chains(mask).items():
            blocks[place] = tuple(map(_block, chain.blocks))
        gates, probes = resident.token_gates(mask), resident.readings
        sources: dict[Place, list[Source]] = {}
        begun = set[int]()
        for place, injection, weight in resident.sources(mask):
            if place in self._index:
                sources.setdefault(place, []).append(Source(injection, weight, injection not in begun))
                begun.add(injection)
        return {
            place: Code(
                blocks.get(place, ()), gates.get(place, {}), tuple(sources.get(place, ())), probes.get(place, {})
            )
            for place in dict.fromkeys((*blocks, *gates, *sources, *probes))
            if place in self._index
        }

    def _remove(self, key: tuple[Resident, int]) -> None:
        self.tables.remove(self._kept.pop(key).number)
        self._laid_out = None  # the index may come to mean another plan

    def _fill_gates(self, rows: int, opened: Sequence[Opened]) -> None:
        values = np.zeros((rows, GATES), np.float32)
        for gate, first, end in opened:
            values[first:end, gate] = 1
        _stage(values, self.gates)

    def _fill(self, entries: Any) -> None:
        _stage(entries, self.entries)
        named = np.flatnonzero(entries != NONE)
        self._filled = int(named[-1]) + 1 if len(named) else 0


def _block(part: Block | Injected | Restored) -> Block | Inject:
    if isinstance(part, Restored):
        raise TypeError("plans that restore are the host's")
    return Inject(part.index, part.gate) if isinstance(part, Injected) else part


def _stage(values: Any, array: Tensor) -> None:
    """Queues a copy of ``values`` into the first rows of ``array``."""
    source = torch.from_numpy(values)
    if array.is_cuda:
        source = source.pin_memory()
    array[: len(values)].copy_(source, non_blocking=True)
