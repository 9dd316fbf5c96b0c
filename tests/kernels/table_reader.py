"""The tables as plain torch reads them: an independent reading of the layout that kernels/tables.py documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.kernels import tables as layout
from steersman.kernels.norms import DEFINED, Form, add_and_norm
from steersman.kernels.program import Block, Code, Inject, Program, Reading, Rows, Source
from steersman.kernels.reference import edit as edit_rows
from steersman.kernels.reference import inject, is_open, read
from steersman.kernels.tables import Tables


def code_at(tables: Tables, entry: int, place: int, width: int) -> Code | None:
    at = int(tables.starts[entry, place])
    if at == 0:
        return None
    count, at = int(tables.code[at]), at + layout.PROGRAM_WORDS
    blocks: list[Block | Inject] = []
    gates: dict[int, Reading] = {}
    sources: list[Source] = []
    for _ in range(count):
        flags, rows, gate, number = (int(w) for w in tables.code[at : at + layout.BLOCK_WORDS])
        at += layout.BLOCK_WORDS
        words = tables.code[at : at + rows * layout.ROW_WORDS].view(rows, layout.ROW_WORDS)
        at += rows * layout.ROW_WORDS
        scalars = words[:, 2:].contiguous().view(torch.float32)
        if flags & layout.DECIDES:
            assert (rows, number, words[0, 1], blocks, sources) == (1, layout.NONE, layout.NONE, [], [])
            bias, threshold, _, _, above, below = (None if s != s else s for s in scalars[0].tolist())
            direction = _directions(tables, words[:, 0], False, width).to_dense()[0]
            gates[gate] = Reading(direction, bool(flags & layout.COSINE), bias or 0.0, threshold, above, below)
        elif flags & layout.CARRIES:
            assert (rows, gate, number) == (1, layout.NONE, layout.NONE)
            sources.append(Source(int(words[0, 1]), float(scalars[0, 0]), bool(flags & layout.FIRST)))
        elif flags & layout.INJECTS:
            assert (rows, number, sources) == (1, len(blocks), [])
            blocks.append(Inject(int(words[0, 1]), gate))
        else:
            assert not sources
            blocks.append(
                Block(
                    number,
                    _directions(tables, words[:, 1], bool(flags & layout.WRITE_COLUMNS), width),
                    _directions(tables, words[:, 0], bool(flags & layout.READ_COLUMNS), width)
                    if flags & layout.READS
                    else None,
                    *(scalars[:, i].clone() for i in range(6)),
                    relative=bool(flags & layout.RELATIVE),
                    only_if_active=bool(flags & layout.ONLY_IF_ACTIVE),
                    preserve_norm=bool(flags & layout.PRESERVE_NORM),
                    gate=gate,
                )
            )
    rows = tables.code[at + 1 :][: int(tables.code[at]) * layout.ROW_WORDS].view(-1, layout.ROW_WORDS)
    probes = {}
    for row in rows:
        bias, threshold, *_ = (None if s != s else s for s in row[2:].contiguous().view(torch.float32).tolist())
        direction = _directions(tables, row[:1], False, width).to_dense()[0]
        probes[int(row[1])] = Reading(direction, bias=bias or 0.0, threshold=threshold)
    return Code(tuple(blocks), gates, tuple(sources), probes)


def edit(
    x: Tensor,
    residual: Tensor | None,
    entries: Tensor,
    tables: Tables,
    place: int,
    gates: Tensor | None = None,
    *,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """What a kernel does, row by row."""
    assert len(entries) >= len(x)
    buffers = tables.buffers
    if gates is None and buffers is not None:
        gates = buffers.gates
    for row, entry in enumerate(entries[: len(x)].tolist()):
        code = None if entry == layout.NONE else code_at(tables, entry, place, x.shape[1])
        if code is None:
            continue
        own = x[row].float().clone()
        stream = (own if residual is None else own + residual[row].float())[None]
        for gate, reading in code.gates.items():
            assert gates is not None
            gates[row, gate] = is_open(stream, reading)[0]
        carry = None if buffers is None or row >= len(buffers.carry) else buffers.carry[row, :, : x.shape[1]]
        change, sizes = _edit_row(stream, code.blocks, None if gates is None else gates[row][None], carry)
        x[row] = torch.where(change == 0, own, own + change).to(x.dtype)
        if norms is not None:
            # Of a split block all parts have its number.
            numbers = [i if isinstance(b, Inject) else b.intervention for i, b in enumerate(code.blocks)]
            parts = torch.tensor(numbers, dtype=torch.long)
            norms[row, parts] = torch.zeros(len(norms[row])).index_add_(0, parts, sizes**2).sqrt()[parts]
        if squares is not None:
            squares[row] = (stream * stream).sum()
        for source in code.sources:
            assert carry is not None
            before = 0 if source.first else carry[source.slot]
            carry[source.slot] = before + source.weight * stream[0]
        after = x[row].float() if residual is None else x[row].float() + residual[row].float()
        for column, reading in code.probes.items():
            assert buffers is not None
            buffers.values[row, column] = read(after[None], reading)[0]


def _edit_row(
    stream: Tensor, blocks: Sequence[Block | Inject], gates: Tensor | None, carry: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The change [d] of one row [1, d], and the size of each block's."""
    plain = [block for block in blocks if isinstance(block, Block)]
    sizes = stream.new_zeros(1, len(blocks))
    if len(plain) == len(blocks):
        return edit_rows(stream, Program(tuple(plain), stream.shape[1]), gates, sizes)[0], sizes[0]
    x = stream.clone()
    for i, block in enumerate(blocks):
        if isinstance(block, Inject):
            assert carry is not None
            scale = 1.0 if block.gate < 0 or gates is None else gates[0, block.gate]
            change = scale * inject(x, carry[block.slot][None])
            sizes[0, i] = change.norm()
        else:
            change = edit_rows(x, Program((block,), x.shape[1]), gates, sizes[:, i : i + 1])
        x = x + change
    return (x - stream)[0], sizes[0]


def edit_and_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    entries: Tensor,
    tables: Tables,
    place: int,
    *,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    form: Form = DEFINED,
) -> None:
    """The same with the norm that follows."""
    edit(x, residual, entries, tables, place, norms=norms, squares=squares)
    add_and_norm(x, residual, weight, eps, form)


def _directions(tables: Tables, words: Tensor, columns: bool, width: int) -> Rows:
    if columns:
        return Rows(width, columns=words.long())
    units = [int(w) * layout.UNIT for w in words]
    return Rows(width, dense=torch.stack([tables.vectors[a : a + width] for a in units]))
