"""What each op does to one site's activations, written as its formula says, in float32.

x is [T, width]; every function returns x' of the same shape, for all T tokens: the caller keeps the selected ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Op = Callable[[Tensor], Tensor]  # x [T, width] -> x' [T, width]


def unit(v: Tensor) -> Tensor:
    """v/‖v‖ of one direction [d]."""
    if not v.norm() > 0:
        raise ValueError("a direction of length zero")
    return v / v.norm()


def add(x: Tensor, v: Tensor, scale: float, relative: bool) -> Tensor:
    """x + scale·v, or x + scale·‖x‖·v̂."""
    return x + scale * x.norm(dim=-1, keepdim=True) * unit(v) if relative else x + scale * v


def ablate(x: Tensor, v: Tensor, strength: float) -> Tensor:
    """x − strength·V̂V̂ᵀx with V̂ an orthonormal basis of what the rows of v, [d] or [k, d], span."""
    _, s, basis = torch.linalg.svd(v.reshape(-1, v.shape[-1]).double(), full_matrices=False)
    if not s[0] > 0:
        raise ValueError("a subspace of length zero")
    basis = basis[s > 1e-6 * s[0]].float()  # [k, d], orthonormal
    return x - strength * (x @ basis.T) @ basis


def clamp(x: Tensor, v: Tensor, low: float, high: float) -> Tensor:
    """x + (c − v̂·x)v̂ with c = v̂·x bounded to [low, high]."""
    a = x @ unit(v)
    return x + (a.clamp(low, high) - a)[:, None] * unit(v)


def multiply(x: Tensor, v: Tensor, factor: float) -> Tensor:
    """x + (factor − 1)(v̂·x)v̂."""
    return x + (factor - 1) * (x @ unit(v))[:, None] * unit(v)


def rotate(x: Tensor, v: Tensor, toward: Tensor, degrees: float) -> Tensor:
    """Turn x's part in the plane of v and toward by `degrees`, from v towards toward."""
    e1 = unit(v)
    rest = toward - (toward @ e1) * e1
    if rest.norm() < 1e-6 * toward.norm():
        raise ValueError("rotate: vector and toward span no plane")
    e2 = unit(rest)
    a, b = (x @ e1)[:, None], (x @ e2)[:, None]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x - a * e1 - b * e2 + (c * a - s * b) * e1 + (s * a + c * b) * e2


def activations(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """[T, m] of a dictionary with W_enc [d, m], b_enc, b_dec: the encode of a JumpReLU SAE with threshold [m], or,
    where there is k, of a TopK one."""
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if "k" in p:
        rank = pre.argsort(dim=-1, descending=True).argsort(dim=-1)
        return pre.relu() * (rank < p["k"])
    return pre.relu() * (pre > p["threshold"])


def feature(
    x: Tensor, p: Mapping[str, Tensor], indices: list[int], mode: str, value: float, only_if_active: bool
) -> Tensor:
    """decode(a′) + (x − decode(a)): activations changed between encode and decode, the error put back."""
    a = activations(x, p)
    after = a.clone()
    picked = a[:, indices]
    after[:, indices] = {
        "set": torch.full_like(picked, value), "add": picked + value, "scale": picked * value, "ablate": picked * 0,
    }[mode]  # fmt: skip
    if only_if_active:
        after = torch.where(a > 0, after, a)
    error = x - (a @ p["W_dec"] + p["b_dec"])
    return after @ p["W_dec"] + p["b_dec"] + error


def neurons(x: Tensor, indices: list[int], mode: str, value: float) -> Tensor:
    """Set, shift or scale the named neurons' activations."""
    x, a = x.clone(), x[:, indices]
    x[:, indices] = {"set": torch.full_like(a, value), "add": a + value, "scale": a * value}[mode]
    return x


def heads(x: Tensor, heads: list[int], n_heads: int, factor: float | None, v: Tensor | None, scale: float) -> Tensor:
    """Scale the named heads' outputs, or add to each its part of v, [n_heads·d_head] or [n_heads, d_head]."""
    z = x.clone().view(len(x), n_heads, -1)  # [T, n_heads, d_head]
    for h in heads:
        z[:, h] = z[:, h] * factor if v is None else z[:, h] + scale * v.reshape(n_heads, -1)[h]
    return z.view_as(x)


def affine(x: Tensor, p: Mapping[str, Tensor], strength: float) -> Tensor:
    """x + strength·Rᵀ(Ax + b − Rx)."""
    return x + strength * (x @ p["A"].float().T + p["b"].float() - x @ p["R"].float().T) @ p["R"].float()


def inject(x: Tensor, earlier: Sequence[tuple[float, Tensor]], strength: float) -> Tensor:
    """ã = x + strength·Σ rate·x_k, rescaled to ‖x‖, token by token; `earlier`: the rate and output of each layer k."""
    if not earlier:
        return x
    rows = []
    for t, a in enumerate(x):
        moved = a + strength * sum(rate * outputs[t] for rate, outputs in earlier)
        rows.append(moved * (a.norm() / moved.norm()) if moved.norm() > 0 else moved)
    return torch.stack(rows)


def preserving_norm(x: Tensor, op: Op) -> Tensor:
    """op(x) rescaled to ‖x‖."""
    y = op(x)
    return y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp_min(1e-30))
