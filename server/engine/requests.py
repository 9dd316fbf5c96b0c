"""What a worker remembers of one steered request: its gates' decisions and the sums that its report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.server.engine.resident import Resident
from steersman.steering.plan import GateRead
from steersman.steering.tokens import Selection

NOWHERE = 2**62
ATTEMPTS = 4  # passes in which an intervention is measured; after that only now and then
Values = np.ndarray[Any, np.dtype[np.float64]]
Masks = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass
class GateState:
    """One gate of one request."""

    read: GateRead
    open: bool | None = None  # the decision of a gate that decides once; None before it
    open_from: int = NOWHERE  # position from which a held token gate stays open
    seen: int = 0  # prompt positions added up so far
    total: Tensor | None = None  # [d] float32, their sum (prompt_mean)

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
        if self.read.over == "prompt_mean":
            self._add_up(x, start, prompt_length)
        if 0 <= last < len(x):
            if self.open is None:
                whole = x[last] if self.total is None else self.total / prompt_length
                self.open = bool(self._holds(whole[None])[0])
            values[last:] = float(self.open)

    def _each(self, x: Tensor, start: int, values: Tensor) -> None:
        values.copy_(self._holds(x))
        if not self.read.hold:
            return
        if self.open_from >= start:  # set by rows that are computed again, or not set
            first = torch.nonzero(values)
            self.open_from = start + int(first[0]) if len(first) else NOWHERE
        values[max(self.open_from - start, 0) :] = 1

    def _add_up(self, x: Tensor, start: int, prompt_length: int) -> None:
        if start == 0 or self.total is None:  # a preempted request begins again
            self.total, self.seen = torch.zeros_like(x[0]), 0
        new = x[self.seen - start : prompt_length - start] if start <= self.seen else x[:0]
        self.total += new.sum(0)
        self.seen += len(new)

    def _holds(self, x: Tensor) -> Tensor:
        """[n] whether the condition holds for each row of x [n, d]."""
        value = (x * self.read.direction).sum(-1)
        if self.read.measure == "cosine":
            value = value / (x * x).sum(-1).sqrt().clamp_min(1e-30)
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
    gates: list[GateState] = field(init=False)
    relative: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (intervention, layer): sum, count
    unmeasured: int = field(init=False)  # mask of the interventions whose size is not known well enough yet
    edited: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)  # [interventions]: positions, gates considered
    cached: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)  # [interventions]: positions reused from the cache
    probes: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (probe, layer): n, sum, min, max, last
    high_water: int = 0  # positions below it were counted already
    error: str | None = None

    def __post_init__(self) -> None:
        plan = self.resident.plan if self.resident else None
        self.gates = [GateState(g) for g in plan.gates] if plan else []
        count = len(plan.steps) if plan else 0
        self.unmeasured = (1 << count) - 1
        self._attempts = [0] * count
        self.edited = np.zeros(count, dtype=np.int64)
        self.cached = np.zeros(count, dtype=np.int64)
        if plan is None:
            self.error = "the plan was not resident when the request reached the engine"

    def count_cached(self, start: int) -> None:
        """The first pass starts at ``start``: KV of the positions before it was computed under the same edits."""
        masks = self.selection.masks(0, start, lambda: np.empty(0, dtype=np.int64))
        for i in range(len(self.cached)):
            self.cached[i] = int((masks >> np.uint64(i) & np.uint64(1)).sum())
        self.high_water = start

    def measured(self, intervention: int, layer: int, values: Values) -> None:
        """Adds ‖Δx‖/‖x‖ of the tokens that an intervention edited in one pass at one layer."""
        entry = self.relative.setdefault((intervention, layer), [0.0, 0])
        entry[0] += float(values.sum())
        entry[1] += len(values)
        self._attempts[intervention] += 1
        if self._attempts[intervention] >= ATTEMPTS * len(self.resident.plan.steps[intervention].layers):  # type: ignore[union-attr]
            self.unmeasured &= ~(1 << intervention)

    def count_edits(self, start: int, masks: Masks, gates: Sequence[Tensor]) -> None:
        """Counts the positions from ``start`` with bit ``masks`` [n] that were edited for the first time."""
        new = slice(max(self.high_water - start, 0), None)
        for i, step in enumerate(self.resident.plan.steps if self.resident else ()):
            chosen = masks[new] >> np.uint64(i) & np.uint64(1)
            if step.gate >= 0:
                chosen = chosen * (gates[step.gate][new].numpy() > 0)
            self.edited[i] += int(chosen.sum())
        self.high_water = max(self.high_water, start + len(masks))

    def see_probe(self, probe: int, layer: int, values: Tensor) -> None:
        n, total, low, high, _ = self.probes.get((probe, layer), [0, 0.0, float("inf"), float("-inf"), 0.0])
        self.probes[probe, layer] = [
            n + len(values),
            total + float(values.sum()),
            min(low, float(values.min())),
            max(high, float(values.max())),
            float(values[-1]),
        ]

    def report(self) -> dict[str, Any]:
        """Raw sums, so that the parts of a model on several ranks can be added up."""
        return {
            "error": self.error,
            "relative": [[i, layer, *sums] for (i, layer), sums in sorted(self.relative.items())],
            "cached": self.cached.tolist(),
            "edited": self.edited.tolist(),
            "gates": [g.open for g in self.gates],
            "probes": [[p, layer, *stats] for (p, layer), stats in sorted(self.probes.items())],
        }


def open_request(args: Mapping[str, Any], resident: Resident | None) -> RequestState:
    """The state of a request whose sampling parameters carry ``args`` (see :mod:`steersman.server.engine.wire`)."""
    return RequestState(resident, Selection.from_json(args["selection"]), str(args["key"]))
