"""From one intervention to blocks of the general form (:mod:`steersman.kernels.program`), op by op.

Each function takes directions already looked up and checked, v of [d] or V of [k, d] in float32, and
returns one block; formulae are section by section those of the request's documentation in
:mod:`steersman.steering.spec`. Bases and norms are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final

import torch
from torch import Tensor

from steersman.kernels.program import Block, Encode, Rows
from steersman.steering.dictionaries import Reads
from steersman.steering.errors import InvalidRequest, NonFinite, OutOfRange
from steersman.steering.plan import Injection, constant_block, linear_block
from steersman.steering.recipes import COMPONENTS, Recipe

MAX_WEIGHT: Final = 1e6  # of an injected activation: far beyond any use, and float32 sums stay finite


def unit(v: Tensor) -> Tensor:
    """v/‖v‖ as [1, d]; a vector without a direction is an error."""
    norm = v.double().norm()
    if not norm > 0:
        raise InvalidRequest("the vector is zero at this layer, so it has no direction")
    return (v.double() / norm).float()[None]


def orthonormal(v: Tensor) -> Tensor:
    """An orthonormal basis [r, d] of the span of the rows of v [k, d]; rows that add nothing are dropped."""
    _, s, basis = torch.linalg.svd(v.double(), full_matrices=False)
    rank = int((s > s[0] * 1e-6).sum()) if s[0] > 0 else 0
    if rank == 0:
        raise InvalidRequest("the vector is zero at this layer, so it has no direction")
    return basis[:rank].float().contiguous()


def dense(rows: Tensor) -> Rows:
    return Rows(rows.shape[1], dense=rows.contiguous())


def add(i: int, v: Tensor, scale: float, relative: bool, **flags: Any) -> Block:
    if not relative:
        vector = v.float() * scale
        if not torch.isfinite(vector).all():
            raise NonFinite("scale times the vector is beyond float32 at this layer")
        return constant_block(i, vector, **flags)
    return linear_block(i, dense(unit(v)), None, offset=scale, relative=True, **flags)


def ablate(i: int, v: Tensor, strength: float, **flags: Any) -> Block:
    basis = dense(orthonormal(v))
    return linear_block(i, basis, basis, gain=1.0 - strength, **flags)


def clamp(i: int, v: Tensor, low: float | None, high: float | None, **flags: Any) -> Block:
    basis = dense(unit(v))
    low = -math.inf if low is None else low
    return linear_block(i, basis, basis, low=low, high=math.inf if high is None else high, **flags)


def multiply(i: int, v: Tensor, factor: float, **flags: Any) -> Block:
    basis = dense(unit(v))
    return linear_block(i, basis, basis, gain=factor, **flags)


def rotate(i: int, v: Tensor, toward: Tensor, degrees: float, **flags: Any) -> Block:
    """(t1, t2) → (cos·t1 − sin·t2, sin·t1 + cos·t2) in the basis b1 = v̂, b2 = toward orthogonalised."""
    b1 = unit(v)[0].double()
    rest = toward.double() - (toward.double() @ b1) * b1
    if not rest.norm() > 1e-6 * toward.double().norm():
        raise InvalidRequest("vector and toward are parallel at this layer, so they span no plane")
    b2 = rest / rest.norm()
    # Exact at quarter turns, where cos(radians(90)) is not quite 0.
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if degrees % 90 == 0:
        cos, sin = float(round(cos)), float(round(sin))
    read = torch.stack([(cos - 1) * b1 - sin * b2, sin * b1 + (cos - 1) * b2]).float()
    return linear_block(i, dense(torch.stack([b1, b2]).float()), dense(read), gain=2.0, **flags)  # a' − a = t


def neurons(i: int, indices: Tensor, width: int, mode: str, value: float, **flags: Any) -> Block:
    columns = Rows(width, columns=indices.long())
    change = {
        "set": {"gain": 0.0, "offset": value},
        "add": {"gain": 1.0, "offset": value},
        "scale": {"gain": value},
    }[mode]
    return linear_block(i, columns, columns, **change, **flags)


def feature(
    i: int,
    write: Tensor,
    reads: Reads | None,
    mode: str,
    values: list[float],
    only_if_active: bool = False,
    relative: bool = False,
    encode: Encode | None = None,
    **flags: Any,
) -> Block:
    """x + Σ_j (a′_j − a_j)·write_j, every a_j read off the same x.

    write [k, d]. a comes of `reads`, or of `encode` where that takes more; with neither, only mode ``add`` can be done,
    which is the same whatever the activations are. `relative`: `write` is in units of ‖x‖.
    """
    value = torch.tensor(values)
    if not torch.isfinite(write * value[:, None]).all():
        raise NonFinite("value times the feature's direction is beyond float32")
    if reads is None and encode is None:
        assert (mode, only_if_active) == ("add", False), "the caller refuses what needs an activation"
        return linear_block(i, dense(write), None, offset=value, relative=relative, **flags)
    gain, offset = {
        "set": (torch.zeros_like(value), value),
        "add": (torch.ones_like(value), value),
        "scale": (value, torch.zeros_like(value)),
        "ablate": (torch.zeros_like(value), torch.zeros_like(value)),
    }[mode]
    low, high = torch.full_like(value, -math.inf), torch.full_like(value, math.inf)
    flags |= {"only_if_active": only_if_active, "relative": relative}
    if reads is None:
        zero = torch.zeros_like(value)  # a feature that is not active has t = 0
        return Block(i, dense(write), None, zero, zero, gain, offset, low, high, encode=encode, **flags)
    scalars = reads.bias, reads.threshold, gain, offset, low, high
    return Block(i, dense(write), dense(reads.direction), *scalars, **flags)


def heads_factor(i: int, heads: list[int], d_head: int, width: int, factor: float, **flags: Any) -> Block:
    indices = torch.cat([torch.arange(h * d_head, (h + 1) * d_head) for h in heads])
    return neurons(i, indices, width, "scale", factor, **flags)


def heads_add(i: int, heads: list[int], d_head: int, v: Tensor, scale: float, **flags: Any) -> Block:
    """z_h + scale·v_h: v is [width], its slices of other heads are left out."""
    chosen = torch.zeros(len(v))
    for h in heads:
        chosen[h * d_head : (h + 1) * d_head] = v[h * d_head : (h + 1) * d_head].float()
    return add(i, chosen, scale, False, **flags)


def affine(i: int, r: Tensor, a: Tensor, b: Tensor, strength: float, **flags: Any) -> Block:
    """x + strength·Rᵀ(Ax + b − Rx) for R, A [k, d] and b [k]."""
    read = dense((a.double() - r.double()).float())
    return linear_block(i, dense(r.float() * strength), read, bias=b, gain=2.0, **flags)  # a' − a = t + b


def patch(i: int, row: Tensor, basis: Tensor | None, **flags: Any) -> Block:
    """x replaced by ``row`` [d], or x + VᵀV(row − x) for an orthonormal basis V of the rows of ``basis`` [k, d]."""
    rows = Rows(len(row), columns=torch.arange(len(row))) if basis is None else dense(orthonormal(basis))
    offset = row if basis is None else (rows.to_dense().double() @ row.double()).float()
    return linear_block(i, rows, rows, gain=0.0, offset=offset, **flags)


def inject(i: int, recipe: Recipe, layers: Collection[int], scale: float, gate: int = -1) -> list[Injection]:
    """x + Σ_k scale·λ·RR_k·x_k rescaled to ‖x‖, at those of the recipe's targets that are among ``layers``."""
    out = []
    for name, site in COMPONENTS.items():
        part = recipe.component(name)
        targets = tuple(layer for layer in part.receiving if layer in layers)
        sources = tuple((k, scale * part.strength * part.rates[k]) for k in part.sources if targets and k < targets[-1])
        for layer, weight in sources:
            if not abs(weight) <= MAX_WEIGHT:
                raise OutOfRange(f"scale·λ·RR is {weight:.3g} for layer {layer}'s {site.value}; at most {MAX_WEIGHT:g}")
        if targets:
            out.append(Injection(i, site, sources, targets, gate))
    return out
