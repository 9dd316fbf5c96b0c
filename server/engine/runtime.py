"""A worker's steering: which rows of the batch get which program, and applying them as the layers run.

The model runner's adapter calls :meth:`Runtime.begin` with the batch's rows before a forward pass and
:meth:`Runtime.end` after it; the hooks inside the layers call :meth:`Runtime.apply`. Nothing here knows
vLLM. Host work per step grows with the steered requests in the batch, and a batch that has not
changed since the last step reuses what was laid out for it.

An error while a layer is edited is remembered by the requests it concerns, which then fail with it;
it never reaches the engine's step.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.reference import Reduce
from steersman.server.engine.layout import Group, Run, Work, group_rows
from steersman.server.engine.requests import Masks, RequestState, open_request
from steersman.server.engine.resident import Resident, ResidentPlans, Shard
from steersman.steering.plan import Place
from steersman.steering.tokens import Ints

logger = logging.getLogger(__name__)

MEASURE_EVERY = 16  # steps between measurements of how large the edits are
KEPT_REPORTS = 4096


class Scheduled(NamedTuple):
    """The rows of one request in this step's batch."""

    request_id: str
    start: int  # absolute position of the first row
    row: int
    n: int


@dataclass
class Owner:
    """A steered request's rows in this step."""

    state: RequestState
    row: int
    count: int
    start: int
    masks: Masks  # [count] the interventions that select each row
    gates: list[Tensor]  # [count] each, the request's gates in this pass

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)


Layout = dict[Place, Work]


