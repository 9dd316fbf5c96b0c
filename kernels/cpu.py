"""Edits of many rows with different programs at one place, on the CPU, in one call.

A :class:`Table` is built once when the batch's layout changes and applied at every step. It does what
:func:`steersman.kernels.reference.edit` does to each group of rows, by the compiled kernel
``cpu_edit.cpp`` where there is a C++ compiler and by the reference where there is none.

The kernel runs the blocks one after another on a row that stays in the first-level cache, where a
second read costs next to nothing. That needs no Gram matrices, whose cost grows with the square of a
program's rows, and makes no difference of large numbers where a norm is asked for.

Not supported: programs whose dots or norms are partial sums over tensor-parallel ranks, and those that encode, see
:meth:`Table.supports`.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steersman.kernels.cpu_library import Library, backend, library
from steersman.kernels.program import Block, Program, Rows
from steersman.kernels.reference import edit

BRIEF = 2**18  # multiply-adds of a call of some ten microseconds
PARALLEL = 2**21  # multiply-adds from which waking a second thread pays


class Table:
    """Which rows of one place's activations get which program.

    The table's rows are those of the groups one after another; a row of the activations may occur once.
    """

    def __init__(self, groups: Sequence[tuple[Program, Tensor]], width: int, loaded: Library | None) -> None:
        self.groups = tuple(groups)
        self.width = width
        counts = [rows.shape[0] for _, rows in groups]
        self.rows = sum(counts)
        self.max_blocks = max((len(p.blocks) for p, _ in groups), default=0)  # columns of `norms`
        self.reads = any(p.constant is None for p, _ in groups)  # whether any edit depends on the stream
        self.gates = max((p.gates for p, _ in groups), default=0)  # columns of `gates`, 0 when none is needed
        for program, rows in groups:
            if program.width != width:
                raise ValueError(f"a program of width {program.width} in a table of width {width}")
            if program.encodes:
                raise ValueError("a program that encodes is for the reference")
            if rows.dtype != torch.int64 or not rows.is_contiguous() or not rows.is_cpu:
                raise ValueError("a group's rows must be contiguous int64 on the CPU")
        self._loaded = loaded
        if loaded is not None:
            self._fill(loaded, counts)

    @classmethod
    def build(cls, groups: Sequence[tuple[Program, Tensor]], width: int, asked: str | None = None) -> Table:
        """The table of groups (program, rows [n] int64); ``asked`` overrides ``STEERSMAN_CPU_KERNEL``."""
        return cls(groups, width, library(asked or backend()))

    @staticmethod
    def supports(program: Program, sharded: bool = False, measured: bool = False) -> bool:
        """Whether a table can run the program: one rank's shard only where it reads no dot and no norm."""
        if program.encodes:
            return False
        return not sharded or ((program.is_columnar or program.constant is not None) and not measured)

    def apply(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gates: Tensor | None = None,
        norms: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> None:
        """Edits the table's rows of ``x`` in place, each rounded once; no other row is touched.

        x: [T, d] float32, bfloat16 or float16 on the CPU, each row contiguous.
        residual: the same shape and dtype; the stream that programs read is x + residual.
        gates: [rows, n_gates] float32, 0 or 1, for the table's rows; needed when ``gates`` is not 0.
        norms: [rows, max_blocks] float32, filled with ‖Δ‖ of each block; past a program's blocks left as it is.
        squares: [rows] float32, filled with ‖stream‖² before the edit.
        """
        if self.gates and gates is None:
            raise ValueError("the table has a gated block, so gates must be given")
        if self._loaded is None:
            self._apply_torch(x, residual, gates, norms, squares)
            return
        n, width = x.shape
        stride, step = x.stride()
        function = self._functions.get(x.dtype)
        if function is None or width != self.width or (step != 1 and width > 1) or not x.is_cpu:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} with strides {x.stride()}, the table's width {self.width}"
            )
        other, other_stride = None, 0
        if residual is not None:
            other_stride, step = residual.stride()
            if residual.dtype != x.dtype or residual.shape != x.shape or (step != 1 and width > 1):
                raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x {x.dtype} {tuple(x.shape)}")
            other = residual.data_ptr()
        if gates is None and norms is None and squares is None:
            failed = function(self._address, x.data_ptr(), n, stride, other, other_stride, None, 0, None, 0, None)
        else:
            failed = function(
                *(self._address, x.data_ptr(), n, stride, other, other_stride),
                *pointer(gates, "gates", self.rows, self.gates),
                *pointer(norms, "norms", self.rows, self.max_blocks),
                pointer(squares, "squares", self.rows)[0],
            )
        if failed:
            raise IndexError(f"the table names a row past the {n} of x")

    # -- parts ------------------------------------------------------------------------------------

    def _fill(self, loaded: Library, counts: Sequence[int]) -> None:
        compiled = [_compile(program) for program, _ in self.groups]
        cost = sum(c.cost * count for c, count in zip(compiled, counts, strict=True))
        threads = torch.get_num_threads() if cost > PARALLEL and loaded.parallel else 1
        flat = array("q")
        for c, (_, rows), count in zip(compiled, self.groups, counts, strict=True):
            flat.extend((c.address, rows.data_ptr(), count))
        self._flat = flat
        self._fields = array("q", (
            flat.buffer_info()[0], len(compiled), self.rows, max((c.scratch for c in compiled), default=0),
            threads, loaded.parallel,
        ))  # fmt: skip
        self._address = self._fields.buffer_info()[0]
        self._functions = loaded.brief if cost < BRIEF else loaded.long

    def _apply_torch(
        self, x: Tensor, residual: Tensor | None, gates: Tensor | None, norms: Tensor | None, squares: Tensor | None
    ) -> None:
        start = 0
        for program, rows in self.groups:
            mine = slice(start, start + len(rows))
            start += len(rows)
            own = x[rows].float()
            constant = program.constant
            if constant is not None and norms is None and squares is None:
                x[rows] = (own + constant).to(x.dtype)
                continue
            stream = own if residual is None else own + residual[rows].float()
            sizes = None if norms is None else norms[mine, : len(program.blocks)]
            delta = edit(stream, program, None if gates is None else gates[mine], sizes)
            x[rows] = (own + (delta if constant is None else constant)).to(x.dtype)
            if squares is not None:
                squares[mine] = (stream * stream).sum(-1)


