"""Plans that a worker holds: least recently used ones dropped first, plans in use never.

A program is compiled per place and per set of active interventions (the bit mask of
:class:`steersman.steering.tokens.Selection`) when it is first needed, and kept with its plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from steersman.kernels.program import Program
from steersman.server.engine.chain import Chain, Injected, Own, Restored, chain
from steersman.steering.errors import CapacityExceeded
from steersman.steering.plan import Place, Plan

KEPT_MASKS = 256  # compiled sets of interventions per plan: prompts may combine 64 of them in many ways


@dataclass(frozen=True)
class Shard:
    """The coordinates of a site that this tensor-parallel rank holds."""

    start: int
    stop: int
    width: int  # of the whole


@dataclass(eq=False)
class Resident:
    """One plan on this worker, from when it is loaded until it is dropped; loaded again it is another one."""

    plan: Plan
    size: int  # bytes, with the encoders that it has the worker hold
    shards: Mapping[Place, Shard]  # places of which this rank holds only a part
    users: int = 0  # requests in flight
    holders: set[str] = field(default_factory=set)
    on_device: bool = False  # whether a pass with it needs nothing of the host
    _programs: dict[int, dict[Place, Program]] = field(default_factory=dict)

    @cached_property
    def reads(self) -> frozenset[Place]:
        """Places that its gates and probes read."""
        return frozenset(g.place for g in self.plan.gates) | frozenset(p.place for p in self.plan.probes)

    @cached_property
    def probes(self) -> dict[Place, tuple[list[int], Tensor]]:
        """At each place that probes read: which of the plan's reads these are, and their directions [k, d]."""
        found: dict[Place, list[int]] = {}
        for column, probe in enumerate(self.plan.probes):
            found.setdefault(probe.place, []).append(column)
        return {
            place: (columns, torch.stack([self.plan.probes[c].direction for c in columns]))
            for place, columns in found.items()
        }

    def programs(self, mask: int) -> dict[Place, Program]:
        """The programs of the interventions in ``mask``, by place."""
        found = self._programs.get(mask)
        if found is None:
            found = self._programs[mask] = self._compile(mask)
            if len(self._programs) > KEPT_MASKS:
                del self._programs[next(iter(self._programs))]
        return found

    def chains(self, mask: int) -> dict[Place, Chain]:
        """All that the interventions in ``mask`` do at the places where one of them injects or restores."""
        found: dict[Place, list[Own]] = {}
        for index, injection in enumerate(self.plan.injections):
            if mask >> injection.intervention & 1:
                for place in injection.written:
                    found.setdefault(place, []).append(Injected(injection.intervention, index, injection.gate))
        for index, r in enumerate(self.plan.restorations):
            if mask >> r.intervention & 1:
                basis = None if r.basis is None else self._own(r.place, r.basis)
                part = Restored(r.intervention, index, r.gate, r.preserve_norm, basis)
                found.setdefault(r.place, []).append(part)
        programs = self.programs(mask) if found else {}
        return {place: chain(programs.get(place), others) for place, others in found.items()}

    def restored(self, index: int, positions: Tensor, lengths: Tensor) -> Tensor:
        """[n, d] what the plan's ``index``-th restoration puts at ``positions`` [n] of prompts of ``lengths`` [n]."""
        restoration = self.plan.restorations[index]
        table = torch.tensor(restoration.positions)
        matches = torch.where(table < 0, lengths[:, None] + table, table) == positions[:, None]  # [n, rows]
        if not bool(matches.any(1).all()):
            raise LookupError("a token that is to be restored has no row")
        chosen = len(table) - 1 - matches.int().flip(1).argmax(1)  # the last one, as of interventions in order
        return self._own(restoration.place, restoration.rows)[chosen]

    def _own(self, place: Place, rows: Tensor) -> Tensor:
        """The coordinates that this rank holds."""
        shard = self.shards.get(place)
        return rows if shard is None else rows[:, shard.start : shard.stop]

    def sources(self, mask: int) -> Iterator[tuple[Place, int, float]]:
        """(place, injection, weight) of all that is read for the injections of the interventions in ``mask``."""
        for index, injection in enumerate(self.plan.injections):
            if mask >> injection.intervention & 1:
                for layer, weight in injection.sources:
                    yield Place(layer, injection.site), index, weight

    def _compile(self, mask: int) -> dict[Place, Program]:
        out = {}
        for place, blocks in self.plan.blocks.items():
            active = [b for b in blocks if mask >> b.intervention & 1]
            if active:
                program = Program(tuple(active), active[0].write.width)
                shard = self.shards.get(place)
                out[place] = program.shard(shard.start, shard.stop) if shard else program
        return out


class ResidentPlans:
    """At most ``capacity`` bytes of plans and ``limit`` plans.

    A plan stays while a request in flight uses it or an HTTP process (a *holder*) has it pinned: requests
    may wait in the scheduler's queue, where workers do not see them, for as long as they like.
    """

    def __init__(self, capacity: int, limit: int, shards: Mapping[Place, Shard]) -> None:
        self.on_load: Callable[[Plan], None] = lambda plan: None  # before a plan is taken; may raise
        self.on_drop: Callable[[Resident], None] = lambda resident: None
        self.capacity = capacity
        self.limit = limit
        self.shards = shards
        self.size = 0
        self._plans: OrderedDict[str, Resident] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, plan_id: str) -> Resident | None:
        found = self._plans.get(plan_id)
        if found is not None:
            self._plans.move_to_end(plan_id)
        return found

    def add(self, data: bytes, holder: str) -> str:
        """Makes a plan resident, pinned by ``holder``; its id. Raises CapacityExceeded when nothing can make room."""
        plan = Plan.from_bytes(data)
        resident = self.get(plan.id)
        if resident is None:
            size = len(data) + sum({e.sha256: e.nbytes for _, e in plan.encodes}.values())
            self._make_room(size)
            self.on_load(plan)
            resident = self._plans[plan.id] = Resident(plan, size, self.shards)
            self.size += size
        resident.holders.add(holder)
        return plan.id

    def release(self, plan_ids: Iterable[str], holder: str) -> None:
        """``holder`` will not name these plans again before adding them anew."""
        for plan_id in plan_ids:
            if resident := self._plans.get(plan_id):
                resident.holders.discard(holder)

    def _make_room(self, size: int) -> None:
        if size > self.capacity:
            raise CapacityExceeded(f"the plan takes {size} bytes; plans may take {self.capacity} in all")
        idle = [plan_id for plan_id, r in self._plans.items() if not r.users and not r.holders]
        while self.size + size > self.capacity or len(self._plans) >= self.limit:
            if not idle:
                raise CapacityExceeded("every resident plan is in use; try again when requests have finished")
            dropped = self._plans.pop(idle.pop(0))
            self.size -= dropped.size
            self.on_drop(dropped)
