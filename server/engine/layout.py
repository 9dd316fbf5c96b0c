"""Which rows of a batch get which program at which place, and running them.

A layout is made when the batch's composition changes and used for as long as it stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.kernels.cpu import Table
from steersman.kernels.cpu_inject import inject
from steersman.kernels.program import Block, Program
from steersman.kernels.reference import Reduce, edit
from steersman.server.engine.carry import Carried, Source
from steersman.server.engine.chain import Chain, Injected, Own, in_turn
from steersman.server.engine.resident import Resident


class Run(NamedTuple):
    """Consecutive rows that the same interventions of one plan edit."""

    resident: Resident
    mask: int
    first: int
    end: int  # past the last one


@dataclass(frozen=True)
class Group:
    """Rows that get the same program at one place."""

    resident: Resident
    program: Program | Chain
    rows: Tensor  # [n] int64
    mask: int = 0  # the interventions that select them

    @property
    def tabled(self) -> bool:
        """Whether a table takes it."""
        return isinstance(self.program, Program) and not self.program.encodes

    def carry(self, carried: Carried | None, device: torch.device) -> dict[int, Tensor]:
        """[n, d] what is the rows' own, by intervention."""
        if carried is None or not isinstance(self.program, Chain):
            return {}
        found = carried.to(self.resident, self.mask, self.program, self.rows)
        return {intervention: own.to(device) for intervention, own in found.items()}


@dataclass
class Work:
    """All that is done at one place."""

    groups: list[Group] = field(default_factory=list)  # those that a table takes come first
    sources: list[Source] = field(default_factory=list)  # what is read here for injections at later layers
    like: Work | None = None  # one at another place that tells the same of its rows, see `liken`
    quick: Table | None = None  # once it is made, where running it is all that is to be done
    _table: Table | None = None
    _tables: int = 0  # of the groups, how many a table takes

    def add(self, group: Group) -> None:
        if group.tabled:
            self.groups.insert(self._tables, group)
            self._tables += 1
        else:
            self.groups.append(group)

    @cached_property
    def gated(self) -> bool:
        return any(g.program.gates for g in self.groups)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """[n] the rows of all groups one after another."""
        if self.like is not None:
            return self.like.rows
        return np.concatenate([g.rows.numpy() for g in self.groups])

    @cached_property
    def interventions(self) -> NDArray[np.int64]:
        """[n, max_blocks] the intervention of each row's blocks, -1 past its last one."""
        return self.like.interventions if self.like else self._by_row(lambda block: block.intervention)

    @cached_property
    def gates(self) -> NDArray[np.int64]:
        """[n, max_blocks] the gate of each row's blocks, -1 where there is none."""
        return self.like.gates if self.like else self._by_row(lambda block: block.gate)

    def _by_row(self, value: Callable[[Block | Own], int]) -> NDArray[np.int64]:
        out = np.full((self.rows.shape[0], max(len(g.program.blocks) for g in self.groups)), -1)
        for group, mine in self.slices():
            out[mine, : len(group.program.blocks)] = [value(block) for block in group.program.blocks]
        return out

    def slices(self) -> Iterator[tuple[Group, slice]]:
        """Each group with its part of what is kept for the rows of all groups one after another."""
        start = 0
        for group in self.groups:
            count = group.rows.shape[0]
            yield group, slice(start, start + count)
            start += count

    def apply(
        self,
        x: Tensor,
        residual: Tensor | None,
        gates: Tensor | None,
        measure: bool,
        reduce: Reduce | None,
        carried: Carried | None = None,
    ) -> Tensor | None:
        """Edits ``x`` [T, d] in place.

        gates: [rows, n_gates] 0 or 1, needed when ``gated``.
        reduce: adds up over tensor-parallel ranks, where x is one rank's shard.
        carried: what this pass has carried here, for chains.
        Returns [rows, n_blocks] how large each block's edit was beside the stream, when ``measure``.
        """
        if reduce is None and x.is_cpu and self._table is None:
            tabled = self.groups[: self._tables]
            self._table = Table.build(
                [(g.program, g.rows) for g in tabled if isinstance(g.program, Program)], x.shape[1]
            )
            if self._tables == len(self.groups) and not self.gated and not self.sources:
                self.quick = self._table
        if self._table is not None and not measure and self._tables == len(self.groups):
            self._table.apply(x, residual, gates)
            return None
        norms = torch.zeros(self.interventions.shape, device=x.device) if measure else None
        squares = torch.zeros(self.rows.shape[0], device=x.device) if measure else None
        done = 0  # rows
        if self._table is not None and self._table.rows:
            done = self._table.rows
            self._table.apply(x, residual, *(None if part is None else part[:done] for part in (gates, norms, squares)))
        for group, mine in self.slices():
            if mine.start < done:
                continue
            own_gates = None if gates is None else gates[mine].to(x.device)
            _edit(
                x, residual, group, own_gates,
                None if norms is None else norms[mine, : len(group.program.blocks)],
                None if squares is None else squares[mine], reduce, carried,
            )  # fmt: skip
        if norms is None or squares is None:
            return None
        return (norms / squares.sqrt().clamp_min(1e-30)[:, None]).cpu()


