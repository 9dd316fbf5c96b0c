"""Injection on the CPU in one call: what rows carry is added to them, and they keep their length.

What ``server/engine/chain.py`` does in some ten operations of torch, each of which costs more than the arithmetic where
a step has few rows.
"""

from __future__ import annotations

from torch import Tensor

from steersman.kernels.cpu import BRIEF, pointer
from steersman.kernels.cpu_library import backend, library


def inject(
    x: Tensor,
    rows: Tensor,
    carried: Tensor,
    gates: Tensor | None = None,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    asked: str | None = None,
) -> bool:
    """x′ = y·‖x‖/‖y‖ with y = x + carried, for the ``rows`` [n] int64 of ``x`` [T, d], in place, rounded once.

    carried: [n, d] float32. A row that carries nothing keeps its bits, as one whose gate is 0 does.
    gates: [n, 1] float32, 0 or 1. norms: [n, 1] float32, filled with ‖Δ‖; squares: [n], with ‖x‖² before.
    Asking for norms changes no bit of x, and a row's bits do not depend on the other rows.
    Returns False, and does nothing, where there is no compiled kernel or it does not take x.
    """
    loaded = library(asked or backend())
    if loaded is None or not x.is_cpu or x.dtype not in loaded.brief or (x.shape[1] > 1 and x.stride(1) != 1):
        return False
    n, d = len(rows), x.shape[1]
    if carried.shape != (n, d) or not carried.is_contiguous() or carried.element_size() != 4:
        raise ValueError(f"carried must be float32 [{n}, {d}], not {carried.dtype} {tuple(carried.shape)}")
    if rows.element_size() != 8 or not rows.is_contiguous():
        raise ValueError("rows must be contiguous int64")
    function = (loaded.inject_brief if 4 * n * d < BRIEF else loaded.inject_long)[x.dtype]
    failed = function(
        *(x.data_ptr(), len(x), x.stride(0), d, rows.data_ptr(), n, carried.data_ptr()),
        *pointer(gates, "gates", n, 1),
        *pointer(norms, "norms", n, 1),
        pointer(squares, "squares", n)[0],
    )
    if failed:
        raise IndexError(f"a row is past the {len(x)} of x")
    return True
