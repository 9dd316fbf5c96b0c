"""The one form that every edit of the residual stream takes.

A *block* is what one intervention does at one site and layer: ``r`` simultaneous rank-one edits.
Row ``j`` of a block reads ``t = u_j·x``, maps it, and moves the stream along ``w_j``::

    p  = t + bias_j
    a  = p                      if threshold_j = -inf   (a plain coordinate)
       = p if p > threshold_j   else 0                  (ReLU: threshold 0; JumpReLU: its own)
    a' = clip(gain_j·a + offset_j, low_j, high_j)
    x ← x + g·n·Σ_j (a'_j − a_j)·w_j

``g`` is the token's gate (1 without one) and ``n`` is ‖x‖ when the block is ``relative``, else 1. A row
without a read has t = 0, so ``offset_j`` alone is added: a plain add. ``preserve_norm`` rescales the
result to the norm that the stream had before the block.

Where a row of its own cannot tell (one feature of a TopK dictionary), a block has ``encode`` in place of reads, a
function of the running stream that gives all its ``t``; only the reference runs such programs.

A *program* is the ordered list of one plan's blocks at one site and layer. Whatever the list, the
result is x' = α·x + Wᵀc with a scalar α and one coefficient per row, because every op sees only its
own coordinates of the running stream, t = α·(U x) + (U Wᵀ)c, and Gram matrices of the rows give the
norms: one read of x and one write, for any list of ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

NEVER = float("-inf")
"""``threshold`` of a row that has no activation function."""

Encode = Callable[[Tensor], Tensor]
"""x [n, d] float64 → [n, r] of any float type, each row's t."""


@dataclass(frozen=True)
class Rows:
    """``r`` directions of width ``d``: dense vectors, or unit vectors named by their column."""

    width: int
    dense: Tensor | None = None  # [r, d] float32
    columns: Tensor | None = None  # [r] int64, the coordinate that is one

    def __post_init__(self) -> None:
        if (self.dense is None) == (self.columns is None):
            raise ValueError("Rows takes either dense vectors or columns")

    @property
    def count(self) -> int:
        return int((self.dense if self.dense is not None else self.columns).shape[0])  # type: ignore[union-attr]

    def slice(self, start: int, stop: int) -> Rows:
        """The rows' coordinates from ``start`` to ``stop``, dense."""
        return Rows(stop - start, dense=self.to_dense()[:, start:stop].contiguous())

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as [r, d]."""
        if self.dense is not None:
            return self.dense.to(dtype)
        assert self.columns is not None
        out = torch.zeros(self.count, self.width, dtype=dtype)
        out[torch.arange(self.count), self.columns] = 1
        return out


@dataclass(frozen=True)
class Block:
    """One intervention at one site and layer; see the module's formula. All vectors are [r] float32."""

    intervention: int
    write: Rows
    read: Rows | None
    bias: Tensor
    threshold: Tensor
    gain: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    relative: bool = False
    only_if_active: bool = False
    preserve_norm: bool = False
    gate: int = -1  # index into the plan's gates, -1: always open
    encode: Encode | None = None  # what gives t; such a block has no read

    @property
    def count(self) -> int:
        return self.write.count

    @property
    def is_constant(self) -> bool:
        """Adds the same vector whatever x is."""
        fixed = self.read is None and self.encode is None
        return fixed and not self.relative and not self.preserve_norm and self.gate < 0

    @property
    def constant(self) -> Tensor:
        """[d] float32, what a constant block adds: the formula at t = 0."""
        p = self.bias
        active = p > self.threshold
        a = torch.where(active, p, torch.zeros_like(p))
        step = torch.clamp(self.gain * a + self.offset, self.low, self.high) - a
        if self.only_if_active:
            step = torch.where(active, step, torch.zeros_like(step))
        return step @ self.write.to_dense()

    @property
    def is_columnar(self) -> bool:
        """Touches single coordinates only, so it needs neither dots nor norms."""
        same = self.encode is None and (self.read is None or self.read.columns is not None)
        return same and self.write.columns is not None and not self.relative and not self.preserve_norm


@dataclass(frozen=True)
class Reading:
    """One number read of the stream: t = u·x, over ‖x‖ where it is a cosine; p = t + bias, 0 unless above a threshold.

    Of a gate it is compared with bounds: open where above < p < below.
    """

    direction: Tensor  # u, [d] float32
    cosine: bool = False
    bias: float = 0.0
    threshold: float | None = None  # None: p whatever it is
    above: float | None = None
    below: float | None = None


