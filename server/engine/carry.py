"""What is each row's own in one forward pass: what it carries to the targets of an injection, what it is restored to.

At a source the activation is read as the model computed it, before any edit at that place, and added after that place's
edits: a target that is a source itself does not receive its own. A carry is a sum [rows, d] in float32 over the sources
that the pass has gone by, for each injection and each group of rows with the same plan and mask.

What a row is restored to depends on its position, which no layout knows: it is the same for several passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman.server.engine.chain import Chain, Injected, Restored
from steersman.server.engine.owners import Owner
from steersman.server.engine.resident import Resident


class Carry(NamedTuple):
    resident: Resident
    mask: int  # of the rows
    injection: int  # among the plan's


@dataclass(frozen=True)
class Source:
    """What is read at one place for one carry."""

    carry: Carry
    weight: float
    rows: Tensor  # [n] int64


class Carried:
    """The carries of one pass, whose rows are the ``owners``'."""

    def __init__(self, owners: Sequence[Owner] = ()) -> None:
        self._sums: dict[Carry, Tensor] = {}
        self._owners = owners

    def read(self, sources: Iterable[Source], x: Tensor, residual: Tensor | None) -> list[tuple[Carry, Tensor]]:
        """What :meth:`add` is to be given once ``x`` [T, d] has been edited."""
        found = []
        for source in sources:
            rows = source.rows.to(x.device)
            own = x[rows].float()
            if residual is not None:
                own = own + residual[rows].float()
            known = self._sums.get(source.carry)
            total = own * source.weight if known is None else torch.add(known, own, alpha=source.weight)
            found.append((source.carry, total))
        return found

    def add(self, sums: Iterable[tuple[Carry, Tensor]]) -> None:
        self._sums.update(sums)

    def to(self, resident: Resident, mask: int, chain: Chain, rows: Tensor) -> dict[int, Tensor]:
        """By intervention of ``chain``, [n, d] what is the own of a group's ``rows`` [n]."""
        found = {}
        for part in chain.parts:
            if isinstance(part, Injected):
                carry = Carry(resident, mask, part.index)
                if carry not in self._sums:
                    raise LookupError("the sources of an injection were not read in this pass")
                found[part.intervention] = self._sums[carry]
            elif isinstance(part, Restored):
                found[part.intervention] = resident.restored(part.index, *self._positions(rows))
        return found

    def _positions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[n] the position of each row, and how long its prompt is."""
        chosen = rows.cpu().numpy()
        ends = np.array([owner.row + owner.count for owner in self._owners])
        whose = np.searchsorted(ends, chosen, side="right")
        shifts = np.array([owner.start - owner.row for owner in self._owners])
        lengths = np.array([owner.state.selection.prompt_length for owner in self._owners])
        return torch.from_numpy(chosen + shifts[whose]), torch.from_numpy(lengths[whose])
