"""What every layer did, sampled: a rank's part of the statistics in ``/metrics``.

Every ``every``-th forward pass is looked at, with all its tokens; the others cost one comparison. What is counted:

* the norm of the stream as it leaves a layer, after the edits there (``resid_post``), apart for prompt tokens and
  generated ones, and for requests with and without interventions;
* the cosine between the streams that enter and leave a layer, each after its edits; 1 where a layer does nothing;
* ‖Δx‖/‖x‖ of each edit whose gate was open, x being the stream before any edit of that place; by asset and layer;
* what probes read, by asset and layer: those of requests, and those that are read for all (:meth:`watch_probes`);
  and the cosine between their directions and what they are read from, features apart;
* the entropy, in nats, of the model's distribution of the token that comes next, where a token was sampled and the
  engine does not speculate;
* outliers: tokens whose ln‖x‖ is more than ``OUTLIER`` standard deviations from its mean at that layer: the stored
  baseline's, where there is one (:meth:`use_baseline`), else those of all that was sampled at it before, once that is
  ``BASELINE`` tokens.

Gates are counted in every pass: a gate that decides once counts each request once, a token gate each token that its
intervention selects. A token that is computed again, after a preemption or in place of a rejected draft, counts again.

The buffers' size is fixed. They are given away whole when they are drained, and stay with us until whoever drained
them says that they have arrived; so nothing is counted twice or lost, whichever call fails. Of tensor-parallel ranks,
which all see the whole stream, one counts; all look at the same passes, as measuring an edit may need all of them.

An error in here costs statistics, never a request: it is logged once and counted.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.moments import Floats, Moments
from steersman.kernels.statistics import (
    COSINE_BOUNDS,
    ENTROPY_BOUNDS,
    NORM_BOUNDS,
    PROBE_BOUNDS,
    PROBE_COSINE_BOUNDS,
    RELATIVE_BOUNDS,
    Histograms,
    Ints,
    KeyedHistograms,
    cosines,
    entropies,
    norms,
    stream_of,
)
from steersman.server.engine.requests import Masks, RequestState
from steersman.server.engine.resident import Resident
from steersman.server.engine.sizes import Measured, each
from steersman.server.engine.traces import Values
from steersman.steering.plan import Place, Plan, Step
from steersman.steering.sites import Site

logger = logging.getLogger(__name__)

MAX_KEYS = 2048  # pairs of an asset and a layer between two drains; the rest is counted as `other`
HOLDERS = 64  # HTTP processes whose last buffers are kept until they have arrived
OUTLIER = 6.0  # standard deviations
BASELINE = 1000  # tokens
OTHER = "other"
GROUPS = ("prompt", "no"), ("prompt", "yes"), ("generated", "no"), ("generated", "yes")
"""(tokens, steered) in the order in which a layer's norms are kept."""


class _Buffers:
    """What has been counted since the last drain."""

    def __init__(self, layers: int) -> None:
        self.norms = Histograms(layers * len(GROUPS), NORM_BOUNDS)
        self.cosines = Histograms(layers, COSINE_BOUNDS)
        self.entropy = Histograms(1, ENTROPY_BOUNDS)
        self.edits = KeyedHistograms(MAX_KEYS, RELATIVE_BOUNDS, (OTHER, -1))
        self.probes = KeyedHistograms(MAX_KEYS, PROBE_BOUNDS, (OTHER, -1))
        self.aligned = KeyedHistograms(MAX_KEYS, PROBE_COSINE_BOUNDS, (OTHER, -1))  # cosines of the same probes
        self.gates: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # asset -> decisions, open
        self.outliers = np.zeros(layers, np.int64)
        self.passes = 0
        self.errors = 0

    def to_json(self) -> dict[str, Any]:
        """Lists that the transport can carry. Histograms as counts by bucket, then sum, and maximum for norms."""
        return {
            "activation_norm": [
                [*divmod(row, len(GROUPS)), counts, total, largest if np.isfinite(largest) else None]
                for row, counts, total, largest in self.norms.rows()
            ],
            "layer_cosine": [[layer, counts, total] for layer, counts, total, _ in self.cosines.rows()],
            "answer_entropy": [[counts, total] for _, counts, total, _ in self.entropy.rows()],
            "relative_edit_norm": [[*key, counts, total] for key, counts, total, _ in self.edits.rows()],  # type: ignore[misc]
            "probe_value": [[*key, counts, total] for key, counts, total, _ in self.probes.rows()],  # type: ignore[misc]
            "probe_cosine": [[*key, counts, total] for key, counts, total, _ in self.aligned.rows()],  # type: ignore[misc]
            "gates": [[asset, *both] for asset, both in self.gates.items()],
            "norm_outliers": [[int(i), int(self.outliers[i])] for i in np.flatnonzero(self.outliers)],
            "passes": self.passes,
            "errors": self.errors,
        }