@dataclass(frozen=True)
class Inject:
    """In place of a block: x ← x + g·(y·‖x‖/‖y‖ − x), y = x + what the row carries in ``slot``."""

    slot: int
    gate: int = -1

    @property
    def count(self) -> int:
        return 1


@dataclass(frozen=True)
class Source:
    """What a row's carry in ``slot`` takes of the stream as it comes to a place: weight·x, after all edits there."""

    slot: int
    weight: float
    first: bool  # whether it is the first of its slot in a pass, so that nothing is carried before


@dataclass(frozen=True)
class Code:
    """All that a row's entry does at one place."""

    blocks: tuple[Block | Inject, ...] = ()
    gates: Mapping[int, Reading] = field(default_factory=dict)  # of the plan's gates those that are read here
    sources: tuple[Source, ...] = ()
    probes: Mapping[int, Reading] = field(default_factory=dict)  # by column, what is read after all edits there


@dataclass(frozen=True)
class Program:
    """The ordered blocks of one plan at one site and layer, with what can be computed beforehand."""

    blocks: tuple[Block, ...]
    width: int
    part_of: tuple[int, int] | None = None  # first column and width of the whole activation, of which this is a shard
    spans: tuple[tuple[int, int], ...] = field(init=False)  # rows of each block in the concatenation

    def __post_init__(self) -> None:
        spans, start = [], 0
        for block in self.blocks:
            spans.append((start, start + block.count))
            start += block.count
        object.__setattr__(self, "spans", tuple(spans))

    @property
    def rows(self) -> int:
        return self.spans[-1][1] if self.spans else 0

    def shard(self, start: int, stop: int) -> Program:
        """The program of the tensor-parallel rank that holds coordinates ``start`` to ``stop`` of x.

        Its dots and norms are partial sums, to be added up over the ranks; its Gram matrices are whole.
        """
        if self.is_columnar:
            return Program(tuple(_columns_between(b, start, stop) for b in self.blocks), stop - start)
        blocks = (
            replace(b, write=b.write.slice(start, stop), read=b.read.slice(start, stop) if b.read else None)
            for b in self.blocks
        )
        part = Program(tuple(blocks), stop - start, (start, self.width))
        part.__dict__.update(reads_of_writes=self.reads_of_writes, writes_of_writes=self.writes_of_writes)
        return part

    @cached_property
    def needs_norm(self) -> bool:
        return any(b.relative or b.preserve_norm for b in self.blocks)

    @cached_property
    def encodes(self) -> bool:
        """Whether some block calls a function of the whole stream."""
        return any(b.encode is not None for b in self.blocks)

    @cached_property
    def is_columnar(self) -> bool:
        """Every block touches single coordinates only."""
        return all(b.is_columnar for b in self.blocks)

    @cached_property
    def constant(self) -> Tensor | None:
        """[d] float32, the one vector that the whole program adds; None when it reads x."""
        if not all(b.is_constant for b in self.blocks):
            return None
        total = torch.zeros(self.width)
        for b in self.blocks:
            total += b.constant
        return total

    @cached_property
    def gates(self) -> int:
        """How many of the plan's gates must be given, 0 when no block has one."""
        return max((b.gate + 1 for b in self.blocks), default=0)

    @cached_property
    def reads(self) -> Tensor:
        """U, [K, d] float32; rows without a read are zero."""
        parts = [b.read.to_dense() if b.read else torch.zeros(b.count, self.width) for b in self.blocks]
        return torch.cat(parts)

    @cached_property
    def writes(self) -> Tensor:
        """W, [K, d] float32."""
        return torch.cat([b.write.to_dense() for b in self.blocks])

    @cached_property
    def reads_of_writes(self) -> Tensor:
        """U Wᵀ, [K, K] float64: how far each write moves each coordinate."""
        return self.reads.double() @ self.writes.double().T

    @cached_property
    def writes_of_writes(self) -> Tensor:
        """W Wᵀ, [K, K] float64: the Gram matrix that norms are made of."""
        return self.writes.double() @ self.writes.double().T


def _columns_between(block: Block, start: int, stop: int) -> Block:
    """The rows of a columnar block whose column a rank holds, counted from its first column."""
    assert block.write.columns is not None
    keep = (block.write.columns >= start) & (block.write.columns < stop)

    def local(rows: Rows) -> Rows:
        assert rows.columns is not None
        return Rows(stop - start, columns=rows.columns[keep] - start)

    scalars = {n: getattr(block, n)[keep] for n in ("bias", "threshold", "gain", "offset", "low", "high")}
    return replace(block, write=local(block.write), read=local(block.read) if block.read else None, **scalars)
