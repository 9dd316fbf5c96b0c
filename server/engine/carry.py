"""What rows carry from the source layers of an injection to its targets, within one forward pass.

At a source the activation is read as the model computed it, before any edit at that place, and added after that place's
edits: a target that is a source itself does not receive its own. A carry is a sum [rows, d] in float32 over the sources
that the pass has gone by, for each injection and each group of rows with the same plan and mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.server.engine.chain import Chain, Injected
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
    """The carries of one pass."""

    def __init__(self) -> None:
        self._sums: dict[Carry, Tensor] = {}

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

    def to(self, resident: Resident, mask: int, chain: Chain) -> dict[int, Tensor]:
        """By injection of ``chain``, what the rows of one group carry."""
        found = {}
        for part in chain.parts:
            if isinstance(part, Injected):
                carry = Carry(resident, mask, part.index)
                if carry not in self._sums:
                    raise LookupError("the sources of an injection were not read in this pass")
                found[part.index] = self._sums[carry]
        return found
