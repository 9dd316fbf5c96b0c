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
from functools import partial
from typing import Any

from torch import Tensor

from steersman.kernels.reference import Reduce
from steersman.server.engine.captures import NOTHING, Captures
from steersman.server.engine.carry import Carried, Carry, Source
from steersman.server.engine.device import DevicePlans, Opened
from steersman.server.engine.dosage import Dosage
from steersman.server.engine.fusion import FusedNorm, Fusion
from steersman.server.engine.gating import Decided, gates_of, read_gates
from steersman.server.engine.layout import Group, Run, Work, group_rows, liken, runs_of
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
        self.fusion = Fusion()
        self.switch: Any = None  # called with the places of a pass that wants others than the last one; see hooks.py
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
        self.wanted: Collection[Place] = ()  # places that are edited or read in this step
        self.fused: Mapping[int, Place] = {}  # places that are edited with the norm of this index
        self._unmade: set[Place] = set()  # of these, whose norm has not been called yet
        self.live = False  # whether there are any of either
        self._switched: object = None  # what it was called with
        self._plain = False  # whether this pass does nothing but run the layout's tables
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
        self._settle(wait=True)
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
        self._settle(wait=True)
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

    def needs_host(self, starts: Mapping[str, int], rows: int) -> bool:
        """Whether a pass with these requests needs the host between its layers, so that no graph can stand for it.

        starts: the position from which each is computed. rows: of all of them, at most.
        """
        if self.monitor is not None and self.monitor.due:
            return True
        if not self.requests:
            return False
        found = ((self.requests.get(request_id), start) for request_id, start in starts.items())
        return any(s is not None and self._needs_host(s, self._runs_on_device(s, start, rows)) for s, start in found)

    def _needs_host(self, state: RequestState, on_device: bool) -> bool:
        return state.resident is not None and (self.dosage is not None or state.needs_layers or not on_device)

    def _runs_on_device(self, state: RequestState, start: int, rows: int) -> bool:
        """Whether the device does all that the request's plan asks of a pass of so many rows."""
        if self.device is None or state.resident is None or not state.on_device(start):
            return False
        return self.device.has_room(state.resident, rows)

    @contextmanager
    def capturing(self, sites: Collection[Site]) -> Iterator[None]:
        """Passes in this context launch the kernel at all hooked places of ``sites``, to be captured in a graph."""
        assert self.device is not None
        self._rest()
        self.wanted = self.device.places = self.device.at(sites)
        self._fuse(self.device, ())
        self._switch()
        self.live = self._capturing = True
        try:
            yield
            if self._unmade and len(self._unmade) < len(self.fused):  # the model ran
                raise RuntimeError(
                    f"{min(self._unmade).name} was to be edited by a norm that was not called with the stream; "
                    "say --steering-fused-norm off"
                )
        finally:
            self._capturing = False
            self._rest()

    def begin(self, batch: Sequence[Scheduled], token_ids: Callable[[int, int], Ints], replayed: bool = False) -> None:
        """Lays out the coming pass. ``token_ids(row, count)`` reads what these rows are fed.

        replayed: the pass replays graphs, so that only what runs on the device can be done.
        """
        self._rest()
        self._settle()
        self._logits = None
        sampled = self.monitor is not None and self.monitor.begin(() if replayed else batch, self.requests)
        if not self.requests and not sampled:
            self._layout_key, self._layouts = None, {}
            self._switch()
            return
        key: list[Run] = []
        on_device: list[Run] = []
        opened: list[Opened] = []
        rows = max((entry.row + entry.n for entry in batch), default=0)
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
            owner.on_device = self._runs_on_device(state, entry.start, rows)
            if sampled and state.resident.plan.probes:
                owner.on_device = False  # statistics want the cosines as well, which only the host makes
            runs = on_device if owner.on_device else key
            probed = owner.on_device and bool(state.resident.plan.probes)  # rows that nothing edits are read as well
            if entry.n == 1 and (owner.chosen or probed):
                runs.append(Run(state.resident, owner.chosen, entry.row, entry.row + 1))
            elif owner.chosen or probed:
                found = runs_of(owner.masks, unedited=probed)
                runs += [Run(state.resident, mask, entry.row + a, entry.row + b) for mask, a, b in found]
            if owner.on_device and state.resident.decides_once:
                opened += self._opened(owner)
        if replayed:
            need_host = [o.state for o in self._owners if self._needs_host(o.state, o.on_device)]
            fail(need_host, "a pass that needs the host has been given a graph")
        if self.device is not None:
            key = ([] if replayed else key) + self._lay_out_on(self.device, on_device, opened, replayed)
        if key != self._layout_key:
            self._layout_key = key
            self._layouts = self._recent_layout(key)
        self._layout = self._layouts
        self._reads = frozenset().union(
            *(o.state.resident.reads for o in self._owners if o.state.resident and not o.on_device)
        )
        self.wanted = self._reads.union(self._layout) if self._reads else self._layout
        if self._on_device and self.device is not None:
            self.wanted = self.device.places.union(self.wanted) if self.wanted else self.device.places
        if sampled and self.monitor is not None:
            self.wanted = self.monitor.places.union(self.wanted)
        self._carried = Carried(self._owners)
        self._captures = Captures(self._owners)
        if self._captures.places:
            self.wanted = self._captures.places.union(self.wanted)
        if asking := [o for o in self._owners if o.state.signals is not None]:
            self._streams, self._logits = Streams(asking), next_tokens(batch, asking)
        if self._streams.places:
            self.wanted = self._streams.places.union(self.wanted)
        if self.fusion.norms and self._on_device and self.device is not None and not replayed:
            seen = self.monitor.places if sampled and self.monitor is not None else ()
            host = self._layout, self._reads, self._captures.places, self._streams.places, seen
            self._fuse(self.device, host)
        self.live = bool(self.wanted or self.fused)
        self._probing = Probing([o for o in self._owners if not o.on_device], cosines=sampled)
        self._steps += 1
        due = self._steps % MEASURE_EVERY == 0 or any(o.chosen & o.state.unmeasured for o in self._owners)
        every = self.dosage is not None or any(o.state.whole for o in self._owners)
        self._measure = (due or every or sampled) and not replayed
        self._plain = self.wanted is self._layouts and self.reduce is None and not (self._measure or self._reads)
        self._switch()

    def end(self) -> None:
        """The pass is over: what runs outside of one, such as a dummy batch, is not edited."""
        if self._unmade:
            fail([o.state for o in self._owners], f"{min(self._unmade).name} was not edited: no norm was called there")
        try:
            self._note()
        except Exception as error:
            fail([o.state for o in self._owners], f"noting what was done failed: {error}")
        self._settle(wait=any(not owner.on_device for owner in self._owners))
        for owner in self._owners:
            if self._measure:
                owner.state.attempted(owner.chosen)
            if not (owner.on_device and owner.state.decides_each):
                owner.state.note_edits(owner.start, owner.masks, owner.gates)
        try:
            if self.device is not None:
                self._read_back(self.device)
        except Exception as error:
            fail([o.state for o in self._owners], f"reading back what was decided failed: {error}")
        self._rest()

    def _read_back(self, device: DevicePlans) -> None:
        """Has brought to the host what the pass has decided and read on the device."""
        owners = [o for o in self._owners if o.on_device]
        if gated := [o for o in owners if o.state.decides_each]:
            device.told_gates.take(max(o.row + o.count for o in gated), partial(self._note_gates, gated))
        if probed := [o for o in owners if o.state.resident is not None and o.state.resident.plan.probes]:
            note = partial(self._note_probes, probed, Probing(probed))
            device.told_probes.take(max(o.row + o.count for o in probed), note)

    def _settle(self, wait: bool = False) -> None:
        """Notes what passes before have left on the device."""
        if self.device is not None:
            self.device.settle(wait)

    def _note_gates(self, owners: Sequence[Owner], values: Tensor) -> None:
        """What token gates have let through: [rows, gates] as the device has decided in a pass."""
        for owner in owners:
            try:
                for i, gate in enumerate(owner.state.gates):
                    if not gate.read.per_request:
                        owner.gates[i] = values[owner.rows, i].clone()
                        if self.monitor is not None:
                            self.monitor.gate(owner.state, i, owner.masks, owner.gates[i])
                owner.state.note_edits(owner.start, owner.masks, owner.gates)
            except Exception as error:
                fail([owner.state], f"noting what its gates decided failed: {error}")

    def _note_probes(self, owners: Sequence[Owner], probing: Probing, values: Tensor) -> None:
        """What probes have read: [rows, reads] of a pass that no statistics looked at."""
        try:
            assert self.device is not None
            probing.note(values, self.device.has)
        except Exception as error:
            fail([o.state for o in owners], f"noting what its probes read failed: {error}")

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
        self.fused, self._unmade = {}, set()
        self._plain = False
        if self.device is not None:
            self.device.rest()
            self._on_device, self._device_layout = [], None

    def apply(self, place: Place, x: Tensor, residual: Tensor | None = None) -> None:
        """Edits ``x`` [.., d] in place; the stream is ``x + residual`` where a residual is given."""
        plain = self._layout.get(place) if self._plain else None
        try:
            if plain is not None and plain.quick is not None and x.dim() == 2:
                plain.quick.apply(x, residual if plain.quick.reads else None)
                return
            if x.dim() != 2:
                x, residual = _flat(x), None if residual is None else _flat(residual)
            if self.device is not None and place in self.device.places:
                self._apply_on(self.device, place, x, residual)
            self._apply(place, x, residual)
        except Exception as error:
            if self._capturing:
                raise
            concerned = [o.state for o in self._owners] if plain is None else self._edited_by(plain)
            fail(concerned, f"editing {place.name} failed: {error}")

    def normalise(self, norm: FusedNorm, x: Tensor, residual: Tensor) -> bool:
        """Edits, adds and normalises in place, where this pass edits with ``norm``; whether it does."""
        place = self.fused.get(norm.index)
        if place is None or self.device is None:
            return False
        self._unmade.discard(place)
        try:
            self._apply_on(self.device, place, _flat(x), _flat(residual), norm)
        except Exception as error:
            if self._capturing:
                raise
            fail([o.state for o in self._owners], f"editing {place.name} failed: {error}")
            return False
        return True

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
        liken(out.values())
        return out

    def _lay_out_on(self, device: DevicePlans, runs: list[Run], opened: Sequence[Opened], replayed: bool) -> list[Run]:
        """Lays out runs that the device takes; those that are left to the host all the same."""
        try:
            lacking = device.lay_out(runs, opened)
        except Exception as error:
            self._fail_plans(runs, f"laying out failed: {error}")
            return []
        self._on_device = [run for run in runs if run not in lacking] if lacking else runs
        if lacking and replayed:
            self._fail_plans(lacking, "the plans of this batch do not fit on the device together")
            return []
        for owner in self._owners:
            if any(run.resident is owner.state.resident for run in lacking):
                owner.on_device = False
        return lacking

    def _opened(self, owner: Owner) -> list[Opened]:
        """Of the gates that the prompt has decided, those that are open."""
        assert self.device is not None
        gates = [(i, gate) for i, gate in enumerate(owner.state.gates) if gate.read.per_request]
        if any(gate.open is None and self.device.has(gate.read.place) for _, gate in gates):
            fail([owner.state], "a gate decides at the prompt's last token, which was not computed here")
        return [Opened(i, owner.row, owner.row + owner.count) for i, gate in gates if gate.open]

    def _switch(self) -> None:
        if self.switch is not None and self.wanted is not self._switched:
            self._switched = self.wanted
            self.switch(self.wanted)

    def _fuse(self, device: DevicePlans, host: Iterable[Container[Place]]) -> None:
        """Takes out of :attr:`wanted` what is edited with a norm. ``host``: places where the host does something."""
        self.wanted, self.fused = self.fusion.split(frozenset(self.wanted), device.places, host)
        self._unmade = set(self.fused.values())

    def _apply_on(
        self, device: DevicePlans, place: Place, x: Tensor, residual: Tensor | None, norm: FusedNorm | None = None
    ) -> None:
        if not self._measure:
            device.edit(place, x, residual, norm)
            return
        if self._device_layout is None:
            self._device_layout = self._lay_out(self._on_device)
        work = self._device_layout.get(place)
        if work is None or not work.groups:  # something is read here
            device.edit(place, x, residual, norm)
            return
        reduce = self.reduce if place in self.shards else None
        self._measured.append((place, work, *device.edit_and_measure(place, x, residual, work, reduce, norm)))

    def _fail_plans(self, runs: Iterable[Run], message: str) -> None:
        residents = {id(run.resident) for run in runs}
        fail([o.state for o in self._owners if id(o.state.resident) in residents], message)

    def _edited_by(self, work: Work) -> list[RequestState]:
        """The requests that a place's work edits rows of."""
        edited = {id(g.resident) for g in work.groups}
        return [o.state for o in self._owners if id(o.state.resident) in edited]

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
                fail(self._edited_by(work), f"editing {place.name} failed: {error}")
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
            edited = work is not None or (self.device is not None and place in self.device.places)
            self.monitor.see(place, x, residual, edited)

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
        owners = [owner for owner in self._owners if not owner.on_device]
        return read_gates(owners, place, lambda owner: self._stream(place, x, residual, owner.rows))

    def _stream(self, place: Place, x: Tensor, residual: Tensor | None, rows: slice) -> Tensor:
        """[n, d] float32, the site's activations, put together from the ranks where each holds a part."""
        own = x[rows].float()
        if residual is not None:
            own = own + residual[rows].float()
        shard = self.shards.get(place)
        return own if shard is None else shard.gathered(own, self.reduce)


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
