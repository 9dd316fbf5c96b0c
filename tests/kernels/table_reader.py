"""The tables as plain torch reads them: an independent reading of the layout that kernels/tables.py documents."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.kernels import tables as layout
from steersman.kernels.norms import DEFINED, Form, add_and_norm
from steersman.kernels.program import Block, Program, Rows
from steersman.kernels.reference import edit as edit_rows
from steersman.kernels.tables import Tables


def program_at(tables: Tables, entry: int, place: int, width: int) -> Program | None:
    at = int(tables.starts[entry, place])
    if at == 0:
        return None
    count, at = int(tables.code[at]), at + layout.PROGRAM_WORDS
    blocks = []
    for _ in range(count):
        flags, rows, gate, number = (int(w) for w in tables.code[at : at + layout.BLOCK_WORDS])
        at += layout.BLOCK_WORDS
        words = tables.code[at : at + rows * layout.ROW_WORDS].view(rows, layout.ROW_WORDS)
        at += rows * layout.ROW_WORDS
        scalars = words[:, 2:].contiguous().view(torch.float32)
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
    return Program(tuple(blocks), width)


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
    for row, entry in enumerate(entries[: len(x)].tolist()):
        program = None if entry == layout.NONE else program_at(tables, entry, place, x.shape[1])
        if program is None:
            continue
        own = x[row].float().clone()
        stream = (own if residual is None else own + residual[row].float())[None]
        sizes = stream.new_zeros(1, len(program.blocks))
        x[row] = (own + edit_rows(stream, program, None if gates is None else gates[row][None], sizes)[0]).to(x.dtype)
        if norms is not None:
            parts = torch.tensor([b.intervention for b in program.blocks])  # of a split block all have its number
            norms[row, parts] = torch.zeros(len(norms[row])).index_add_(0, parts, sizes[0] ** 2).sqrt()[parts]
        if squares is not None:
            squares[row] = (stream * stream).sum()


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
