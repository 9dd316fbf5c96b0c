"""What each op does to the rows of x, in float64, written from its formula alone; directions as they were stored."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def unit(v: Tensor) -> Tensor:
    return v.double() / v.double().norm()


def apply(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """x' [n, d] for x [n, d] float64; `given` holds tensors where a request names assets."""
    after = OPS[given["op"]](x, given)
    if given.get("preserve_norm"):
        before, now = x.norm(dim=1, keepdim=True), after.norm(dim=1, keepdim=True)
        after = torch.where(now > 0, after * before / now.clamp_min(1e-300), after)
    return after


def add(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    if given.get("relative"):
        return x + given["scale"] * x.norm(dim=1, keepdim=True) * unit(given["vector"])
    return x + given["scale"] * given["vector"].double()


def ablate(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    basis, _ = torch.linalg.qr(torch.atleast_2d(given["vector"]).double().T)  # [d, k]
    return x - given["strength"] * (x @ basis) @ basis.T


def clamp(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    v = unit(given["vector"])
    at = x @ v
    if given.get("value") is not None:
        to = torch.full_like(at, given["value"])
    else:
        to = at.clamp(given.get("min", -math.inf), given.get("max", math.inf))
    return x + (to - at)[:, None] * v


def multiply(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    v = unit(given["vector"])
    return x + (given["factor"] - 1) * (x @ v)[:, None] * v


def rotate(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    e1 = unit(given["vector"])
    toward = given["toward"].double()
    e2 = unit(toward - (toward @ e1) * e1)
    a, b = (x @ e1)[:, None], (x @ e2)[:, None]
    turn = math.radians(given["degrees"])
    turned = (math.cos(turn) * a - math.sin(turn) * b) * e1 + (math.sin(turn) * a + math.cos(turn) * b) * e2
    return x - a * e1 - b * e2 + turned


def feature(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """JumpReLU features of `dictionary` [encoder, b_enc, threshold, decoder, b_dec], all read off the same x."""
    part = {name: tensor.double() for name, tensor in given["dictionary"].items()}
    p = (x - part["b_dec"]) @ part["encoder"].T + part["b_enc"]
    a = torch.where((p > part["threshold"]) & (p > 0), p, 0 * p)
    change = torch.zeros_like(a)
    for i in given["index"]:
        to = {"set": given["value"], "add": a[:, i] + given["value"], "scale": a[:, i] * given["value"], "ablate": 0.0}
        change[:, i] = to[given["mode"]] - a[:, i]
    if given["only_if_active"]:
        change = torch.where(a > 0, change, 0 * a)
    return x + change @ part["decoder"]


def neurons(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    x = x.clone()
    for i in {index for _, index in given["neurons"]}:
        x[:, i] = {"set": 0 * x[:, i], "add": x[:, i], "scale": x[:, i] * given["value"]}[given["mode"]]
        if given["mode"] != "scale":
            x[:, i] += given["value"]
    return x


def heads(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    x = x.clone()
    for h in {head for _, head in given["heads"]}:
        part = slice(h * given["d_head"], (h + 1) * given["d_head"])
        if given.get("factor") is not None:
            x[:, part] *= given["factor"]
        else:
            x[:, part] += given["scale"] * given["vector"].double()[part]
    return x


def affine(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    r, a, b = (given["affine"][name][0].double() for name in ("R", "A", "b"))
    return x + given["strength"] * (x @ a.T + b - x @ r.T) @ r


OPS = {f.__name__: f for f in (add, ablate, clamp, multiply, rotate, feature, neurons, heads, affine)}
