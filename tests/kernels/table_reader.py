"""The tables as plain torch reads them: an independent reading of the layout that kernels/tables.py documents."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.kernels import tables as layout
from steersman.kernels.program import Block, Program, Reading, Rows
from steersman.kernels.reference import edit as edit_rows
from steersman.kernels.reference import is_open
from steersman.kernels.tables import Tables


def program_at(tables: Tables, entry: int, place: int, width: int) -> tuple[dict[int, Reading], Program] | None:
    """The gates that are read there, and the program."""
    at = int(tables.starts[entry, place])
    if at == 0:
        return None
    count, at = int(tables.code[at]), at + layout.PROGRAM_WORDS
    blocks: list[Block] = []
    gates: dict[int, Reading] = {}
    for _ in range(count):
        flags, rows, gate, number = (int(w) for w in tables.code[at : at + layout.BLOCK_WORDS])
        at += layout.BLOCK_WORDS
        words = tables.code[at : at + rows * layout.ROW_WORDS].view(rows, layout.ROW_WORDS)
        at += rows * layout.ROW_WORDS
        scalars = words[:, 2:].contiguous().view(torch.float32)
        if flags & layout.DECIDES:
            assert (rows, number, words[0, 1], blocks) == (1, layout.NONE, layout.NONE, [])
            bias, threshold, _, _, above, below = (None if s != s else s for s in scalars[0].tolist())
            direction = _directions(tables, words[:, 0], False, width).to_dense()[0]
            gates[gate] = Reading(direction, bool(flags & layout.COSINE), bias or 0.0, threshold, above, below)
            continue
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
    return gates, Program(tuple(blocks), width)


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
        found = None if entry == layout.NONE else program_at(tables, entry, place, x.shape[1])
        if found is None:
            continue
        readings, program = found
        own = x[row].float().clone()
        stream = (own if residual is None else own + residual[row].float())[None]
        for gate, reading in readings.items():
            assert gates is not None
            gates[row, gate] = is_open(stream, reading)[0]
        sizes = stream.new_zeros(1, len(program.blocks))
        x[row] = (own + edit_rows(stream, program, None if gates is None else gates[row][None], sizes)[0]).to(x.dtype)
        if norms is not None:
            parts = torch.tensor(
                [b.intervention for b in program.blocks], dtype=torch.long
            )  # of a split block all have its number
            norms[row, parts] = torch.zeros(len(norms[row])).index_add_(0, parts, sizes[0] ** 2).sqrt()[parts]
        if squares is not None:
            squares[row] = (stream * stream).sum()


def _directions(tables: Tables, words: Tensor, columns: bool, width: int) -> Rows:
    if columns:
        return Rows(width, columns=words.long())
    units = [int(w) * layout.UNIT for w in words]
    return Rows(width, dense=torch.stack([tables.vectors[a : a + width] for a in units]))