class _Baseline:
    """Mean and spread of ln‖x‖ at each layer, over all that was sampled."""

    def __init__(self, layers: int) -> None:
        self.seen = Moments.none(layers)
        self.stored: tuple[Floats, Floats] | None = None  # [layers] mean and deviation that stand for what is usual

    def judge(self, layers: Ints, lengths: Values) -> Ints:
        """How many of each layer's norms [layers, n] are outliers; they belong to what was seen afterwards."""
        logs = np.log(np.maximum(lengths.astype(np.float64), 1e-30))
        seen = self.seen.at(layers)
        mean, deviation = (seen.mean, seen.deviation) if self.stored is None else (s[layers] for s in self.stored)
        far = ~(np.abs(logs - mean[:, None]) <= OUTLIER * deviation[:, None])  # NaN is one
        known = (seen.count >= BASELINE) | (self.stored is not None)
        found: Ints = np.where(known, far.sum(1), 0)
        logs = np.where(np.isfinite(logs), logs, seen.mean[:, None])
        self.seen.put(layers, seen.plus(Moments.of(logs)))
        return found


class Monitor:
    def __init__(self, layers: int, every: int, counts: bool = True) -> None:
        """``every``: which passes are looked at. ``counts``: whether this rank is the one that counts."""
        self.every = every
        self.counts = counts
        self.worker = uuid.uuid4().hex  # a worker that is started again is another one
        self.places: frozenset[Place] = frozenset(
            Place(i, site) for i in range(layers if counts else 0) for site in (Site.RESID_PRE, Site.RESID_POST)
        )
        self.sampling = False  # in this pass
        self._layers = layers
        self._prompts: dict[str, int] = {}  # of the requests in the batch, how long
        self._passes = 0
        self._lock = Lock()  # between whoever drains and the end of a pass
        self._buffers = _Buffers(layers)
        self._baseline = _Baseline(layers)
        self._number = 0
        self._sent: OrderedDict[str, tuple[int, dict[str, Any]]] = OrderedDict()  # by holder
        self._groups: Ints = np.zeros(0, np.int64)  # [rows] index into GROUPS, -1: nobody's
        self._finished: list[bool] | None = None  # by request, whether its next token is sampled; of the last pass
        self._entering: tuple[int, Tensor, Tensor] | None = None  # layer, its stream and norms
        self._left: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None  # what the last layer left, and those
        self._room: tuple[Tensor, ...] = ()  # 3 × [rows, d] in a pass: streams entering and leaving a layer, a spare
        self._norms: dict[int, Tensor] = {}
        self._cosines: dict[int, Tensor] = {}
        self._watched: dict[Place, tuple[list[str], Tensor]] = {}  # names, directions [k, d]
        self._watched_values: list[tuple[int, list[str], Tensor, Tensor]] = []  # layer, names, [k, n], norms [n]
        self._streams = self.places
        self._logged = False

    @property
    def due(self) -> bool:
        """Whether the next pass is looked at, so that its rows must be told."""
        return (self._passes + 1) % self.every == 0

    def watch_probes(self, plan: Plan) -> None:
        """Reads the probes of ``plan``, of every request, from now on, in place of those of an earlier one.

        Only where every rank has the whole activation; others are refused before they get here.
        """
        found: dict[Place, tuple[list[str], list[Tensor]]] = {}
        for read in plan.probes:
            names, directions = found.setdefault(read.place, ([], []))
            names.append(_unversioned(plan.probe_names[read.probe]))
            assert read.direction is not None, "probes of all requests are vectors"
            directions.append(read.direction)
        with self._lock:
            self._watched = {place: (names, torch.stack(d)) for place, (names, d) in found.items()}
            if self.counts:
                self.places = self._streams.union(self._watched)

    def use_baseline(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """Outliers are from now on those of these means and standard deviations of ln‖x‖, one for each layer."""
        with self._lock:
            self._baseline.stored = np.array(mean), np.array(deviation)

    def norms_seen(self) -> dict[str, Any]:
        """This worker's id, and the moments of ln‖x‖ at each layer, over all that was sampled since it started."""
        with self._lock:
            return {"worker": self.worker, **self._baseline.seen.to_json()}

    def enter(self, request_id: str, prompt: int) -> None:
        """A request with a prompt of so many tokens is in the batch from now on."""
        self._prompts[request_id] = prompt

    def leave(self, request_id: str) -> None:
        self._prompts.pop(request_id, None)

    # -- a pass -----------------------------------------------------------------------------------

    def begin(self, batch: Sequence[Any], steered: Mapping[str, RequestState]) -> bool:
        """A pass over ``batch`` (entries of request_id, start, row, n) begins: whether it is looked at."""
        self.sampling = self.due and bool(batch)
        self._passes += 1
        self._finished = None
        if not self.sampling:
            return False
        with self._guarded():
            self._groups = np.full(max(e.row + e.n for e in batch), -1)
            self._finished = []
            for entry in batch:
                state, prompt = steered.get(entry.request_id), self._prompts.get(entry.request_id)
                if prompt is None:
                    raise LookupError(f"request {entry.request_id} is in the batch and never entered it")
                edited = int(state is not None and bool(state.steps))
                first = min(max(prompt - entry.start, 0), entry.n)
                self._groups[entry.row : entry.row + first] = edited
                self._groups[entry.row + first : entry.row + entry.n] = 2 + edited
                self._finished.append(entry.start + entry.n >= prompt)
        return self.sampling

    def see(self, place: Place, x: Tensor, residual: Tensor | None, edited: bool = True) -> None:
        """The stream at ``place``, after its edits; ``edited``: whether there may have been any."""
        if not self.counts or place not in self.places:
            return
        with self._guarded():
            entering = place.site is Site.RESID_PRE
            left, self._left = self._left, None
            if left is not None and entering and left[0] is x and left[1] is residual and not edited:
                stream, lengths = left[2:]
                before, after, spare = self._room
                self._room = after, before, spare  # the stream that was left is that which enters
            else:
                own, spare = self._room_for(place, x, entering)
                stream = stream_of(x, residual, own, spare)
                lengths = norms(stream)
            if place in self._watched:
                names, directions = self._watched[place]
                self._watched_values.append((place.layer, names, directions.to(stream.device) @ stream.T, lengths))
            if place not in self._streams:
                return
            if entering:
                self._entering = place.layer, stream, lengths
                return
            self._left = x, residual, stream, lengths
            self._norms[place.layer] = lengths
            if self._entering is not None and self._entering[0] == place.layer:
                self._cosines[place.layer] = cosines(self._entering[1], stream, self._entering[2], lengths, spare)
            self._entering = None

    def _room_for(self, place: Place, x: Tensor, entering: bool) -> tuple[Tensor, Tensor]:
        """Two [rows, d] float32 to write to: the second at once, the first until the layer is left."""
        if place not in self._streams:  # a probe's, of any width
            own, spare = torch.empty(2, len(self._groups), x.shape[-1], device=x.device)
            return own, spare
        if not self._room:
            self._room = torch.empty(3, len(self._groups), x.shape[-1], device=x.device).unbind()
        before, after, spare = self._room
        return before if entering else after, spare

    def probed(self, resident: Resident, columns: list[int], values: Values, cosines: Values) -> None:
        """What probes read in this pass: [n, columns] of these reads of a plan, and their cosines."""
        if self.counts:
            with self._guarded():
                for column, own, aligned in zip(columns, values.T, cosines.T, strict=True):
                    read = resident.plan.probes[column]
                    key = _unversioned(resident.plan.probe_names[read.probe]), read.place.layer
                    self._buffers.probes.add(key, own)
                    if read.activation is None:
                        self._buffers.aligned.add(key, aligned)

    def end(self, measured: Iterable[Measured]) -> None:
        """The pass is over, in which these edits were measured. Does nothing unless it was looked at."""
        if self.sampling and self.counts:
            with self._guarded():
                self._count(measured)
        self.sampling = False
        self._entering, self._left, self._room = None, None, ()
        self._norms, self._cosines, self._watched_values = {}, {}, []

    def _count(self, measured: Iterable[Measured]) -> None:
        kept = self._buffers
        kept.passes += 1
        somebodys = self._groups >= 0
        if self._norms:
            layers, lengths = _stacked(self._norms)
            rows = layers[:, None] * len(GROUPS) + self._groups
            rows[:, ~somebodys] = -1
            kept.norms.add(rows.ravel(), lengths.ravel())
            kept.outliers[layers] += self._baseline.judge(layers, lengths[:, somebodys])
        if self._cosines:
            layers, found = _stacked(self._cosines)
            rows = np.where(somebodys, layers[:, None], -1)
            kept.cosines.add(rows.ravel(), found.ravel())
        if self._watched_values:
            keys = [(name, layer) for layer, names, *_ in self._watched_values for name in names]
            values = torch.cat([read for *_, read, _ in self._watched_values]).cpu().numpy()  # [keys, n]
            sizes = torch.stack([lengths for *_, lengths in self._watched_values]).cpu().numpy()
            sizes = np.repeat(sizes, [len(names) for _, names, *_ in self._watched_values], axis=0)
            if not somebodys.all():
                values, sizes = values[:, somebodys], sizes[:, somebodys]
            kept.probes.add_all(keys, values)
            kept.aligned.add_all(keys, values / np.maximum(sizes, 1e-30))
        for sized in each(measured):
            for name in _assets(sized.resident.plan.steps[sized.intervention]):
                kept.edits.add((name, sized.place.layer), sized.values)
        kept.edits.settle()
        kept.probes.settle()
        kept.aligned.settle()

    def gate(self, state: RequestState, index: int, masks: Masks, values: Tensor) -> None:
        """A request's gate has been read for its rows in this pass: [n] ``values`` and the rows' ``masks``."""
        if not self.counts:
            return
        gate = state.gates[index]
        with self._guarded():
            for i, step in enumerate(state.steps):
                if step.gate != index:
                    continue
                if gate.read.per_request:
                    decided = int(gate.open is not None and not gate.counted)
                    opened = decided * int(bool(gate.open))
                else:
                    chosen = (masks >> np.uint64(i)) & np.uint64(1) == 1
                    decided, opened = int(chosen.sum()), int(np.count_nonzero(values.numpy()[chosen]))
                for name in _assets(step):
                    both = self._buffers.gates[name if self._has_room(name) else OTHER]
                    both[0] += decided
                    both[1] += opened
            gate.counted = gate.counted or gate.open is not None

    def _has_room(self, name: str) -> bool:
        return name in self._buffers.gates or len(self._buffers.gates) < MAX_KEYS

    # -- logits -----------------------------------------------------------------------------------

    def see_logits(self, logits: Tensor) -> None:
        """Logits [n, vocabulary] that the model computes: the first after a pass are of its tokens."""
        if self._finished is None:
            return
        finished, self._finished = self._finished, None
        if self.counts and len(logits) == len(finished):
            with self._guarded():
                found = entropies(logits if all(finished) else logits[torch.tensor(finished)]).cpu().numpy()
                self._buffers.entropy.add(np.zeros(len(found), np.int64), found)

    # -- giving away ------------------------------------------------------------------------------

    def drain(self, holder: str, received: Mapping[str, int]) -> dict[str, Any]:
        """What was counted since the last drain, or once more what ``holder`` has not got.

        ``received``: the number of the last answer that reached ``holder``, by worker.
        """
        with self._lock:
            sent = self._sent.pop(holder, None)
            if sent is None or sent[0] <= received.get(self.worker, 0):
                self._number += 1
                buffers, self._buffers = self._buffers, _Buffers(self._layers)
                sent = self._number, {"worker": self.worker, "number": self._number, **buffers.to_json()}
            self._sent[holder] = sent
            while len(self._sent) > HOLDERS:
                self._sent.popitem(last=False)
            return sent[1]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except Exception:
                self._buffers.errors += 1
                if not self._logged:
                    logger.exception("statistics of a pass were lost; later ones are only counted")
                self._logged = True
                self.sampling = False


def _stacked(by_layer: Mapping[int, Tensor]) -> tuple[Ints, Any]:
    """[layers], and [layers, n] their values on the host."""
    layers = np.array(sorted(by_layer))
    return layers, torch.stack([by_layer[int(i)] for i in layers]).cpu().numpy()


def _unversioned(name: str) -> str:
    """``name@version`` or, of a feature, ``name@version#index``, without the version."""
    return re.sub(r"@[^#]*", "", name)


def _assets(step: Step) -> tuple[str, ...]:
    """The names of a step's assets, without their versions."""
    return tuple(dict.fromkeys(_unversioned(a) for a in step.assets)) or ("none",)
