"""The truth that every other kernel is tested against, in plain torch, at any float dtype.

:func:`edit` takes the low-rank form (see :mod:`steersman.kernels.program`): one product with U, a
recurrence over the blocks on a few scalars per token, one product with W. Every reduction runs along
one token's own numbers, so a token's bits do not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steersman.kernels.program import Block, Program, Reading

Reduce = Callable[[Tensor], Tensor]


def edit(
    x: Tensor,
    program: Program,
    gates: Tensor | None = None,
    norms: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """The change ``x' − x`` that ``program`` makes to every row of ``x``.

    x: [n, d] float32 or float64, the site's activations.
    gates: [n, n_gates] 0 or 1, the plan's gates for each row; needed when a block has one.
    norms: [n, n_blocks] in x's dtype, filled with the size ‖Δx‖ of what each block did.
    reduce: adds a tensor up over the tensor-parallel ranks, where x and ``program`` are one rank's shard.
    Returns [n, d] in x's dtype. No input but ``norms`` is modified.
    """
    if program.is_columnar:
        return _edit_columns(x, program, gates, norms, reduce or _alone)
    # The scalars in float64: a norm made of Gram terms is a difference of large numbers where little is left of x.
    alpha, c = (part.to(x) for part in _recur(x.double(), program, gates, norms, reduce or _alone))
    change = _combine(c, program.writes)
    return change + (alpha - 1)[:, None] * x if program.needs_norm else change


def read(x: Tensor, reading: Reading) -> Tensor:
    """[n] what ``reading`` is of each row of ``x`` [n, d]."""
    value = row_sums(x * reading.direction.to(x))
    if reading.cosine:
        value = value / row_sums(x * x).sqrt().clamp_min(1e-30)
    value = value + reading.bias
    return value if reading.threshold is None else torch.where(value > reading.threshold, value, 0)


def is_open(x: Tensor, reading: Reading) -> Tensor:
    """[n] bool, whether a gate that is this ``reading`` is open for each row of ``x`` [n, d]."""
    return within(read(x, reading), reading.above, reading.below)


def within(value: Tensor, above: float | None, below: float | None) -> Tensor:
    """[n] bool, whether each of ``value`` [n] is between the bounds that are given."""
    ok = torch.ones_like(value, dtype=torch.bool)
    if above is not None:
        ok &= value > above
    if below is not None:
        ok &= value < below
    return ok


def inject(x: Tensor, carried: Tensor) -> Tensor:
    """[n, d] the change of ``x`` [n, d] to y = x + carried at the length of x: zero where nothing is carried."""
    y = x + carried
    before, after = row_sums(x * x).sqrt(), row_sums(y * y).sqrt()
    ratio = torch.where(after > 0, before / after, 1)
    return y * ratio[:, None] - x


def scalar_map(t: Tensor, block: Block) -> Tensor:
    """a' − a for the coordinates t [n, r] of one block."""
    p = t + block.bias.to(t)
    active = p > block.threshold.to(t)
    a = torch.where(active, p, torch.zeros_like(p))
    new = torch.clamp(block.gain.to(t) * a + block.offset.to(t), block.low.to(t), block.high.to(t))
    step = new - a
    return torch.where(active, step, torch.zeros_like(step)) if block.only_if_active else step


def row_sums(x: Tensor) -> Tensor:
    """Σ of each row of x [n, d]. PyTorch splits a long row that is alone among its threads, which changes its bits."""
    return x.sum(-1) if len(x) != 1 else torch.cat([x, x]).sum(-1)[:1]


def project(x: Tensor, rows: Tensor) -> Tensor:
    """x·rowsᵀ, [n, k], one row at a time."""
    if rows.shape[0] == 0:
        return x.new_zeros(x.shape[0], 0)
    return torch.stack([row_sums(x * row) for row in rows.to(x)], dim=1)


def _recur(
    x: Tensor, program: Program, gates: Tensor | None, norms: Tensor | None, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """α [n] and c [n, K] of x' = α·x + Wᵀc."""
    s = reduce(project(x, program.reads))
    gram = program.reads_of_writes.to(x)
    alpha = x.new_ones(x.shape[0])
    c = x.new_zeros(x.shape[0], program.rows)
    norm = _Norm(x, program, reduce) if program.needs_norm or norms is not None else None
    for i, (block, (a, b)) in enumerate(zip(program.blocks, program.spans, strict=True)):
        if block.encode is not None:
            t = block.encode(_whole(alpha[:, None] * x + _combine(c, program.writes), program, reduce)).to(x)
        else:
            t = alpha[:, None] * s[:, a:b] + (c[:, None, :] * gram[a:b]).sum(-1)
        step = _gated(scalar_map(t, block), block, gates)
        if block.relative:
            assert norm is not None
            step = step * norm(alpha, c)[:, None]
        before_alpha, before_c = alpha, c
        c = c.clone()
        c[:, a:b] += step
        if block.preserve_norm:
            assert norm is not None
            before, after = norm(before_alpha, before_c), norm(alpha, c)
            ratio = torch.where(after > 0, before / after, torch.ones_like(after))
            alpha, c = alpha * ratio, c * ratio[:, None]
        if norms is not None:
            assert norm is not None
            norms[:, i] = norm(alpha - before_alpha, c - before_c)
    return alpha, c


def _edit_columns(x: Tensor, program: Program, gates: Tensor | None, norms: Tensor | None, reduce: Reduce) -> Tensor:
    """The same for programs that touch single coordinates: gather them, map them, scatter them."""
    new = x.clone()
    for i, block in enumerate(program.blocks):
        assert block.write.columns is not None
        columns = block.write.columns.to(x.device)
        t = new[:, block.read.columns.to(x.device)] if block.read else x.new_zeros(x.shape[0], block.count)  # type: ignore[union-attr]
        step = _gated(scalar_map(t, block), block, gates)
        moved = torch.zeros_like(new).index_add_(1, columns, step)
        new += moved
        if norms is not None:
            norms[:, i] = reduce(row_sums(moved.square())).sqrt()
    return new - x


def _whole(x: Tensor, program: Program, reduce: Reduce) -> Tensor:
    """The activation [n, d], of which x is this rank's part."""
    if program.part_of is None:
        return x
    start, width = program.part_of
    whole = x.new_zeros(x.shape[0], width)
    whole[:, start : start + x.shape[1]] = x
    return reduce(whole)


def _alone(partial: Tensor) -> Tensor:
    return partial


def _gated(step: Tensor, block: Block, gates: Tensor | None) -> Tensor:
    if block.gate < 0:
        return step
    if gates is None:
        raise ValueError("the program has a gated block, so gates must be given")
    return step * gates[:, block.gate, None].to(step)


def _combine(c: Tensor, rows: Tensor) -> Tensor:
    """c·rows, [n, d], one row at a time."""
    out = c.new_zeros(c.shape[0], rows.shape[1])
    for j, row in enumerate(rows.to(c)):
        out += c[:, j, None] * row
    return out


class _Norm:
    """‖α·x + Wᵀc‖ from x's own norm and Gram matrices, without forming the vector."""

    def __init__(self, x: Tensor, program: Program, reduce: Reduce) -> None:
        self.xx = reduce(row_sums(x * x))
        self.wx = reduce(project(x, program.writes))
        self.ww = program.writes_of_writes.to(x)

    def __call__(self, alpha: Tensor, c: Tensor) -> Tensor:
        cross = (c * self.wx).sum(-1)
        square = (c[:, :, None] * c[:, None, :] * self.ww).sum((-2, -1))
        return (alpha**2 * self.xx + 2 * alpha * cross + square).clamp_min(0).sqrt()
