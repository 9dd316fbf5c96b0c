"""Device code of :mod:`steersman.kernels.triton_edit`, which imports it at the first launch: it needs Triton.

One Triton program edits one row, whose stream it holds in registers. Loops run over what the tables say, never over
what was known when the kernel was compiled. Every sum runs over one row in an order that depends on the width alone,
so a row's bits do not depend on its neighbours.
"""

# mypy: ignore-errors
# Triton's functions are typed by what they are launched with.

import triton
import triton.language as tl

from steersman.kernels import tables
from steersman.kernels.norms import Form

RELATIVE = tl.constexpr(tables.RELATIVE)
ONLY_IF_ACTIVE = tl.constexpr(tables.ONLY_IF_ACTIVE)
PRESERVE_NORM = tl.constexpr(tables.PRESERVE_NORM)
READS = tl.constexpr(tables.READS)
READ_COLUMNS = tl.constexpr(tables.READ_COLUMNS)
WRITE_COLUMNS = tl.constexpr(tables.WRITE_COLUMNS)
LOCAL = tl.constexpr(tables.LOCAL)
DECIDES = tl.constexpr(tables.DECIDES)
COSINE = tl.constexpr(tables.COSINE)
INJECTS = tl.constexpr(tables.INJECTS)
CARRIES = tl.constexpr(tables.CARRIES)
FIRST = tl.constexpr(tables.FIRST)
PROGRAM_WORDS = tl.constexpr(tables.PROGRAM_WORDS)
BLOCK_WORDS = tl.constexpr(tables.BLOCK_WORDS)
ROW_WORDS = tl.constexpr(tables.ROW_WORDS)
UNIT = tl.constexpr(tables.UNIT)
ONE_MORE = tl.constexpr(int(Form.ONE_MORE))
ROUNDED_SUM = tl.constexpr(int(Form.ROUNDED_SUM))
ROUNDED_QUOTIENT = tl.constexpr(int(Form.ROUNDED_QUOTIENT))


@triton.jit
def _norm(stream):
    return tl.sqrt_rn(tl.sum(stream * stream, 0))


@triton.jit
def _step(t, row, flags):
    """a' - a of a row of a block, for the coordinate t; both may be one or many."""
    bias = tl.load(row + 2).to(tl.float32, bitcast=True)
    threshold = tl.load(row + 3).to(tl.float32, bitcast=True)
    gain = tl.load(row + 4).to(tl.float32, bitcast=True)
    offset = tl.load(row + 5).to(tl.float32, bitcast=True)
    low = tl.load(row + 6).to(tl.float32, bitcast=True)
    high = tl.load(row + 7).to(tl.float32, bitcast=True)
    p = t + bias
    active = p > threshold
    a = tl.where(active, p, 0.0)
    new = gain * a + offset
    new = tl.where(new < low, low, new)  # as minimum and maximum, but a NaN stays one
    new = tl.where(new > high, high, new)
    return tl.where(active | ((flags & ONLY_IF_ACTIVE) == 0), new - a, 0.0)


@triton.jit
def _direction(name, is_column, vectors, columns, inside):
    """[BLOCK] float32, what a row's word names: a column's unit vector or a stored direction."""
    if is_column != 0:
        direction = (columns == name).to(tl.float32)
    else:
        direction = tl.load(vectors + name.to(tl.int64) * UNIT + columns, mask=inside, other=0.0)
    return direction


@triton.jit
def _move_rows(stream, change, columns, inside, rows, count, vectors, flags, scale):
    """``change`` with what a block's rows add to it, row by row; all of them read ``stream``."""
    for j in range(count):
        row = rows + j * ROW_WORDS
        t = tl.zeros_like(scale)
        if (flags & READS) != 0:
            read = _direction(tl.load(row), flags & READ_COLUMNS, vectors, columns, inside)
            t = tl.sum(stream * read, 0)
        step = _step(t, row, flags) * scale
        change += step * _direction(tl.load(row + 1), flags & WRITE_COLUMNS, vectors, columns, inside)
    return change


