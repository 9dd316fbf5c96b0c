"""A plan's edits at one place done one after another, in plain torch on any device.

That is how they are done where one of them writes what is each row's own, an injection or a restoration, and where each
must be known by itself because it may not be larger than a limit. The reductions run along one row's own
numbers, so a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steersman.kernels.program import Block, Program
from steersman.kernels.reference import Reduce, edit, inject, row_sums


@dataclass(frozen=True)
class Injected:
    """An injection at one of its targets: x′ = y·‖x‖/‖y‖ with y = x + what the row carries from the sources before."""

    intervention: int
    index: int  # among the plan's injections
    gate: int = -1


@dataclass(frozen=True)
class Restored:
    """A restoration: x′ = y, or y·‖x‖/‖y‖ where the norm is kept, y the row's own or x with its part in a subspace."""

    intervention: int
    index: int  # among the plan's restorations
    gate: int = -1
    preserve_norm: bool = False
    basis: Tensor | None = None  # V [k, d] orthonormal, of a shard its columns; y = x + VᵀV(row − x)


Own = Injected | Restored
"""What takes something of each row's own, which is carried to it."""


@dataclass(frozen=True)
class Chain:
    """What a plan does at a place where it injects or restores, in request order."""

    parts: tuple[Program | Own, ...]  # programs of one block each

    @cached_property
    def blocks(self) -> tuple[Block | Own, ...]:
        return tuple(part.blocks[0] if isinstance(part, Program) else part for part in self.parts)

    @cached_property
    def gates(self) -> int:
        """How many of the plan's gates must be given, 0 when no part has one."""
        return max((block.gate + 1 for block in self.blocks), default=0)


def chain(program: Program | None, others: Sequence[Own]) -> Chain:
    """The blocks of ``program`` and what else is done at the same place, in the order of the interventions."""
    parts: list[Program | Own] = [*(singles(program) if program else ()), *others]
    return Chain(tuple(sorted(parts, key=lambda p: (p.blocks[0] if isinstance(p, Program) else p).intervention)))


def in_turn(
    x: Tensor,
    program: Program | Chain,
    gates: Tensor | None = None,
    reduce: Reduce | None = None,
    carried: Mapping[int, Tensor] | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``program`` changes in ``x`` [n, d] float32, where no part's change may exceed ``limit``·‖x‖.

    gates: [n, n_gates] 0 or 1. reduce: adds up over tensor-parallel ranks, where x is one rank's shard.
    carried: [n, d] float32 for each part of a chain that is no program, by its intervention, which has no other here.
    Returns the change [n, d], and [n, n_blocks] ‖Δx‖/‖x‖ of each part after the limit.
    """
    parts: Sequence[Program | Own] = program.parts if isinstance(program, Chain) else singles(program)
    square = row_sums(x * x)
    length = (square if reduce is None else reduce(square)).sqrt().clamp_min(1e-30)
    stream, sizes = x.clone(), x.new_zeros(len(x), len(parts))
    for i, part in enumerate(parts):
        if isinstance(part, Injected):
            change, norm = _inject(stream, part, gates, carried)
        elif isinstance(part, Restored):
            change, norm = _restore(stream, part, gates, carried, reduce)
        else:
            norms = x.new_zeros(len(x), 1)
            change, norm = edit(stream, part, gates, norms, reduce), norms[:, 0]
        if limit is not None:
            factor = (limit * length / norm.clamp_min(1e-30)).clamp_max(1)
            change, norm = factor[:, None] * change, factor * norm
        stream += change
        sizes[:, i] = norm / length
    return stream - x, sizes


def _inject(
    x: Tensor, part: Injected, gates: Tensor | None, carried: Mapping[int, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The change [n, d] and its norm [n]. Exactly zero where nothing is carried."""
    change = _gated(inject(x, _carried(part, gates, carried)), part, gates)
    return change, row_sums(change * change).sqrt()


def _restore(
    x: Tensor, part: Restored, gates: Tensor | None, carried: Mapping[int, Tensor] | None, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """The change [n, d] and its norm [n]."""
    total: Reduce = reduce or (lambda t: t)
    change = _carried(part, gates, carried) - x
    if part.basis is not None:
        basis = part.basis.to(x)
        change = total(change @ basis.T) @ basis
    if part.preserve_norm:
        y = x + change
        before, after = total(row_sums(x * x)).sqrt(), total(row_sums(y * y)).sqrt()
        change = torch.where((after > 0)[:, None], y * (before / after)[:, None] - x, change)
    change = _gated(change, part, gates)
    return change, total(row_sums(change * change)).sqrt()


def _carried(part: Own, gates: Tensor | None, carried: Mapping[int, Tensor] | None) -> Tensor:
    if carried is None or (part.gate >= 0 and gates is None):
        raise ValueError("what is each row's own must be carried to it, and a gated part needs its gates")
    return carried[part.intervention]


def _gated(change: Tensor, part: Own, gates: Tensor | None) -> Tensor:
    if part.gate < 0:
        return change
    assert gates is not None
    return change * gates[:, part.gate, None].to(change)


def singles(program: Program) -> list[Program]:
    """A program for each block; kept with the whole one. A shard's Gram matrices are those of the whole activation."""
    found: Any = program.__dict__.get("_singles")
    if found is None:
        found = []
        for block, (a, b) in zip(program.blocks, program.spans, strict=True):
            single = Program((block,), program.width, program.part_of)
            if not single.is_columnar:
                single.__dict__.update(
                    reads_of_writes=program.reads_of_writes[a:b, a:b],
                    writes_of_writes=program.writes_of_writes[a:b, a:b],
                )
            found.append(single)
        program.__dict__["_singles"] = found
    return found  # type: ignore[no-any-return]
