"""What a worker remembers of one steered request: its gates' decisions and the sums that its report is made of."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.reference import row_sums
from steersman.server.engine.captures import Capture, Wanted
from steersman.server.engine.resident import Resident
from steersman.server.engine.signals import Signals
from steersman.server.engine.traces import Trace, Values, plain
from steersman.steering.plan import GateRead, Place, Step
from steersman.steering.tokens import Selection

NOWHERE = 2**62
ATTEMPTS = 2  # passes in which an intervention is measured; after that only now and then
Sums = np.ndarray[Any, np.dtype[np.float64]]
Masks = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass
class GateState:
    """One gate of one request."""

    read: GateRead
    open: bool | None = None  # the decision of a gate that decides once; None before it
    open_from: int = NOWHERE  # position from which a held token gate stays open
    seen: int = 0  # positions from 0 on that were read, without a gap
    total: Tensor | None = None  # [d] float64, the sum over those of the prompt (prompt_mean)
    counted: bool = False  # whether the decision of a gate that decides once is in the statistics

    def at_start(self, start: int, count: int, prompt_length: int) -> Tensor:
        """[count] what is known before the pass that computes ``count`` positions from ``start``."""
        out = torch.zeros(count)
        if self.read.per_request and self.open:
            out[max(prompt_length - start, 0) :] = 1
        return out

    def decide(self, x: Tensor, start: int, prompt_length: int, values: Tensor) -> None:
        """Reads x [n, d] float32 at positions from ``start`` and writes the gate into ``values`` [n]."""
        if self.read.over == "token":
            self._each(x, start, values)
            return
        last = prompt_length - 1 - start  # row of the prompt's last token
        if self.open is None:
            self.open = self._decision(x, start, last)
        if 0 <= last < len(x):
            values[last:] = float(bool(self.open))

    def _each(self, x: Tensor, start: int, values: Tensor) -> None:
        values.copy_(self._holds(x))
        if not self.read.hold:
            return
        self._no_gap(start)
        self.seen = max(self.seen, start + len(x))
        if self.open_from >= start:  # set by rows that are computed again, or not set
            first = torch.nonzero(values)
            self.open_from = start + int(first[0]) if len(first) else NOWHERE
        values[max(self.open_from - start, 0) :] = 1

    def _decision(self, x: Tensor, start: int, last: int) -> bool | None:
        """What rows x decide; None as long as the prompt's ``last`` row is still to come."""
        if last < 0:
            raise LookupError("a gate decides at the prompt's last token, which was not computed here")
        if self.read.over == "last_prompt":
            return bool(self._holds(x[last][None])[0]) if last < len(x) else None
        if self.total is None:
            self.total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        self._no_gap(start)
        new = x[self.seen - start : last + 1]  # what a preempted request computes again was added already
        self.total += new.double().sum(0)  # in float64 chunks of any size have the same sum
        self.seen += len(new)
        return bool(self._holds((self.total / self.seen).float()[None])[0]) if last < len(x) else None

    def _no_gap(self, start: int) -> None:
        if start > self.seen:
            raise LookupError(f"a gate needs positions {self.seen} to {start - 1}, which were not computed here")

    def _holds(self, x: Tensor) -> Tensor:
        """[n] whether the condition holds for each row of x [n, d]."""
        if self.read.encode is not None:
            value = self.read.encode(x)[:, 0]
        else:
            assert self.read.direction is not None, "a gate reads a direction or encodes"
            value = row_sums(x * self.read.direction.to(x.device))
        if self.read.measure == "cosine":
            value = value / row_sums(x * x).sqrt().clamp_min(1e-30)
        if self.read.activation is not None:
            value = self.read.activation(value)
        ok = torch.ones_like(value, dtype=torch.bool)
        if self.read.above is not None:
            ok &= value > self.read.above
        if self.read.below is not None:
            ok &= value < self.read.below
        return ok


