"""Reading the probes of all requests in a pass: one product, or encode, for each plan and place.

What was read is handed out when the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.reference import Reduce
from steersman.server.engine.owners import fail
from steersman.server.engine.requests import RequestState
from steersman.server.engine.resident import Resident, Shard
from steersman.server.engine.traces import Values
from steersman.steering.plan import Place

Observe = Callable[[Resident, list[int], Values, Values], None]


class Reader(Protocol):
    """A request's rows in a pass."""

    state: RequestState
    start: int  # position of the first

    @property
    def rows(self) -> slice: ...


@dataclass
class _Plan:
    """What one plan's probes have read in this pass, of all its requests one after another."""

    resident: Resident
    readers: list[Reader] = field(default_factory=list)
    read: list[tuple[list[int], Tensor]] = field(default_factory=list)  # columns, [n, columns]
    cosines: list[Tensor] = field(default_factory=list)  # [n, columns] of the same, where they are wanted
    rows: slice | Tensor = field(default_factory=lambda: slice(0))


class Probing:
    """The probes of one pass."""

    def __init__(self, readers: Sequence[Reader], cosines: bool = False) -> None:
        """``cosines``: whether those of the directions and what they read are wanted."""
        self._cosines = cosines
        plans: dict[int, _Plan] = {}
        for reader in readers:
            resident = reader.state.resident
            if resident is not None and resident.plan.probes:
                plans.setdefault(id(resident), _Plan(resident)).readers.append(reader)
        self._plans = list(plans.values())
        for plan in self._plans:
            plan.rows = _joined([reader.rows for reader in plan.readers])

    def read(
        self, place: Place, x: Tensor, residual: Tensor | None, shard: Shard | None, reduce: Reduce | None
    ) -> None:
        """Reads one place of ``x`` [T, d] after its edits; where ranks hold a part each, their parts are added up."""
        for plan in self._plans:
            found = plan.resident.probes.get(place)
            encodes = plan.resident.plan.probe_encodes.get(place, ())
            if found is None and not encodes:
                continue
            own = x[plan.rows].float()
            if residual is not None:
                own = own + residual[plan.rows].float()
            squares = own.square().sum(-1, keepdim=True) if self._cosines else None
            if encodes:
                whole = own if shard is None else shard.gathered(own, reduce)
                try:
                    read = [(columns, encode(whole)) for columns, encode in encodes]
                    plan.read += read
                    if squares is not None:
                        plan.cosines += [torch.zeros_like(values) for _, values in read]  # features have none
                except Exception as error:
                    fail([reader.state for reader in plan.readers], f"a probe's encode at {place.name} failed: {error}")
            if found is None:
                continue
            columns, directions = found
            if shard is not None and reduce is not None:
                values = reduce(own @ directions[:, shard.start : shard.stop].T.to(own.device))
                squares = None if squares is None else reduce(squares)
            else:
                values = own @ directions.T.to(own.device)
            if squares is not None:
                plan.cosines.append(values / squares.sqrt().clamp_min(1e-30))
            plan.read.append((columns, plan.resident.plan.activated(columns, values)))

    def finish(self, observe: Observe | None) -> None:
        """Gives each request its values.

        ``observe`` gets those of a plan's requests together, with their columns, and the cosines if they were wanted.
        """
        for plan in self._plans:
            if not plan.read:
                continue
            columns = [column for some, _ in plan.read for column in some]
            values = torch.cat([v for _, v in plan.read], dim=1).float().cpu().numpy()
            order = np.argsort(columns)
            columns, values = [columns[i] for i in order], values[:, order]
            if observe is not None and self._cosines:
                observe(plan.resident, columns, values, torch.cat(plan.cosines, dim=1).cpu().numpy()[:, order])
            _hand_out(plan, columns, values)

    def note(self, read: Tensor, has: Callable[[Place], bool]) -> None:
        """Gives each request its values of ``read`` [rows, columns], what a device has read of the batch.

        has: whether a place is on this rank's pipeline stage.
        """
        for plan in self._plans:
            columns = [i for i, probe in enumerate(plan.resident.plan.probes) if has(probe.place)]
            if columns:
                _hand_out(plan, columns, read[plan.rows][:, columns].numpy())


def _hand_out(plan: _Plan, columns: list[int], values: Values) -> None:
    """To each of a plan's requests its part of ``values`` [rows, columns], those of all one after another."""
    first = 0
    for reader in plan.readers:
        count = reader.rows.stop - reader.rows.start
        reader.state.see_probes(columns, reader.start, values[first : first + count])
        first += count


def _joined(parts: Sequence[slice]) -> slice | Tensor:
    """All the rows: one slice where they follow each other, else their numbers."""
    if all(a.stop == b.start for a, b in pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return torch.cat([torch.arange(p.start, p.stop) for p in parts])
