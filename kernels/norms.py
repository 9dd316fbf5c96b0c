"""The residual add and the RMSNorm that follow an edit, in plain torch, and where each way to compute them rounds.

With x the edited activation, in its own dtype, and z = x + residual in float32::

    residual' = round(z)
    x'        = round(q·w),   q = z / √(mean z² + eps)

That is one formula, and models compute it with different roundings in between, which decide the last bits: a
:class:`Form` says which. A kernel's ``edit_and_norm`` has all of them; :func:`add_and_norm` is the truth.
"""

from __future__ import annotations

from enum import IntFlag

import torch
from torch import Tensor


class Form(IntFlag):
    """Where a norm differs from the formula above."""

    ONE_MORE = 1  # Gemma's: it multiplies by 1 + weight
    ROUNDED_SUM = 2  # z is rounded to x's dtype before anything is made of it
    ROUNDED_QUOTIENT = 4  # q is, before it is multiplied


DEFINED = Form.ROUNDED_QUOTIENT
"""vLLM's ``ir.ops.fused_add_rms_norm`` for a weight in x's dtype."""


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, form: Form = DEFINED) -> None:
    """Adds and normalises every row in place. x, residual: [n, d] of one dtype; weight: [d] or None: all one."""
    z = x.float() + residual.float()
    residual.copy_(z)
    if Form.ROUNDED_SUM in form:
        z = residual.float()
    q = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        q = q.to(x.dtype).float() if Form.ROUNDED_QUOTIENT in form else q
        q = q * (weight.float() + 1 if Form.ONE_MORE in form else weight.float())
    x.copy_(q)