@dataclass
class RequestState:
    """One steered request, from its first scheduling until it is finished. Slots are not reused."""

    resident: Resident | None  # None: its plan was not here when it arrived, so it runs unsteered
    selection: Selection
    key: str  # names the HTTP request in reports
    request_id: str = ""  # the engine's, one per generated sequence
    gates: list[GateState] = field(init=False)
    relative: dict[tuple[int, ...], Sums] = field(default_factory=dict)  # layers -> sums of ‖Δx‖/‖x‖ at them
    unmeasured: int = field(init=False)  # mask of the interventions whose size is not known well enough yet
    done: array[int] = field(default_factory=lambda: array("Q"))  # by position: bit mask of what edited it
    reused: int = 0  # positions before it were in the prefix cache when the request began
    whole: bool = False  # whether its report tells of every token
    probes: Trace | None = None  # a column for each of `columns`; None before the first pass
    columns: list[int] = field(default_factory=list)  # the plan's reads that are made on this rank
    sizes: Trace | None = None  # of the edits, where every token is told of; NaN where nothing was edited
    size_columns: dict[tuple[int, Place], int] = field(default_factory=dict)  # (intervention, place) -> column
    over: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)  # beyond the dosage's limit
    capture: Capture | None = None  # of its prompt's activations
    signals: Signals | None = None  # that it asks for
    error: str | None = None

    def __post_init__(self) -> None:
        plan = self.resident.plan if self.resident else None
        self.gates = [GateState(g) for g in plan.gates] if plan else []
        self.steps = plan.steps if plan else ()
        self._reads = [(p.probe, p.place.layer) for p in plan.probes] if plan else []
        self.constant = None if self.selection.rules else np.array([self.selection.generated], dtype=np.uint64)
        self.unmeasured = (1 << len(self.steps)) - 1
        self._attempts = [0] * len(self.steps)
        if self.whole:
            pairs = [(i, place) for i, step in enumerate(self.steps) for place in step.places]
            self.size_columns = {pair: column for column, pair in enumerate(dict.fromkeys(pairs))}
            self.sizes = Trace(len(self.size_columns), whole=True)
        if plan is None:
            self.error = "the plan was not resident when the request reached the engine"

    @property
    def needs_layers(self) -> bool:
        """Whether rows are read between the layers for it, besides what its plan reads and edits."""
        return self.capture is not None or (self.signals is not None and bool(self.signals.norms))

    def measured(self, layers: tuple[int, ...], sums: Sums) -> None:
        """Adds what a pass measured: [layers, 2, interventions], sum and count of ‖Δx‖/‖x‖ over the edited tokens."""
        known = self.relative.get(layers)
        if known is None:
            self.relative[layers] = sums.copy()
        else:
            known += sums

    def attempted(self, chosen: int) -> None:
        """A pass was measured in which the mask ``chosen`` selects rows; closed gates count as well."""
        for i, count in enumerate(self._attempts):
            if count < ATTEMPTS and chosen >> i & 1:
                self._attempts[i] += 1
                if self._attempts[i] == ATTEMPTS:
                    self.unmeasured &= ~(1 << i)

    def note_edits(self, start: int, masks: Masks, gates: Sequence[Tensor]) -> None:
        """A pass has edited the positions from ``start`` by bit ``masks`` [n], where the ``gates`` were open.

        What was noted of these positions and of later ones is forgotten: they are being computed again.
        """
        if len(masks) == 1 and not self.gates and start == len(self.done):
            self.done.append(int(masks[0]))
            return
        masks, prompt = masks.copy(), self.selection.prompt_length
        for i, step in enumerate(self.steps):
            if step.gate >= 0:
                closed = gates[step.gate].numpy() == 0
                if self._decided_late(step):
                    closed[: max(prompt - start, 0)] = True
                masks[closed] &= ~np.uint64(1 << i)
        if start > len(self.done):
            self._note_cached(len(self.done), start)
        self.done[start:] = array("Q", masks.tobytes())

    def _note_cached(self, start: int, end: int) -> None:
        """Positions whose KV was reused: it was made by the same edits. What gates did to them is not known here."""
        if not self.done:
            self.reused = end
        masks = self.selection.masks(start, end, lambda: np.full(end - start, -1))
        for i, step in enumerate(self.steps):
            if step.gate >= 0:
                masks &= ~np.uint64(1 << i)
        self.done.frombytes(masks.tobytes())

    def _decided_late(self, step: Step) -> bool:
        """Whether all that the step edits in a pass has been computed when its gate decides."""
        gate = self.gates[step.gate].read
        return gate.per_request and all(place.order <= gate.place.order for place in step.places)

    def edited(self, start: int = 0, end: int | None = None) -> list[int]:
        """[interventions] how many of the positions each has edited, each counted once however often computed."""
        done = np.array(self.done[start:end], dtype=np.uint64)
        return [int(np.count_nonzero(done & np.uint64(1 << i))) for i in range(len(self.steps))]

    def see_probes(self, columns: list[int], start: int, values: Values) -> None:
        """Values [n, columns] of these reads of the plan, for the positions from ``start``.

        Each position counts once, with the values that were computed last.
        """
        if self.probes is None:
            self.columns, self.probes = columns, Trace(len(columns), self.whole)
        self.probes.see(start, values)
        if self.signals is not None:
            self.signals.see_probes(columns, start, values)

    def overdosed(self, intervention: int, layer: int, count: int, worst: float) -> None:
        """An intervention was too large at ``count`` tokens of a pass, by its ‖Δx‖/‖x‖ up to ``worst``."""
        known, largest = self.over.get((intervention, layer), (0, 0.0))
        self.over[intervention, layer] = known + count, max(largest, worst)

    def _sizes(self) -> list[list[Any]]:
        """[intervention, layer, sum, count] of ‖Δx‖/‖x‖, where anything was measured."""
        found: dict[tuple[int, int], Sums] = {}
        for layers, sums in self.relative.items():
            for layer, both in zip(layers, sums, strict=True):
                for i in np.flatnonzero(both[1]):
                    found[i, layer] = found.get((i, layer), 0.0) + both[:, i]
        return [[int(i), layer, float(total), int(count)] for (i, layer), (total, count) in sorted(found.items())]

    def report(self, end: int | None = None) -> dict[str, Any]:
        """Raw sums, so that the parts of a model on several ranks can be added up.

        ``end``: how many positions the response needed, where that is known; what was computed after them is left out.
        """
        reused = self.reused if end is None else min(self.reused, end)
        return {
            "request": self.request_id,
            "error": self.error,
            "relative": self._sizes(),
            "cached": self.edited(end=reused),
            "edited": self.edited(start=reused, end=end),
            "gates": [g.open for g in self.gates],
            "probes": self._probe_sums(end),
            "over": [[i, layer, count, worst] for (i, layer), (count, worst) in sorted(self.over.items())],
            "tokens": [self._tokens(end)] if self.whole and self.sizes is not None else [],
            "signals": self.signals.told(end, self.whole) if self.signals is not None else {},
        }

    def probe_rows(self, start: int, end: int | None) -> dict[str, Any]:
        """What the probes read at the positions from ``start`` to ``end`` that were computed: a row for each."""
        if self.probes is None:
            return {"positions": [], "columns": [], "values": []}
        positions, values = self.probes.rows(start, end)
        return {"positions": positions, "columns": self._probe_columns(), "values": plain(values)}

    def _probe_columns(self) -> list[list[int]]:
        return [list(self._reads[column]) for column in self.columns]

    def _probe_sums(self, end: int | None) -> list[list[Any]]:
        """[probe, layer, number, sum, minimum, maximum, last] of the positions before ``end``."""
        if self.probes is None:
            return []
        found = self.probes.sums(end)
        numbers = (n.tolist() for n in (found.total, found.low, found.high, found.last))
        rows = zip(self._probe_columns(), *numbers, strict=True)
        return sorted([*where, found.count, *values] for where, *values in rows)

    def _tokens(self, end: int | None) -> dict[str, Any]:
        """Token by token: what probes read, and ‖Δx‖/‖x‖ of each intervention and place, None where it did nothing."""
        assert self.sizes is not None
        positions, sizes = self.sizes.rows(0, end)
        columns = [[i, place.layer, place.site.value] for i, place in self.size_columns]
        edits = {"positions": positions, "columns": columns, "values": plain(sizes)}
        return {"probes": self.probe_rows(0, end), "edits": edits}


def open_request(request_id: str, args: Mapping[str, Any], resident: Resident | None) -> RequestState:
    """The state of a request whose sampling parameters carry ``args`` (see :mod:`steersman.server.engine.wire`)."""
    selection = Selection.from_json(args["selection"])
    capture = Capture(Wanted.from_json(args["capture"])) if "capture" in args else None
    signals = Signals(args["signals"], selection.prompt_length) if args.get("signals") else None
    whole = bool(args.get("whole"))
    return RequestState(
        resident, selection, str(args["key"]), request_id, whole=whole, capture=capture, signals=signals
    )