def _edit(
    x: Tensor,
    residual: Tensor | None,
    group: Group,
    gates: Tensor | None,
    norms: Tensor | None,
    squares: Tensor | None,
    reduce: Reduce | None,
    carried: Carried | None,
) -> None:
    if _injected(x, residual, group, gates, norms, squares, carried):
        return
    rows = group.rows.to(x.device)
    own = x[rows].float()
    stream = own if residual is None else own + residual[rows].float()
    if squares is not None:
        square = (stream * stream).sum(-1)
        squares.copy_(square if reduce is None else reduce(square))
    if not isinstance(group.program, Chain):
        x[rows] = (own + edit(stream, group.program, gates, norms, reduce)).to(x.dtype)
        return
    change, sizes = in_turn(stream, group.program, gates, reduce, group.carry(carried, x.device))
    x[rows] = torch.where(change == 0, own, own + change).to(x.dtype)  # -0.0 + 0 is +0.0
    if norms is not None and squares is not None:
        norms.copy_(sizes * squares.sqrt()[:, None])


def liken(works: Iterable[Work]) -> None:
    """Has works share their arrays where the same interventions edit the same rows, as at a plan's many layers."""
    first: dict[Any, Work] = {}
    for work in works:
        key = tuple(
            (id(group.rows), *((block.intervention, block.gate) for block in group.program.blocks))
            for group in work.groups
        )
        if (found := first.setdefault(key, work)) is not work:
            work.like = found


def _injected(
    x: Tensor,
    residual: Tensor | None,
    group: Group,
    gates: Tensor | None,
    norms: Tensor | None,
    squares: Tensor | None,
    carried: Carried | None,
) -> bool:
    """Does an injection that is alone at its place in one call, where the CPU's kernel takes it."""
    if residual is not None or not x.is_cpu or not isinstance(group.program, Chain) or len(group.program.parts) != 1:
        return False
    (part,) = group.program.parts
    if not isinstance(part, Injected):
        return False
    own_gate = None if part.gate < 0 or gates is None else gates[:, part.gate, None]
    (own,) = group.carry(carried, x.device).values()
    return inject(x, group.rows, own, own_gate, norms, squares)


def group_rows(runs: Sequence[Run]) -> dict[tuple[Resident, int], Tensor]:
    """[n] int64 rows for each plan and mask."""
    ranges: dict[tuple[Resident, int], list[Tensor]] = {}
    for resident, mask, a, b in runs:
        ranges.setdefault((resident, mask), []).append(torch.arange(a, b))
    return {key: torch.cat(parts) for key, parts in ranges.items()}


def runs_of(masks: NDArray[np.uint64], unedited: bool = False) -> Iterable[tuple[int, int, int]]:
    """(mask, first, past the last) of maximal runs of equal masks; ``unedited``: also of those that are 0."""
    edges = [0, *(np.flatnonzero(masks[1:] != masks[:-1]) + 1).tolist(), len(masks)]
    for a, b in pairwise(edges):
        mask = int(masks[a])
        if mask or unedited:
            yield mask, a, b
