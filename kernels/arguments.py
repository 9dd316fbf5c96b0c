"""What a kernel over :mod:`steersman.kernels.tables` may be launched with, whichever kernel it is."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.kernels.tables import Tables

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PADDING = 8  # a row of what is carried is a multiple of so many floats


def check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    entries: Tensor,
    tables: Tables,
    place: int,
    gates: Tensor | None,
    norms: Tensor | None,
    squares: Tensor | None,
) -> None:
    """What each must be is said at a kernel's ``edit``. Raises ValueError, and IndexError for a place not there."""
    if x.dtype not in FLOATS or x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; must be [rows, width] float32, bfloat16 or float16")
    rows, width = x.shape
    _rows("x", x, width)
    if x.stride(0) < width and rows > 1:
        raise ValueError(f"x is written, and its rows overlap: strides {x.stride()}")
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x {x.dtype} {tuple(x.shape)}")
        _rows("residual", residual, width)
    if weight is not None and (weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous()):
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}, x {x.dtype} {tuple(x.shape)}")
    places = tables.starts.shape[1]
    if not 0 <= place < places:
        raise IndexError(f"there is no place {place}, only 0 to {places - 1}")
    if entries.dtype != torch.int32 or entries.dim() != 1 or len(entries) < rows or not entries.is_contiguous():
        raise ValueError(f"entries is {entries.dtype} {tuple(entries.shape)}; must be int32, one for each of {rows}")
    carry = None if tables.buffers is None else tables.buffers.carry
    if carry is not None and (
        carry.dtype != torch.float32 or carry.dim() != 3 or carry.shape[2] % PADDING or not carry.is_contiguous()
    ):
        raise ValueError(f"carry is {carry.dtype} {tuple(carry.shape)}; must be float32 [rows, slots, 8 n]")
    values = None if tables.buffers is None else tables.buffers.values
    if values is not None and (values.dtype != torch.float32 or values.dim() != 2 or not values.is_contiguous()):
        raise ValueError(f"values is {values.dtype} {tuple(values.shape)}; must be float32 [rows, columns]")
    if gates is None and tables.gates:
        raise ValueError("a program in the tables has a gated block, so gates must be given")
    _floats("gates", gates, rows, tables.gates)
    _floats("norms", norms, rows, tables.blocks)
    _floats("squares", squares, rows, None)
    for name, other in (
        ("residual", residual), ("weight", weight), ("entries", entries), ("the tables", tables.starts),
        ("gates", gates), ("norms", norms), ("squares", squares), ("carry", carry),
        ("values", values),
    ):  # fmt: skip
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} on {other.device}, x on {x.device}")


def check_written(residual: Tensor) -> None:
    """Raises ValueError where rows that a kernel writes share memory."""
    if len(residual) > 1 and residual.stride(0) < residual.shape[-1]:
        raise ValueError(f"residual is written, and its rows overlap: strides {residual.stride()}")


def _rows(name: str, tensor: Tensor, width: int) -> None:
    if tensor.stride(1) != 1 and width > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its rows must be contiguous")


def _floats(name: str, array: Tensor | None, rows: int, columns: int | None) -> None:
    """Of an array with a row for each of x's; ``columns`` where it has two dimensions."""
    if array is None:
        return
    if (
        array.dtype != torch.float32
        or array.dim() != (1 if columns is None else 2)
        or len(array) < rows
        or (array.shape[-1] > 1 and array.stride(-1) != 1)
        or (columns is not None and array.shape[1] < columns)
    ):
        wanted = f"[{rows}]" if columns is None else f"[{rows}, {columns}]"
        raise ValueError(f"{name} is {array.dtype} {tuple(array.shape)}; must be float32 {wanted} or larger")
