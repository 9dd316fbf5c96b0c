"""Sums of products that come out the same in any order, and many products at once with a bound on their error.

A matrix product adds up in an order that depends on how many rows there are, on the library and on the device, and a
float's last bits depend on that order. Here a number x becomes two, high + low, integers of at most b bits times a
power of two that the largest number of its row fixes. With 2·b + ⌈log₂ d⌉ ≤ 53, a sum of d products of such integers is
exact in float64 at every step, so that no order of addition changes a bit: a row's result is its own, whatever it is
computed beside. What is cut off x is at most 2^(−2·b) of the row's largest number; b is 21 for d = 576, 18 for 2^16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

PART: Final = 4096  # rows that are float32 at once
_LOST: Final = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}
"""What a product may lose by `torch.set_float32_matmul_precision`, beside ‖x‖·‖y‖: its factors in TF32 or bfloat16."""


def dots(x: Tensor, rows: Tensor) -> Tensor:
    """x·rowsᵀ, [n, k] float64, for x [n, d] and rows [k, d] of at most float32's precision."""
    (a, b), (c, d) = _cut(x), _cut(rows)
    return a @ c.T + (a @ d.T + b @ c.T) + b @ d.T


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """[n] float64, each row of x [n, d] times that of y [n, d]."""
    (a, b), (c, d) = _cut(x), _cut(y)
    return (a * c).sum(-1) + ((a * d).sum(-1) + (b * c).sum(-1)) + (b * d).sum(-1)


def _cut(x: Tensor) -> tuple[Tensor, Tensor]:
    """high and low, [n, d] float64."""
    bits = (53 - (x.shape[1] - 1).bit_length()) // 2
    x = x.double()
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(2.0**-200)
    exponent = (largest.view(torch.int64) >> 52) - 1023  # 2^exponent ≤ largest < 2^(exponent + 1)
    unit = ((exponent + 1 - bits + 1023) << 52).view(torch.float64)
    high = (x / unit).round() * unit
    unit = unit * 2.0**-bits
    return high, ((x - high) / unit).round() * unit


class Products:
    """Products with many ``rows`` [m, d], of any float dtype and on any device."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @cached_property
    def largest(self) -> float:
        """The largest norm of a row."""
        parts = (self.rows[at : at + PART].double() for at in range(0, len(self.rows), PART))
        return max(float(part.norm(dim=1).max()) for part in parts)

    def fast(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x·rowsᵀ + bias [n, m] float32, for x [n, d] float32; and [n] float64, how far each is at most from `dots`.

        The bound is d·ε·‖x‖·‖row‖, twice what any order of addition can come to.
        """
        out = torch.cat([x @ self.rows[at : at + PART].float().T for at in range(0, len(self.rows), PART)], dim=1)
        eps = torch.finfo(torch.float32).eps
        size = self.largest * x.double().norm(dim=1)
        bound = ((x.shape[1] + 4) * eps + _LOST[torch.get_float32_matmul_precision()]) * size
        if bias is not None:
            out += bias.float()
            bound += eps * float(bias.abs().max())
        return out, bound

    def dots(self, x: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
        """[n, k] float64, with these rows only, and exact."""
        chosen = torch.as_tensor(rows, device=self.rows.device)
        return torch.cat([dots(x, self.rows[part]) for part in chosen.split(PART)], dim=1)
