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
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from steersman.kernels.reference import Reduce
from steersman.server.engine.captures import NOTHING, Captures
from steersman.server.engine.carry import Carried, Carry, Source
from steersman.server.engine.device import DevicePlans
from steersman.server.engine.dosage import Dosage
from steersman.server.engine.gating import Decided, gates_of, read_gates
from steersman.server.engine.layout import Group, Run, Work, group_rows, runs_of
from steersman.server.engine.monitor import Monitor
from steersman.server.engine.owners import Owner, Scheduled, fail, own
from steersman.server.engine.probing import Probing
from steersman.server.engine.requests import RequestState, open_request
from steersman.server.engine.resident import Resident, ResidentPlans, Shard
from steersman.server.engine.signals import Logits, Streams, next_tokens
from steersman.server.engine.sizes import Measured, add_up, trace
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from steersman.steering.tokens import Ints

logger = logging.getLogger(__name__)

MEASURE_EVERY = 32  # steps between measurements of how large the edits are
KEPT_REPORTS = 4096
KEPT_LAYOUTS = 16


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
        self.plans.on_drop = self._dropped
        self.device: DevicePlans | None = None
        self.monitor: Monitor | None = None
        self.dosage: Dosage | None = None  # to be set before any request is added
        self.keeps = True  # whether this rank keeps captured rows; of tensor-parallel ones one does
        self.requests: dict[str, RequestState] = {}
        self.finished: OrderedDict[str, list[RequestState]] = OrderedDict()
        self._owners: list[Owner] = []
        self._layout: Layout = {}
        self._layout_key: object = None
        self._layouts: Layout = {}
        self._recent: OrderedDict[tuple[Run, ...], Layout] = OrderedDict()
        self._carried = Carried()
        self._reads: frozenset[Place] = frozenset()  # places that are read by gates or probes in this step
        self.wanted: Container[Place] = ()  # places that are edited or read in this step
        self.live = False  # whether there are any
        self._measure = False
        self._measured: list[Measured] = []
        self._asked: list[Measured] = []  # the same before the dosage's limit, where there is one
        self._probing = Probing(())
        self._captures = NOTHING
        self._streams = Streams()
        self._logits: Logits | None = None  # of the last pass, until they are computed
        self._on_device: list[Run] = []  # of this pass
        self._device_layout: Layout | None = None  # of these runs, made when they are measured
        self._capturing = False
        self._steps = 0

    def shard(self, shards: Mapping[Place, Shard]) -> None:
        """States of which places this rank holds only a part; to be called before any plan is loaded."""
        self.shards.update(shards)

    def use_device(self, device: DevicePlans) -> None:
        """Plans that ``device`` takes are run there from now on."""
        self.device = device

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
            resident.on_device = resident.on_device or (
                self.device is not None and self.dosage is None and self.device.takes(resident)
            )
        self.requests[request_id] = open_request(request_id, args, resident)

    def remove_request(self, request_id: str) -> None:
        """A request has finished or was aborted; what its report needs is kept until it is asked for."""
        state = self.requests.pop(request_id, None)
        if state is None:
            return
        if state.resident is not None:
            state.resident.users -= 1
            state.resident = None  # the plan may go
        self.finished.setdefault(state.key, []).append(state)
        while len(self.finished) > KEPT_REPORTS:
            self.finished.popitem(last=False)

    def reports(self, asked: Iterable[str] | Mapping[str, Mapping[str, int]]) -> dict[str, list[dict[str, Any]]]:
        """The reports of the requests that each key names, finished or not; finished ones are given once.

        A mapping says for each key how many positions of each request count.
        """
        ends = asked if isinstance(asked, Mapping) else dict[str, Mapping[str, int]]()
        found = {key: self.finished.pop(key, []) for key in asked}
        for state in self.requests.values():
            if state.key in found:
                found[state.key].append(state)
        return {
            key: [state.report(ends.get(key, {}).get(state.request_id)) for state in states]
            for key, states in found.items()
        }

    def probe_rows(self, asked: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, dict[str, Any]]:
        """What the probes of some requests have read, finished or not: by key and id, of positions [from, to)."""
        states = [s for s in self.requests.values() if s.key in asked]
        states += [s for key in asked for s in self.finished.get(key, ())]
        found: dict[str, dict[str, Any]] = {key: {} for key in asked}
        for state in states:
            if (bounds := asked[state.key].get(state.request_id)) is not None:
                found[state.key][state.request_id] = state.probe_rows(*bounds)
        return found

    def captured(self, key: str) -> RequestState | None:
        """The request that ``key`` names, finished or not, with what was captured of it."""
        found = [s for s in self.requests.values() if s.key == key] + self.finished.get(key, [])
        return found[0] if found else None

    # -- one forward pass -------------------------------------------------------------------------

    def needs_host(self, request_ids: Iterable[str]) -> bool:
        """Whether a pass with these requests needs the host between its layers, so that no graph can stand for it."""
        if self.monitor is not None and self.monitor.due:
            return True
        states = [s for i in request_ids if (s := self.requests.get(i)) is not None] if self.requests else []
        measured = self.dosage is not None
        return any(s.resident is not None and (measured or s.needs_layers or not s.resident.on_device) for s in states)

    @contextmanager
    def capturing(self, sites: Collection[Site]) -> Iterator[None]:
        """Passes in this context launch the kernel at all hooked places of ``sites``, to be captured in a graph."""
        assert self.device is not None
        self._rest()
        self.wanted = self.device.places = self.device.at(sites)
        self.live = self._capturing = True
        try:
            yield
        finally:
            self._capturing = False
            self._rest()

    def begin(self, batch: Sequence[Scheduled], token_ids: Callable[[int, int], Ints], replayed: bool = False) -> None:
        """Lays out the coming pass. ``token_ids(row, count)`` reads what these rows are fed.

        replayed: the pass replays graphs, so that only what runs on the device can be done.
        """
        self._rest()
        self._logits = None
        sampled = self.monitor is not None and self.monitor.begin(() if replayed else batch, self.requests)
        if not self.requests and not sampled:
            self._layout_key, self._layouts = None, {}
            return
        key: list[Run] = []
        for entry in batch:
            state = self.requests.get(entry.request_id)
            if state is None or state.resident is None or not entry.n:
                continue
            try:
                owner = own(state, entry, token_ids)
                self._owners.append(owner)
            except Exception as error:
                fail([state], f"laying out its tokens failed: {error}")
                continue
            if entry.n == 1 and owner.chosen:
                key.append(Run(state.resident, owner.chosen, entry.row, entry.row + 1))
            elif owner.chosen:
                key += [Run(state.resident, mask, entry.row + a, entry.row + b) for mask, a, b in runs_of(owner.masks)]
        if replayed:
            need_host = [
                o.state
                for o in self._owners
                if o.state.needs_layers or (o.state.resident and not o.state.resident.on_device)
            ]
            fail(need_host, "a pass that needs the host has been given a graph")
        if self.device is not None:
            key = self._lay_out_on(self.device, key, replayed)
        if key != self._layout_key:
            self._layout_key = key
            self._layouts = self._recent_layout(key)
        self._layout = self._layouts
        self._reads = frozenset().union(*(o.state.resident.reads for o in self._owners if o.state.resident))
        self.wanted = self._reads.union(self._layout) if self._reads else self._layout
        if self._on_device and self.device is not None:
            self.wanted = self.device.places.union(self.wanted) if self.wanted else self.device.places
        if sampled and self.monitor is not None:
            self.wanted = self.monitor.places.union(self.wanted)
        self._captures = Captures(self._owners)
        if self._captures.places:
            self.wanted = self._captures.places.union(self.wanted)
        if asking := [o for o in self._owners if o.state.signals is not None]:
            self._streams, self._logits = Streams(asking), next_tokens(batch, asking)
        if self._streams.places:
            self.wanted = self._streams.places.union(self.wanted)
        self.live = bool(self.wanted)
        self._probing = Probing(self._owners)
        self._steps += 1
        due = self._steps % MEASURE_EVERY == 0 or any(o.chosen & o.state.unmeasured for o in self._owners)
        every = self.dosage is not None or any(o.state.whole for o in self._owners)
        self._measure = (due or every or sampled) and not replayed

    def end(self) -> None:
        """The pass is over: what runs outside of one, such as a dummy batch, is not edited."""
        try:
            self._note()
        except Exception as error:
            fail([o.state for o in self._owners], f"noting what was done failed: {error}")
        for owner in self._owners:
            owner.state.note_edits(owner.start, owner.masks, owner.gates)
            if self._measure:
                owner.state.attempted(owner.chosen)
        self._rest()

    def _note(self) -> None:
        """What the pass has measured and read goes to the requests and into the statistics."""
        add_up(self._measured, self._owners)
        trace(self._measured, self._owners)
        if self.dosage is not None:
            self.dosage.note(self._asked, self._owners)
        sampled = self.monitor is not None and self.monitor.sampling
        self._probing.finish(self.monitor.probed if sampled and self.monitor is not None else None)
        self._streams.finish()
        if self.monitor is not None:
            self.monitor.end(self._measured)

    def _rest(self) -> None:
        self._owners, self._measured, self._asked, self._layout = [], [], [], {}
        self._probing, self._captures, self._streams = Probing(()), NOTHING, Streams()
        self._carried = Carried()
        self._reads = frozenset()
        self.wanted, self.live, self._measure = (), False, False
        if self.device is not None:
            self.device.rest()
            self._on_device, self._device_layout = [], None

    def apply(self, place: Place, x: Tensor, residual: Tensor | None = None) -> None:
        """Edits ``x`` [.., d] in place; the stream is ``x + residual`` where a residual is given."""
        try:
            if x.dim() != 2:
                x, residual = _flat(x), None if residual is None else _flat(residual)
            if self.device is not None and place in self.device.places:
                self._apply_on(self.device, place, x, residual)
            self._apply(place, x, residual)
        except Exception as error:
            if self._capturing:
                raise
            fail([o.state for o in self._owners], f"editing {place.name} failed: {error}")

    def see_logits(self, logits: Tensor) -> None:
        """Logits [n, vocabulary] that the model computes; the first after a pass are of its tokens."""
        if self.monitor is not None:
            self.monitor.see_logits(logits)
        expected, self._logits = self._logits, None
        if expected is not None and self.keeps:
            try:
                expected.read(logits)
            except Exception as error:
                asking = [s for s in self.requests.values() if s.signals is not None and s.signals.of_logits]
                fail(asking, f"reading the logits failed: {error}")

    # -- parts ------------------------------------------------------------------------------------

    def _not_captured(self, owner: Owner, error: Exception) -> None:
        fail([owner.state], f"capturing activations failed: {error}")

    def _recent_layout(self, key: Sequence[Run]) -> Layout:
        """What was laid out for the same rows of the same plans lately, as a robot's observations have them again."""
        found = self._recent.pop(tuple(key), None)
        if found is None:
            found = self._lay_out(key)
        if self._layout_key is not None:  # else it lacks something
            self._recent[tuple(key)] = found
            if len(self._recent) > KEPT_LAYOUTS:
                self._recent.popitem(last=False)
        return found

    def _dropped(self, resident: Resident) -> None:
        """A plan is given up, so that nothing of it may be kept."""
        for key in [key for key in self._recent if any(run.resident is resident for run in key)]:
            del self._recent[key]
        if self.device is not None:
            self.device.drop(resident)

    def _lay_out(self, key: Sequence[Run]) -> Layout:
        """What is to be done at each place, rows of the same plan and mask together."""
        out: Layout = {}
        for (resident, mask), rows in group_rows(key).items():
            try:
                programs = resident.programs(mask) | resident.chains(mask)
            except Exception as error:
                fail(self._using(resident), f"compiling its plan failed: {error}")
                self._layout_key = None  # what is laid out lacks it, so it is not for another batch
                continue
            for place, program in programs.items():
                out.setdefault(place, Work()).add(Group(resident, program, rows, mask))
            for place, index, weight in resident.sources(mask):
                out.setdefault(place, Work()).sources.append(Source(Carry(resident, mask, index), weight, rows))
        return out

    def _lay_out_on(self, device: DevicePlans, key: list[Run], replayed: bool) -> list[Run]:
        """Lays out the runs that the device takes; those that are left to the host."""
        runs = [run for run in key if run.resident.on_device]
        try:
            lacking = device.lay_out(runs)
        except Exception as error:
            self._fail_plans(runs, f"laying out failed: {error}")
            return [run for run in key if not run.resident.on_device]
        if lacking and replayed:
            self._fail_plans(lacking, "the plans of this batch do not fit on the device together")
        self._on_device = [run for run in runs if run not in lacking]
        return [run for run in key if not run.resident.on_device or (run in lacking and not replayed)]

    def _apply_on(self, device: DevicePlans, place: Place, x: Tensor, residual: Tensor | None) -> None:
        if not self._measure:
            device.edit(place, x, residual)
            return
        if self._device_layout is None:
            self._device_layout = self._lay_out(self._on_device)
        work = self._device_layout[place]
        reduce = self.reduce if place in self.shards else None
        self._measured.append((place, work, device.edit_and_measure(place, x, residual, work, reduce), None))

    def _fail_plans(self, runs: Iterable[Run], message: str) -> None:
        residents = {id(run.resident) for run in runs}
        fail([o.state for o in self._owners if id(o.state.resident) in residents], message)

    def _using(self, resident: Resident) -> list[RequestState]:
        return [o.state for o in self._owners if o.state.resident is resident]

    def _apply(self, place: Place, x: Tensor, residual: Tensor | None) -> None:
        decided = self._read_gates(place, x, residual) if place in self._reads else []
        work = self._layout.get(place)
        raw = self._read_sources(place, work, x, residual) if work is not None and work.sources else []
        if work is not None and work.groups:
            gates = gates_of(work, self._owners) if work.gated else None
            reduce = self.reduce if place in self.shards else None
            try:
                if self.dosage is not None:
                    relative, asked = self.dosage.apply(work, x, residual, gates, reduce, self._carried)
                    self._asked.append((place, work, asked, gates))
                else:
                    relative = work.apply(x, residual, gates, self._measure, reduce, self._carried)
                if relative is not None:
                    self._measured.append((place, work, relative, gates))
            except Exception as error:
                edited = {id(g.resident) for g in work.groups}
                states = [o.state for o in self._owners if id(o.state.resident) in edited]
                fail(states, f"editing {place.name} failed: {error}")
        self._carried.add(raw)
        for owner, i, values in decided:
            owner.gates[i] = values
            if self.monitor is not None:
                self.monitor.gate(owner.state, i, owner.masks, values)
        if place in self._reads:
            self._probing.read(place, x, residual, self.shards.get(place), self.reduce)
        if place in self._captures.places:
            reduce = self.reduce if place in self.shards else None
            self._captures.read(place, x, residual, self.shards.get(place), reduce, self.keeps, self._not_captured)
        if self.keeps and place in self._streams.places:
            self._streams.read(place, x, residual)
        if self.monitor is not None and self.monitor.sampling:
            self.monitor.see(place, x, residual)

    def _read_sources(self, place: Place, work: Work, x: Tensor, residual: Tensor | None) -> list[tuple[Carry, Tensor]]:
        """What injections at later layers take of this place, before its edits."""
        try:
            return self._carried.read(work.sources, x, residual)
        except Exception as error:
            reading = {id(s.carry.resident) for s in work.sources}
            states = [o.state for o in self._owners if id(o.state.resident) in reading]
            fail(states, f"reading {place.name} for an injection failed: {error}")
            return []

    def _read_gates(self, place: Place, x: Tensor, residual: Tensor | None) -> list[Decided]:
        """The gates that are read here, before this place's edits; they hold for later places only."""
        return read_gates(self._owners, place, lambda owner: self._stream(place, x, residual, owner.rows))

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


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
