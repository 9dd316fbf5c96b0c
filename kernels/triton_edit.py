"""Edits of all rows of a batch, whatever program each has, in one launch of a Triton kernel.

:func:`edit` does what :func:`steersman.kernels.reference.edit` does to each row, as :mod:`steersman.kernels.tables`
lays programs out; :func:`edit_and_norm` does that and what a layer does next, in the place of vLLM's
``fused_add_rms_norm``. Nothing here waits for the device, allocates or depends on which program a row has, so both can
be captured in a CUDA graph, after a first launch for the width, the dtype and the optional arguments, which compiles.
A graph keeps addresses, shapes and ``place``; what lies in ``tables``, ``entries`` and ``gates`` is read at every
replay, so ``gates`` and ``norms`` must be wide enough for all that will be in the tables then (a gate past the last
column counts as closed, a norm past it is not written).

Triton is imported by :func:`prepare` or at the first launch; :mod:`steersman.kernels.triton_device` holds the device
code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from steersman.kernels.arguments import check, check_written
from steersman.kernels.norms import DEFINED, Form
from steersman.kernels.program import Program
from steersman.kernels.tables import Tables

LANES_PER_WARP = 256  # 8 elements a thread
MAX_WARPS = 32  # a GPU's; the widest rows have more elements a thread, and spill


def prepare(device: torch.device, width: int = 4) -> None:
    """Edits a row on ``device``. Raises what Triton does where it does not work, and RuntimeError on a CPU."""
    if device.type == "cpu" and not _device().triton.knobs.runtime.interpret:
        raise RuntimeError("Triton runs on a CPU only under TRITON_INTERPRET=1, set before it is imported")
    tables = Tables(1, device, entries=1, words=8, floats=4)
    entries = torch.full((1,), tables.add({0: Program((), width)}), dtype=torch.int32, device=device)
    edit(torch.zeros(1, width, device=device), None, entries, tables, 0)


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

    x: [T, d] float32, bfloat16 or float16, each row contiguous, as wide as the programs at ``place``. A row becomes
        round(x + (stream' - stream)), all else in float32.
    residual: the same shape and dtype; the stream that programs read is x + residual.
    entries: [T or more] int32, entries of ``tables``; -1: the row stays as it is.
    gates: [T or more, ``tables.gates`` or more] float32, 0 or 1; needed where a block has one, or reads one. None:
        those of the tables' buffers, where what is carried to injections and what probes read is kept as well.
    norms: [T or more, ``tables.blocks`` or more] float32; of rows with a program, column b is filled with ‖Δ‖ of its
        block b. Others are left as they are.
    squares: [T or more] float32; of rows with a program, filled with ‖stream‖² before the edit.
    """
    _launch(x, residual, None, entries, tables, place, gates, norms, squares, 0.0, False, DEFINED)


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
    _launch(x, residual, weight, entries, tables, place, gates, norms, squares, eps, True, form)


# -- parts ----------------------------------------------------------------------------------------


@functools.cache
def _device() -> Any:
    from steersman.kernels import triton_device

    return triton_device


@functools.cache
def shape(width: int) -> tuple[int, int]:
    """(lanes, warps) of the Triton program that edits one row."""
    lanes = 1 << (width - 1).bit_length()
    return lanes, min(max(lanes // LANES_PER_WARP, 4), MAX_WARPS)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    entries: Tensor,
    tables: Tables,
    place: int,
    gates: Tensor | None,
    norms: Tensor | None,
    squares: Tensor | None,
    eps: float,
    norm: bool,
    form: Form,
) -> None:
    buffers = tables.buffers
    if gates is None and buffers is not None:
        gates = buffers.gates
    check(x, residual, weight, entries, tables, place, gates, norms, squares)
    carry, values = (None, None) if buffers is None else (buffers.carry, buffers.values)
    rows, width = x.shape
    if not rows:
        return
    lanes, warps = shape(width)
    _device().edit[(rows,)](
        *(x, residual, weight, entries, tables.starts, tables.code, tables.vectors),
        *(gates, norms, squares, carry, values),
        *(place, tables.starts.shape[1], x.stride(0), 0 if residual is None else residual.stride(0)),
        *((0, 0) if gates is None else (gates.stride(0), gates.shape[1])),
        *((0, 0) if norms is None else (norms.stride(0), norms.shape[1])),
        *((0, 0, 0) if carry is None else carry.shape),
        *((0, 0) if values is None else values.shape),
        *(eps, norm, int(form), width, lanes),
        num_warps=warps,
        enable_fp_fusion=True,  # not left to Triton, whose default depends on its version
    )
