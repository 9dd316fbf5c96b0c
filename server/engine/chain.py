"""A plan's edits at one place done one after another, in plain torch on any device.

That is how they are done where one of them is an injection, whose write vector is no plan's but each row's own, and
where each must be known by itself because it may not be larger than a limit. The reductions run along one row's own
numbers, so a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
class Chain:
    """What a plan does at a place where it injects, in request order."""

    parts: tuple[Program | Injected, ...]  # programs of one block each

    @cached_property
    def blocks(self) -> tuple[Block | Injected, ...]:
        return tuple(part if isinstance(part, Injected) else part.blocks[0] for part in self.parts)

    @cached_property
    def gates(self) -> int:
        """How many of the plan's gates must be given, 0 when no part has one."""
        return max((block.gate + 1 for block in self.blocks), default=0)


def chain(program: Program | None, injected: Sequence[Injected]) -> Chain:
    """The blocks of ``program`` and the injections at the same place, in the order of the interventions."""
    parts: list[Program | Injected] = [*(singles(program) if program else ()), *injected]
    return Chain(tuple(sorted(parts, key=lambda p: (p if isinstance(p, Injected) else p.blocks[0]).intervention)))


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
    carried: [n, d] float32 for each of the plan's injections in a chain.
    Returns the change [n, d], and [n, n_blocks] ‖Δx‖/‖x‖ of each part after the limit.
    """
    parts: Sequence[Program | Injected] = program.parts if isinstance(program, Chain) else singles(program)
    square = row_sums(x * x)
    length = (square if reduce is None else reduce(square)).sqrt().clamp_min(1e-30)
    stream, sizes = x.clone(), x.new_zeros(len(x), len(parts))
    for i, part in enumerate(parts):
        if isinstance(part, Injected):
            change, norm = _inject(stream, part, gates, carried)
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
    if carried is None or (part.gate >= 0 and gates is None):
        raise ValueError("an injection needs what is carried to it, and a gated one its gates")
    change = inject(x, carried[part.index])
    if part.gate >= 0:
        assert gates is not None
        change = change * gates[:, part.gate, None].to(change)
    return change, row_sums(change * change).sqrt()


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
