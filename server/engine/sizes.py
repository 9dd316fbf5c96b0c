"""How large each edit of a pass was beside the stream, edit by edit, for those who want more than means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steersman.server.engine.layout import Work
from steersman.server.engine.resident import Resident
from steersman.steering.plan import Place

Measured = tuple[Place, Work, Tensor, Tensor | None]
"""A place, what was done there, [rows, n_blocks] ‖Δx‖/‖x‖, and [rows, n_gates] its gates."""


class Sized(NamedTuple):
    """What one intervention did to rows with the same program at one place."""

    resident: Resident
    place: Place
    intervention: int
    rows: NDArray[np.int64]  # [n] of the batch, those whose gate was open
    values: NDArray[np.float32]  # [n] ‖Δx‖/‖x‖


def each(measured: Iterable[Measured]) -> Iterator[Sized]:
    for place, work, relative, gates in measured:
        values = relative.cpu().numpy()
        opened = None if gates is None else gates.cpu().numpy() > 0
        for group, mine in work.slices():
            for column, block in enumerate(group.program.blocks):
                rows, own = group.rows.numpy(), values[mine, column]
                if opened is not None and block.gate >= 0:
                    through = opened[mine, block.gate]
                    rows, own = rows[through], own[through]
                if len(rows):
                    yield Sized(group.resident, place, block.intervention, rows, own)


def add_up(measured: Sequence[Measured], owners: Sequence[Any]) -> None:
    """Gives each request the sizes of this pass: their sum and count by place and intervention."""
    if not measured:
        return
    width = max(len(o.state.steps) for o in owners) + 1  # and one for what is not there
    ends = np.array([o.row + o.count for o in owners])
    sums = np.zeros((len(measured), 2, len(owners), width))
    alike: dict[int, list[int]] = {}  # the places that tell the same of their rows
    for i, (_, work, _, _) in enumerate(measured):
        alike.setdefault(id(work.like or work), []).append(i)
    for places in alike.values():
        work = measured[places[0]][1]
        whose = np.searchsorted(ends, work.rows, side="right")  # index of each row's owner
        cells = (whose[:, None] * width + work.interventions % width).ravel()
        values = np.stack([measured[i][2].cpu().numpy() for i in places])  # [places, rows, n_blocks]
        opened = np.ones(values.shape)
        if work.gated:
            gated = work.gates >= 0
            for at, i in zip(opened, places, strict=True):
                gates = measured[i][3]
                assert gates is not None
                at[gated] = np.take_along_axis(gates.cpu().numpy(), work.gates.clip(0), 1)[gated] > 0
        size = sums[0, 0].size
        every = (np.arange(len(places))[:, None] * size + cells).ravel()
        for k, weights in enumerate((values * opened, opened)):
            found = np.bincount(every, weights.ravel(), len(places) * size)
            sums[places, k] = found.reshape(len(places), len(owners), width)
    layers = tuple(place.layer for place, *_ in measured)
    for i, owner in enumerate(owners):
        owner.state.measured(layers, sums[:, :, i, : len(owner.state.steps)])


def trace(measured: Sequence[Measured], owners: Sequence[Any]) -> None:
    """Gives the requests that keep every token the sizes of their own. ``owners``: with state, row, count and start."""
    keeping = [o for o in owners if o.state.sizes is not None]
    if not keeping:
        return
    tables = [np.full((o.count, o.state.sizes.columns), np.nan, np.float32) for o in keeping]
    starts = np.array([o.row for o in keeping])
    ends = np.array([o.row + o.count for o in keeping])
    for sized in each(measured):
        whose = np.searchsorted(ends, sized.rows, side="right")
        inside = whose < len(keeping)
        inside[inside] = sized.rows[inside] >= starts[whose[inside]]
        for i in np.unique(whose[inside]):
            mine = inside & (whose == i)
            column = keeping[i].state.size_columns[sized.intervention, sized.place]
            tables[i][sized.rows[mine] - starts[i], column] = sized.values[mine]
    for owner, table in zip(keeping, tables, strict=True):
        owner.state.sizes.see(owner.start, table)
