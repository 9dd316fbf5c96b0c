"""Edits of all rows of a batch, whatever program each has, in one launch of the CUDA C++ kernel ``cuda/edit.cu``.

:func:`edit` does what :func:`steersman.kernels.reference.edit` does to each row, as :mod:`steersman.kernels.tables`
lays programs out; :func:`edit_and_norm` does that and what a layer does next, in the place of vLLM's
``fused_add_rms_norm``. Both run on the current stream and can be captured in a CUDA graph once :func:`prepare` has
been called. A graph keeps addresses, shapes and ``place``; what lies in ``tables``, ``entries`` and ``gates`` is read
at every replay, so ``gates`` and ``norms`` must be wide enough for all that will be in the tables then (a gate past
the last column counts as closed, a norm past it is not written).

A row takes 4 bytes of a block's shared memory for each of its elements, and the kernel 7 KiB beside it: that bounds
the width, to 23 thousand elements where the GPU gives a block 99 KiB and 56 thousand where it gives 227. A wider row
is a ValueError.
"""

from __future__ import annotations

import struct
from typing import Protocol

import torch
from torch import Tensor

from steersman.kernels.arguments import check, check_written
from steersman.kernels.cuda_library import library
from steersman.kernels.norms import DEFINED, Form
from steersman.kernels.tables import Tables

GROUP = 8  # elements of a row that one thread owns side by side
MAX_THREADS = 256
ROWS_PER_PROCESSOR = 32  # blocks in a grid, so that one that has nothing to do makes room for the next
WIDE = 16  # bytes that a thread can read at once, if they are aligned
ARGUMENTS = struct.Struct("@12P4q12if")  # `Arguments` in edit.cu
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Launcher(Protocol):
    """:class:`steersman.kernels.cuda_library.Library`, or what stands in for it."""

    processors: int
    max_shared: int  # bytes, of one block

    def launch(self, name: str, grid: int, threads: int, shared: int, arguments: bytes) -> None: ...


def prepare(device: torch.device, width: int = 1) -> None:
    """Compiles and loads the kernels for ``device``. Raises CudaError, and ValueError for rows that are too wide."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _shared(library(device), width)


def edit(
    x: Tensor,
    residual: Tensor | None,
    entries: Tensor,
    tables: Tables,
    place: int,
    gates: Tensor | None = None,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """Gives row i of ``x`` the program of ``entries[i]`` at ``place``, in place; writes nothing else.

    x: [T, d] float32, bfloat16 or float16, each row contiguous, as wide as the programs at ``place``.
    residual: the same shape and dtype; the stream that programs read is x + residual.
    entries: [T or more] int32, entries of ``tables``; -1: the row stays as it is.
    gates: [T or more, ``tables.gates`` or more] float32, 0 or 1; needed where a block has one, or reads one. None:
        those of the tables' buffers, where what is carried to injections and what probes read is kept as well.
    norms: [T or more, ``tables.blocks`` or more] float32; of rows with a program, column b is filled with ‖Δ‖ of its
        block b. Others are left as they are.
    squares: [T or more] float32; of rows with a program, filled with ‖stream‖² before the edit.
    """
    _launch("edit", x, residual, None, 0.0, DEFINED, entries, tables, place, gates, norms, squares)


def edit_and_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    entries: Tensor,
    tables: Tables,
    place: int,
    gates: Tensor | None = None,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    form: Form = DEFINED,
) -> None:
    """Edits as :func:`edit` does, then does :func:`steersman.kernels.norms.add_and_norm` to every row, edited or not.

    All in place, and with the bits of these two one after the other, but for the sum of squares, which each kernel
    adds up in an order of its own.

    weight: [d] in x's dtype, or None for one without.
    form: which roundings the norm has. The other arguments are those of :func:`edit`.
    """
    check_written(residual)
    _launch("edit_and_norm", x, residual, weight, eps, form, entries, tables, place, gates, norms, squares)


# -- parts ----------------------------------------------------------------------------------------


def _launch(
    kind: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    form: Form,
    entries: Tensor,
    tables: Tables,
    place: int,
    gates: Tensor | None,
    norms: Tensor | None,
    squares: Tensor | None,
) -> None:
    buffers = tables.buffers
    if gates is None and buffers is not None:
        gates = buffers.gates
    check(x, residual, weight, entries, tables, place, gates, norms, squares)
    carry, values = (None, None) if buffers is None else (buffers.carry, buffers.values)
    rows, width = x.shape
    stride, residual_stride = x.stride(0), 0 if residual is None else residual.stride(0)
    on: Launcher = library(x.device)
    shared = _shared(on, width)
    if not rows:
        return
    wide = width % GROUP == 0 and _is_wide(x, stride)
    wide = wide and (residual is None or _is_wide(residual, residual_stride))
    wide = wide and (weight is None or _is_wide(weight, 0))
    pointers = (
        x, residual, weight, entries, tables.starts, tables.code, tables.vectors, gates, norms, squares, carry, values,
    )  # fmt: skip
    arguments = ARGUMENTS.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
        *(stride, residual_stride),
        *(0 if gates is None else gates.stride(0), 0 if norms is None else norms.stride(0)),
        *(rows, width, place, tables.starts.shape[1]),
        *(0 if gates is None else gates.shape[1], 0 if norms is None else norms.shape[1]),
        *((0, 0, 0) if carry is None else carry.shape),
        *((0, 0) if values is None else values.shape),
        *(int(form), eps),
    )
    threads = min(MAX_THREADS, -(-width // (32 * GROUP)) * 32)
    grid = min(rows, ROWS_PER_PROCESSOR * on.processors)
    name = f"{kind}_{NAMES[x.dtype]}"
    on.launch(f"{name}_wide" if wide else name, grid, threads, shared, arguments)


def _shared(on: Launcher, width: int) -> int:
    """Bytes of shared memory that a row takes."""
    shared = 4 * GROUP * -(-width // GROUP)
    if shared > on.max_shared:
        most = on.max_shared // (4 * GROUP) * GROUP
        raise ValueError(f"x is {width} wide; a kernel on this GPU edits rows of up to {most} elements")
    return shared


def _is_wide(tensor: Tensor, stride: int) -> bool:
    """Whether each row, ``stride`` elements after the last, can be read 16 bytes at a time."""
    return bool(tensor.data_ptr() % WIDE == 0 and stride * tensor.element_size() % WIDE == 0)