@triton.jit
def _move_columns(stream, change, columns, rows, count, flags, scale):
    """The same where no row reads another column than it writes: each lane runs the rows of its own column."""
    rank = tl.zeros_like(columns)  # how many rows name a lower column: they are sorted
    half = tl.full([], 1, tl.int32)
    while half * 2 <= count:
        half = half * 2
    while half > 0:
        probe = rank + half
        named = tl.load(rows + (probe - 1) * ROW_WORDS + 1, mask=probe <= count, other=0)
        rank = tl.where((probe <= count) & (named < columns), probe, rank)
        half = half // 2
    mine = tl.load(rows + rank * ROW_WORDS + 1, mask=rank < count, other=-1) == columns
    while tl.max(mine.to(tl.int32), 0) > 0:
        t = tl.where((flags & READS) != 0, stream, 0.0)
        step = _step(t, rows + tl.where(mine, rank, 0) * ROW_WORDS, flags) * scale
        change += tl.where(mine, step, 0.0)
        rank += 1
        mine = tl.load(rows + rank * ROW_WORDS + 1, mask=rank < count, other=-1) == columns
    return change


@triton.jit
def _activated(value, row):
    """A reading, of its dot or cosine. A threshold that is not there is NaN."""
    threshold = tl.load(row + 3).to(tl.float32, bitcast=True)
    value += tl.load(row + 2).to(tl.float32, bitcast=True)
    return tl.where((threshold != threshold) | (value > threshold), value, 0.0)


@triton.jit
def _decide(stream, columns, inside, row, vectors, flags):
    """1 or 0, whether a gate is open. A bound that is not there is NaN."""
    above = tl.load(row + 6).to(tl.float32, bitcast=True)
    below = tl.load(row + 7).to(tl.float32, bitcast=True)
    value = tl.sum(stream * _direction(tl.load(row), 0, vectors, columns, inside), 0)
    if (flags & COSINE) != 0:
        length = _norm(stream)
        value = tl.div_rn(value, tl.where(length < 1e-30, 1e-30, length))
    value = _activated(value, row)
    ok = ((above != above) | (value > above)) & ((below != below) | (value < below))
    return ok.to(tl.float32)


@triton.jit
def _inject(stream, change, columns, inside, carried, scale):
    """``change`` with an injection of what lies at ``carried``."""
    y = stream + tl.load(carried + columns, mask=inside, other=0.0)
    before = _norm(stream)
    after = _norm(y)
    ratio = tl.where(after > 0.0, tl.div_rn(before, after), 1.0)
    return change + scale * (y * ratio - stream)


@triton.jit
def _carry(base, columns, inside, carried, row, flags):
    """Adds to what lies at ``carried``, or begins it."""
    weight = tl.load(row + 2).to(tl.float32, bitcast=True)
    before = tl.load(carried + columns, mask=inside, other=0.0)
    before = tl.where((flags & FIRST) != 0, 0.0, before)
    tl.store(carried + columns, before + weight * base, mask=inside)


@triton.jit
def _change(
    base, columns, inside, program, vectors, gates, gates_columns, norms, norms_columns, carry, carry_slots, carry_width
):
    """[BLOCK] float32, what a program does to the row whose stream is ``base``; and where its probes are.

    ``gates``, ``norms`` and ``carry``: the row's.
    """
    change = tl.zeros_like(base)
    block = program + PROGRAM_WORDS
    last = tl.full([], -1, tl.int32)  # index of the block before
    square = tl.full([], 0.0, tl.float32)  # of the size of the block's parts so far
    for _ in range(tl.load(program)):
        flags = tl.load(block)
        count = tl.load(block + 1)
        gate = tl.load(block + 2)
        index = tl.load(block + 3)
        rows = block + BLOCK_WORDS
        block = rows + count * ROW_WORDS
        scale = tl.where(gate < 0, 1.0, 0.0)
        if gates is not None:
            if (flags & DECIDES) != 0:  # its scale is 0, its index -1
                is_open = _decide(base + change, columns, inside, rows, vectors, flags)
                tl.store(gates + gate, is_open, mask=gate < gates_columns)
            else:
                scale = tl.load(gates + gate, mask=(gate >= 0) & (gate < gates_columns), other=scale)
        before = change
        if scale != 0.0:
            stream = base + change
            length = tl.zeros_like(scale)
            if (flags & (RELATIVE | PRESERVE_NORM)) != 0:
                length = _norm(stream)
            if (flags & RELATIVE) != 0:
                scale *= length
            if (flags & (INJECTS | CARRIES)) != 0:
                slot = tl.load(rows + 1)
                if carry is not None:  # noqa: SIM102 - this one is decided when it is compiled
                    if slot < carry_slots:
                        if (flags & INJECTS) != 0:
                            change = _inject(stream, change, columns, inside, carry + slot * carry_width, scale)
                        else:
                            _carry(base, columns, inside, carry + slot * carry_width, rows, flags)
            elif (flags & LOCAL) != 0:
                change = _move_columns(stream, change, columns, rows, count, flags, scale)
            else:
                change = _move_rows(stream, change, columns, inside, rows, count, vectors, flags, scale)
            if (flags & PRESERVE_NORM) != 0:
                after = _norm(base + change)
                if after > 0.0:
                    ratio = tl.div_rn(length, after)
                    change = ratio * change + (ratio - 1.0) * base
        if norms is not None:
            moved = change - before
            square = tl.where(index == last, square, 0.0) + tl.sum(moved * moved, 0)
            tl.store(norms + index, tl.sqrt_rn(square), mask=(index >= 0) & (index < norms_columns))
            last = index
    return change, block