class Runtime:
    def __init__(
        self,
        reduce: Reduce | None = None,
        capacity: int = 2**30,
        limit: int = 4096,
    ) -> None:
        self.reduce = reduce
        self.shards: dict[Place, Shard] = {}
        self.plans = ResidentPlans(capacity, limit, self.shards)
        self.requests: dict[str, RequestState] = {}
        self.finished: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()
        self._owners: list[Owner] = []
        self._layout: Layout = {}
        self._layout_key: object = None
        self._layouts: Layout = {}
        self._reads: dict[Place, bool] = {}  # places that are read by gates or probes in this step
        self._measure = False
        self._steps = 0

    def shard(self, shards: Mapping[Place, Shard]) -> None:
        """States of which places this rank holds only a part; to be called before any plan is loaded."""
        self.shards.update(shards)

    # -- requests ---------------------------------------------------------------------------------

    def add_request(self, request_id: str, args: Mapping[str, Any]) -> None:
        """A steered request enters the batch for the first time."""
        if request_id in self.requests:
            return
        resident = self.plans.get(str(args["plan"]))
        if resident is None:
            logger.error("plan %s of request %s is not resident", args["plan"], request_id)
        else:
            resident.users += 1
        self.requests[request_id] = open_request(request_id, args, resident)

    def remove_request(self, request_id: str) -> None:
        """A request has finished or was aborted; its report is kept until it is asked for."""
        state = self.requests.pop(request_id, None)
        if state is None:
            return
        if state.resident is not None:
            state.resident.users -= 1
        self.finished.setdefault(state.key, []).append(state.report())
        while len(self.finished) > KEPT_REPORTS:
            self.finished.popitem(last=False)

    def reports(self, keys: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """The reports of the requests that each key names, finished or not; finished ones are given once."""
        out = {key: self.finished.pop(key, []) for key in keys}
        for state in self.requests.values():
            if state.key in out:
                out[state.key].append(state.report())
        return out

    # -- one forward pass -------------------------------------------------------------------------

    def begin(self, batch: Sequence[Scheduled], token_ids: Callable[[int, int], Ints]) -> None:
        """Lays out the coming pass. ``token_ids(row, count)`` reads what these rows are fed."""
        self._owners, self._layout, self._reads = [], {}, {}
        if not self.requests:
            self._layout_key, self._layouts = None, {}
            return
        key: list[Run] = []
        for entry in batch:
            state = self.requests.get(entry.request_id)
            if state is None or state.resident is None or not entry.n:
                continue
            try:
                owner = self._own(state, entry, token_ids)
            except Exception as error:
                _fail([state], f"laying out its tokens failed: {error}")
                continue
            key += [Run(state.resident, mask, entry.row + a, entry.row + b) for mask, a, b in _runs(owner.masks)]
        if key != self._layout_key:
            self._layout_key = key
            self._layouts = self._lay_out(key)
        self._layout = self._layouts
        self._reads = {p: True for o in self._owners if o.state.resident for p in _read_places(o.state.resident)}
        self._steps += 1
        self._measure = self._steps % MEASURE_EVERY == 0 or any(
            int(np.bitwise_or.reduce(o.masks)) & o.state.unmeasured for o in self._owners
        )

    def end(self) -> None:
        """The pass is over: what runs outside of one, such as a dummy batch, is not edited."""
        for owner in self._owners:
            owner.state.note_edits(owner.start, owner.masks, owner.gates)
            if self._measure:
                owner.state.attempted(owner.masks)
        self._owners = []
        self._layout = {}
        self._reads = {}

    @property
    def live(self) -> bool:
        """Whether this pass edits or reads anything."""
        return bool(self._layout or self._reads)

    def wants(self, place: Place) -> bool:
        return place in self._layout or place in self._reads

    def apply(self, place: Place, x: Tensor, residual: Tensor | None = None) -> None:
        """Edits ``x`` [.., d] in place; the stream is ``x + residual`` where a residual is given."""
        try:
            self._apply(place, x.view(-1, x.shape[-1]), None if residual is None else residual.view(-1, x.shape[-1]))
        except Exception as error:
            _fail([o.state for o in self._owners], f"editing {_name(place)} failed: {error}")

    # -- parts ------------------------------------------------------------------------------------

    def _own(self, state: RequestState, entry: Scheduled, token_ids: Callable[[int, int], Ints]) -> Owner:
        _, start, row, count = entry
        selection = state.selection
        if start >= selection.prompt_length and not selection.rules:
            masks = np.full(count, selection.generated, dtype=np.uint64)
        else:
            masks = selection.masks(start, start + count, lambda: token_ids(row, count))
        gates = [g.at_start(start, count, selection.prompt_length) for g in state.gates]
        self._owners.append(Owner(state, row, count, start, masks, gates))
        return self._owners[-1]

    def _lay_out(self, key: Sequence[Run]) -> Layout:
        """What is to be done at each place, rows of the same plan and mask together."""
        out: Layout = {}
        for (resident, mask), rows in group_rows(key).items():
            try:
                programs = resident.programs(mask)
            except Exception as error:
                _fail(self._using(resident), f"compiling its plan failed: {error}")
                self._layout_key = None  # what is laid out lacks it, so it is not for another batch
                continue
            for place, program in programs.items():
                out.setdefault(place, Work()).groups.append(Group(resident, program, rows))
        return out

    def _using(self, resident: Resident) -> list[RequestState]:
        return [o.state for o in self._owners if o.state.resident is resident]

    def _apply(self, place: Place, x: Tensor, residual: Tensor | None) -> None:
        decided = self._read_gates(place, x, residual) if place in self._reads else []
        if (work := self._layout.get(place)) is not None:
            gates = self._gates(work) if work.gated else None
            reduce = self.reduce if place in self.shards else None
            try:
                relative = work.apply(x, residual, gates, self._measure, reduce)
                if relative is not None:
                    self._measured(place, work, relative, gates)
            except Exception as error:
                edited = {id(g.resident) for g in work.groups}
                states = [o.state for o in self._owners if id(o.state.resident) in edited]
                _fail(states, f"editing {_name(place)} failed: {error}")
        for owner, i, values in decided:
            owner.gates[i] = values
        if place in self._reads:
            self._read_probes(place, x, residual)

    def _gates(self, work: Work) -> Tensor:
        """[rows, n_gates] of the work's rows."""
        count = max(len(g.resident.plan.gates) for g in work.groups)
        everyone = torch.zeros(max(o.row + o.count for o in self._owners), count)
        for owner in self._owners:
            for i, values in enumerate(owner.gates):
                everyone[owner.rows, i] = values
        return everyone[torch.cat([g.rows for g in work.groups])]

    def _measured(self, place: Place, work: Work, relative: Tensor, gates: Tensor | None) -> None:
        """Adds up each intervention's ‖Δx‖/‖x‖ over the rows that it edited."""
        sizes = relative.double().numpy()
        for group, part in work.slices():
            rows = group.rows.numpy()
            for owner in self._owners:
                if owner.state.resident is not group.resident:
                    continue
                mine = part.start + np.flatnonzero((rows >= owner.row) & (rows < owner.row + owner.count))
                for j, block in enumerate(group.program.blocks):
                    chosen = sizes[mine, j]
                    if block.gate >= 0:
                        assert gates is not None
                        chosen = chosen[gates[mine, block.gate].numpy() > 0]
                    if len(mine):
                        owner.state.measured(block.intervention, place.layer, chosen)

    def _read_gates(self, place: Place, x: Tensor, residual: Tensor | None) -> list[tuple[Owner, int, Tensor]]:
        """The gates that are read here, before this place's edits; they hold for later places only."""
        out = []
        for owner in self._owners:
            for i, gate in enumerate(owner.state.gates):
                if gate.read.place != place:
                    continue
                stream = self._stream(place, x, residual, owner.rows)
                values = owner.gates[i].clone()
                try:
                    gate.decide(stream, owner.start, owner.state.selection.prompt_length, values)
                    out.append((owner, i, values))
                except Exception as error:
                    _fail([owner.state], f"reading a gate at {_name(place)} failed: {error}")
        return out

    def _stream(self, place: Place, x: Tensor, residual: Tensor | None, rows: slice) -> Tensor:
        """[n, d] float32, the site's activations, put together from the ranks where each holds a part."""
        own = x[rows].float()
        if residual is not None:
            own = own + residual[rows].float()
        shard = self.shards.get(place)
        if shard is None or self.reduce is None:
            return own
        whole = own.new_zeros(len(own), shard.width)
        whole[:, shard.start : shard.stop] = own
        return self.reduce(whole)

    def _read_probes(self, place: Place, x: Tensor, residual: Tensor | None) -> None:
        for owner in self._owners:
            resident = owner.state.resident
            assert resident is not None
            for probe in resident.plan.probes:
                if probe.place == place:
                    values = (self._stream(place, x, residual, owner.rows) * probe.direction).sum(-1)
                    owner.state.see_probe(probe.probe, place.layer, owner.start, values)


def _fail(states: Iterable[RequestState], message: str) -> None:
    """To be called where an exception is handled: it becomes the requests' own, the first one of each is kept."""
    fresh = [state for state in states if state.error is None]
    if fresh:
        logger.exception(message)
    for state in fresh:
        state.error = message


def _name(place: Place) -> str:
    return f"layer {place.layer} {place.site.value}"


def _runs(masks: Masks) -> Iterable[tuple[int, int, int]]:
    """(mask, first, past the last) of maximal runs of equal masks that are not 0."""
    edges = [0, *(np.flatnonzero(masks[1:] != masks[:-1]) + 1).tolist(), len(masks)]
    for a, b in pairwise(edges):
        if mask := int(masks[a]):
            yield mask, a, b


def _read_places(resident: Resident) -> Iterable[Place]:
    plan = resident.plan
    return [g.place for g in plan.gates] + [p.place for p in plan.probes]
