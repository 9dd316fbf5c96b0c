"""Plans that a worker holds: least recently used ones dropped first, plans in use never.

A program is compiled per place and per set of active interventions (the bit mask of
:class:`steersman.steering.tokens.Selection`) when it is first needed, and kept with its plan.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steersman.kernels.program import Program, Reading
from steersman.kernels.reference import Reduce
from steersman.server.engine.chain import Chain, Injected, Own, Restored, chain
from steersman.steering.errors import CapacityExceeded, SteeringError
from steersman.steering.plan import Place, Plan

logger = logging.getLogger(__name__)

KEPT_MASKS = 256  # compiled sets of interventions per plan: prompts may combine 64 of them in many ways


@dataclass(frozen=True)
class Shard:
    """The coordinates of a site that this tensor-parallel rank holds."""

    start: int
    stop: int
    width: int  # of the whole

    def gathered(self, own: Tensor, reduce: Reduce | None) -> Tensor:
        """[n, width] the activation, from what each rank has of it; ``own`` [n, stop - start] is this one's."""
        if reduce is None:
            raise ValueError("a rank has a part of the activation, and nothing adds the parts up")
        whole = own.new_zeros(len(own), self.width)
        whole[:, self.start : self.stop] = own
        return reduce(whole)


@dataclass(eq=False)
class Resident:
    """One plan on this worker, from when it is loaded until it is dropped; loaded again it is another one."""

    plan: Plan
    size: int  # bytes, with the encoders that it has the worker hold
    shards: Mapping[Place, Shard]  # places of which this rank holds only a part
    users: int = 0  # requests in flight
    holders: set[str] = field(default_factory=set)
    on_device: bool = False  # whether a device takes it, see `DevicePlans.takes`
    _programs: dict[int, dict[Place, Program]] = field(default_factory=dict)

    @cached_property
    def reads(self) -> frozenset[Place]:
        """Places that its gates and probes read."""
        return frozenset(g.place for g in self.plan.gates) | frozenset(p.place for p in self.plan.probes)

    @cached_property
    def decides_once(self) -> bool:
        """Whether it has gates that are decided by the prompt."""
        return any(gate.per_request for gate in self.plan.gates)

    def token_gates(self, mask: int) -> dict[Place, dict[int, Reading]]:
        """The gates of the interventions in ``mask`` that each token decides, by the place where they are read."""
        found: dict[Place, dict[int, Reading]] = {}
        for index in {step.gate for i, step in enumerate(self.plan.steps) if mask >> i & 1 and step.gate >= 0}:
            gate = self.plan.gates[index]
            if not gate.per_request:
                found.setdefault(gate.place, {})[index] = gate.reading
        return found

    @cached_property
    def readings(self) -> dict[Place, dict[int, Reading]]:
        """What probes read, by place and column: its index among the plan's reads."""
        found: dict[Place, dict[int, Reading]] = {}
        for column, probe in enumerate(self.plan.probes):
            found.setdefault(probe.place, {})[column] = probe.reading
        return found

    @cached_property
    def probes(self) -> dict[Place, tuple[list[int], Tensor]]:
        """At each place that probes read by a product: which of the plan's they are, and their directions [k, d]."""
        found: dict[Place, tuple[list[int], list[Tensor]]] = {}
        for column, probe in enumerate(self.plan.probes):
            if probe.direction is not None:
                columns, directions = found.setdefault(probe.place, ([], []))
                columns.append(column)
                directions.append(probe.direction)
        return {place: (columns, torch.stack(directions)) for place, (columns, directions) in found.items()}

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
            size = len(data) + sum({e.encode.key: e.encode.nbytes for e in plan.encodes}.values())
            self._make_room(size)
            self.on_load(plan)
            resident = self._plans[plan.id] = Resident(plan, size, self.shards)
            self.size += size
        resident.holders.add(holder)
        return plan.id

    def load(self, data: bytes, holder: str, release: Iterable[str], check: Callable[[Plan], None]) -> dict[str, Any]:
        """:meth:`add` after :meth:`release`, as the HTTP process asks for it.

        The plan's id and how many are resident now, or what is wrong. ``check`` raises for what cannot be done here.
        """
        try:
            self.release(release, holder)
            check(Plan.from_bytes(data))
            return {"plan": self.add(data, holder), "resident": len(self)}
        except SteeringError as error:
            return {"error": error.message, "code": error.code}
        except Exception as error:
            logger.exception("a plan could not be loaded")
            return {"error": str(error), "code": "engine_unsteered"}

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