class _Rows(ctypes.Structure):
    _fields_ = (("dense", ctypes.c_void_p), ("columns", ctypes.c_void_p))


class _Block(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("write", _Rows),
        ("read", _Rows),
        *((name, ctypes.c_void_p) for name in ("bias", "threshold", "gain", "offset", "low", "high")),
        *((name, ctypes.c_int64) for name in ("relative", "only_if_active", "preserve_norm", "gate")),
    )


class _Program(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        ("constant", ctypes.c_void_p),
        ("constant_norms", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("n_columns", ctypes.c_int64),
        ("n_blocks", ctypes.c_int64),
        ("blocks", ctypes.POINTER(_Block)),
    )


class _Compiled:
    """A program as the kernel reads it, with the tensors that it points into."""

    def __init__(self, program: Program) -> None:
        self._kept: list[Tensor] = []
        blocks, width, columns = program.blocks, program.width, None
        constant, norms = program.constant, None
        if constant is not None:
            norms = torch.stack([b.constant.norm() for b in blocks]) if blocks else torch.zeros(0)
        elif program.is_columnar:
            columns, blocks = _compact(blocks)
            width = len(columns)
        self._blocks = (_Block * len(blocks))(*(self._block(b) for b in blocks))
        largest = max((b.count for b in blocks), default=0)
        self._program = _Program(
            width=program.width,
            constant=self._keep(constant),
            constant_norms=self._keep(norms),
            columns=None if columns is None else self._keep(columns, torch.int64),
            n_columns=width if columns is not None else 0,
            n_blocks=len(blocks),
            blocks=self._blocks,
        )
        self.address = ctypes.addressof(self._program)
        self.scratch = 4 * (width + 16) + largest  # floats
        vectors = sum(sum(r.count for r in (b.write, b.read) if r and r.dense is not None) for b in blocks)
        self.cost = width * (2 + (0 if constant is not None else vectors))  # multiply-adds of one row, roughly

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().to("cpu", dtype).contiguous()
        self._kept.append(kept)
        return int(kept.data_ptr())

    def _rows(self, rows: Rows | None) -> _Rows:
        if rows is None:
            return _Rows(None, None)
        return _Rows(self._keep(rows.dense), self._keep(rows.columns, torch.int64))

    def _block(self, b: Block) -> _Block:
        numbers = (self._keep(v) for v in (b.bias, b.threshold, b.gain, b.offset, b.low, b.high))
        flags = (b.relative, b.only_if_active, b.preserve_norm, b.gate)
        return _Block(b.count, self._rows(b.write), self._rows(b.read), *numbers, *map(int, flags))


def _compile(program: Program) -> _Compiled:
    """The program's compiled form, made once and kept with it."""
    found: Any = program.__dict__.get("_cpu")
    if found is None:
        found = program.__dict__["_cpu"] = _Compiled(program)
    assert isinstance(found, _Compiled)
    return found


def _compact(blocks: Sequence[Block]) -> tuple[Tensor, tuple[Block, ...]]:
    """The columns that columnar blocks touch, in order, and the blocks with columns counted among those."""
    named = [r.columns for b in blocks for r in (b.write, b.read) if r is not None and r.columns is not None]
    columns = torch.unique(torch.cat(named)) if named else torch.zeros(0, dtype=torch.int64)

    def local(rows: Rows) -> Rows:
        assert rows.columns is not None
        return Rows(len(columns), columns=torch.searchsorted(columns, rows.columns))

    return columns, tuple(replace(b, write=local(b.write), read=local(b.read) if b.read else None) for b in blocks)


def pointer(tensor: Tensor | None, name: str, rows: int, columns: int = 0) -> tuple[int | None, int]:
    """The address and row stride of an array with one row for each of the table's."""
    if tensor is None:
        return None, 0
    if tensor.dim() == 1:
        wide = tensor.stride(0) == 1 or rows <= 1
    else:
        wide = tensor.shape[1] >= columns and (tensor.stride(1) == 1 or tensor.shape[1] <= 1)
    if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.shape[0] != rows or not wide:
        raise ValueError(f"{name} must be float32 with one row for each of the table's {rows}")
    return tensor.data_ptr(), tensor.stride(0)
