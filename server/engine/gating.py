"""The gates of a forward pass: read at one place, they hold for later ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.server.engine.layout import Work
from steersman.server.engine.owners import Owner, fail
from steersman.steering.plan import Place


class Decided(NamedTuple):
    owner: Owner
    gate: int  # among the plan's
    values: Tensor  # [count] 0 or 1


def gates_of(work: Work, owners: Sequence[Owner]) -> Tensor:
    """[rows, n_gates] of the work's rows."""
    count = max(len(owner.gates) for owner in owners)
    everyone = torch.zeros(max(o.row + o.count for o in owners), count)
    for owner in owners:
        for i, values in enumerate(owner.gates):
            everyone[owner.rows, i] = values
    return everyone[torch.cat([g.rows for g in work.groups])]


def read_gates(owners: Sequence[Owner], place: Place, stream: Callable[[Owner], Tensor]) -> list[Decided]:
    """The gates that are read at ``place``; ``stream`` gives the activations there, [count, d] float32."""
    out = []
    for owner in owners:
        for i, gate in enumerate(owner.state.gates):
            if gate.read.place != place:
                continue
            seen = stream(owner)
            values = owner.gates[i].clone()
            try:
                gate.decide(seen, owner.start, owner.state.selection.prompt_length, values)
                out.append(Decided(owner, i, values))
            except Exception as error:
                fail([owner.state], f"reading a gate at {place.name} failed: {error}")
    return out