@triton.jit
def _probe(stream, columns, inside, probes, vectors, values, values_columns):
    """What a program's probes read of the stream when all is done. ``values``: the row's."""
    for j in range(tl.load(probes)):
        row = probes + 1 + j * ROW_WORDS
        value = tl.sum(stream * _direction(tl.load(row), 0, vectors, columns, inside), 0)
        column = tl.load(row + 1)
        tl.store(values + column, _activated(value, row), mask=column < values_columns)


@triton.jit(
    do_not_specialize=[
        "place",
        "places",
        "gates_columns",
        "norms_columns",
        "carry_rows",
        "carry_slots",
        "values_rows",
        "values_columns",
    ]
)
def edit(
    x,  # [T, WIDTH] any float
    residual,  # the same, or None
    weight,  # [WIDTH] any float, or None
    entries,  # [T] int32
    starts,  # [entries, places] int32
    code,  # [words] int32
    vectors,  # [floats] float32
    gates,  # [T, gates_columns] float32, or None
    norms,  # [T, norms_columns] float32, or None
    squares,  # [T] float32, or None
    carry,  # [carry_rows, carry_slots, carry_width] float32, or None
    values,  # [values_rows, values_columns] float32, or None
    place,
    places,
    x_stride,
    residual_stride,
    gates_stride,
    gates_columns,
    norms_stride,
    norms_columns,
    carry_rows,
    carry_slots,
    carry_width,
    values_rows,
    values_columns,
    eps,
    NORM: tl.constexpr,  # whether the RMSNorm follows, for every row
    FORM: tl.constexpr,  # in which of its forms, as norms.Form has them
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    entry = tl.load(entries + i)
    start = tl.load(starts + entry * places + place, mask=entry >= 0, other=0)
    if NORM or start > 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        own = tl.load(x + i * x_stride + columns, mask=inside, other=0.0)
        stream = own.to(tl.float32)
        if residual is not None:
            stream += tl.load(residual + i * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        change = tl.zeros_like(stream)
        probes = code
        if start > 0:
            if squares is not None:
                tl.store(squares + i, tl.sum(stream * stream, 0))
            row_gates = None if gates is None else gates + i * gates_stride
            row_norms = None if norms is None else norms + i * norms_stride
            row_carry = None if carry is None else carry + i * carry_slots * carry_width
            slots = tl.where(i < carry_rows, carry_slots, 0)
            change, probes = _change(
                *(stream, columns, inside, code + start, vectors, row_gates, gates_columns, row_norms, norms_columns),
                *(row_carry, slots, carry_width),
            )
        # What does not move keeps its bits: -0 and NaN are not the same after an addition of 0.
        new = tl.where(change != 0.0, (own.to(tl.float32) + change).to(own.dtype), own)
        after = new.to(tl.float32)
        if residual is not None:
            after += tl.load(residual + i * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            z = after
            tl.store(residual + i * residual_stride + columns, z.to(own.dtype), mask=inside)
            if (ROUNDED_SUM & FORM) != 0:
                z = z.to(own.dtype).to(tl.float32)
            z *= tl.rsqrt(tl.sum(z * z, 0) / WIDTH + eps)
            if weight is not None:
                factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
                if (ONE_MORE & FORM) != 0:
                    factor += 1.0
                if (ROUNDED_QUOTIENT & FORM) != 0:
                    z = z.to(own.dtype).to(tl.float32)
                z *= factor
            new = z.to(own.dtype)
        tl.store(x + i * x_stride + columns, new, mask=inside)
        if values is not None:  # noqa: SIM102 - this one is decided when it is compiled
            if (start > 0) & (i < values_rows):
                _probe(after, columns, inside, probes, vectors, values + i * values_columns, values_columns)
