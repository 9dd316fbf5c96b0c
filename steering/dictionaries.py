"""Feature dictionaries: what one feature reads and writes, and the whole encode and decode.

A dictionary's tensors have one row per feature, so that a feature is a few rows of a file (`steering/rows.py`):
`encoder` [m, d], `decoder` [m, d_out], biases and thresholds [m]. With z the activation after the dictionary's own
normalisation, z = input_scale·x,

| architecture | a_i |
|---|---|
| standard | ReLU(p), p = encoder_i·(z − b_dec) + b_enc_i (b_dec only with `apply_b_dec_to_input`) |
| jumprelu | p where p > max(threshold_i, 0), else 0. BatchTopK and Matryoshka dictionaries are exported so |
| gated | with u = encoder_i·(z − b_dec): ReLU(exp(r_mag_i)·u + b_mag_i) where u + b_gate_i > 0, else 0 |
| topk | ReLU(p) for the k features of the largest p, else 0 |
| matching_pursuit | greedy: r = z − b_dec; again and again the feature of the largest decoder_i·r takes it out of r |
| linear | p: coordinates in a basis |
| basis | none: directions only (SNMF features, meta-features) |

The first three and `linear` depend on one row of the encoder: they are rows of a block (`kernels/program.py`). gated:
u > −b_gate is the same as exp(r)·u + b_mag > b_mag − exp(r)·b_gate, a threshold. `topk` and `matching_pursuit` take the
whole encoder, and those whose input is normalised token by token take that first (`steering/encoders.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.steering import exact
from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.errors import AssetCorrupt, FeatureUnreadable, NonFinite, OutOfRange
from steersman.steering.exact import Products
from steersman.steering.pursuit import pursue
from steersman.steering.rows import take

_ROWS = 4096  # features whose encoder is in memory at once
_LARGEST = 1e18  # of an encoder's row: dot products and their squares stay within float32
_ADD = 'mode "add" without only_if_active'


@dataclass(frozen=True)
class Reads:
    """How k features are read off x itself: a = p where p > threshold, else 0, with p = direction·x + bias."""

    direction: Tensor  # [k, d] float32
    bias: Tensor  # [k] float32
    threshold: Tensor  # [k] float32, −inf: a = p


def dictionary(asset: Asset) -> DictionaryMeta:
    assert isinstance(asset.meta, DictionaryMeta), "the caller has looked up a dictionary"
    return asset.meta


def check_indices(asset: Asset, indices: Sequence[int]) -> None:
    count = asset.shapes["decoder"][0]
    if max(indices) >= count:
        raise OutOfRange(f"feature {max(indices)} does not exist: {asset.ref} has {count}, counted from 0")


def takes_all(meta: DictionaryMeta) -> bool:
    """Whether one feature's activation takes all the others'."""
    return meta.architecture in ("topk", "matching_pursuit")


def takes_encode(meta: DictionaryMeta) -> bool:
    """Whether a feature's activation, read where the dictionary writes, takes more than a product and a threshold."""
    if meta.read_site is not None or meta.architecture == "basis":
        return False  # nothing there would tell it
    return takes_all(meta) or meta.normalize != "none"


def reads(asset: Asset, indices: Sequence[int]) -> Reads:
    """The encoders of some features; `FeatureUnreadable` where one row of the encoder is not enough.

    `NonFinite` where a number is beyond float32 once the biases, gains and scales are folded in.
    """
    meta = dictionary(asset)
    _refuse_unreadable(asset, meta)
    rows = {name: _rows(asset, name, indices) for name in asset.tensors if name in _PER_FEATURE}
    direction, threshold = rows["encoder"], torch.full((len(indices),), -torch.inf, dtype=torch.float64)
    before = torch.zeros(len(indices), dtype=torch.float64)  # encoder·b_dec
    if meta.apply_b_dec_to_input:
        before = direction @ asset.tensors["b_dec"].double()
    if meta.architecture == "gated":
        gain = rows["r_mag"].exp()
        bias = rows["b_mag"] - gain * before
        threshold = (rows["b_mag"] - gain * rows["b_gate"]).clamp_min(0)
        direction = gain[:, None] * direction
    else:
        bias = rows["b_enc"] - before
        if meta.architecture != "linear":
            threshold = rows.get("threshold", torch.zeros_like(bias)).clamp_min(0)
    found = Reads((direction * meta.input_scale).float(), bias.float(), threshold.float())
    if (
        not all((part.abs() <= _LARGEST).all() for part in (found.direction, found.bias))
        or found.threshold.max() > _LARGEST
    ):
        raise NonFinite(f"{asset.ref}: with its gains and scales, the encoder of a feature is beyond {_LARGEST:g}")
    return found


def writes(asset: Asset, indices: Sequence[int]) -> Tensor:
    """[k, d_out] float32: by how much x moves when a feature's activation grows by one.

    In units of ‖x‖ where `writes_by_norm`.
    """
    meta = dictionary(asset)
    rows = _rows(asset, "decoder", indices) / meta.input_scale
    if meta.normalize == "layer_norm" and meta.read_site is None:
        raise FeatureUnreadable(
            f"{asset.ref} normalises each token by its mean and deviation, which no edit here does; "
            'use op "add" with the direction of the feature as a vector'
        )
    if writes_by_norm(meta):
        rows = rows / rows.shape[1] ** 0.5
    return rows.float()


def writes_by_norm(meta: DictionaryMeta) -> bool:
    """Whether what a feature writes grows with ‖x‖. A transcoder's does not: only what it reads is normalised."""
    return meta.normalize == "constant_norm_rescale" and meta.read_site is None


def encode(asset: Asset, x: Tensor) -> Tensor:
    """[n, m] float32, every feature's activation for x [n, d]. Costs n·m·d, and for matching pursuit that times k."""
    meta = dictionary(asset)
    if meta.architecture == "basis":
        raise FeatureUnreadable(f"{asset.ref} has directions only and no encoder")
    return activations(meta, asset.tensors, asset.shapes["decoder"][0], x)


def encoder_tensors(meta: DictionaryMeta) -> tuple[str, ...]:
    """The tensors that :func:`activations` needs: first the matrix, then the numbers of each feature."""
    matrix = "decoder" if meta.architecture == "matching_pursuit" else "encoder"
    numbers = {"gated": ("b_gate", "b_mag", "r_mag"), "matching_pursuit": (), "jumprelu": ("b_enc", "threshold")}
    before = ("b_dec",) if meta.apply_b_dec_to_input else ()
    return (matrix, *numbers.get(meta.architecture, ("b_enc",)), *before)


def activations(meta: DictionaryMeta, tensors: Mapping[str, Tensor], count: int, x: Tensor) -> Tensor:
    """The same of a dictionary of ``count`` features, given its :func:`encoder_tensors`."""
    z = encoder_input(meta, tensors, x)
    if meta.architecture == "matching_pursuit":
        return pursue(z, Products(tensors["decoder"]), meta)
    parts = [range(at, min(at + _ROWS, count)) for at in range(0, count, _ROWS)]
    out = torch.cat([z @ take(tensors, "encoder", part).float().T for part in parts], dim=1)
    out = activated(meta, tensors, out)
    if meta.architecture != "topk":
        return out
    assert meta.k is not None
    values, chosen = out.topk(min(meta.k, count), dim=1)
    return torch.zeros_like(out).scatter_(1, chosen, values)


def encoder_input(meta: DictionaryMeta, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[n, d] float32, what the encoder's rows are multiplied with, for x [n, d]. A row's bits are its own."""
    z = _normalised(meta, x.float())[0]
    return z - tensors["b_dec"].float() if meta.apply_b_dec_to_input else z


def activated(meta: DictionaryMeta, numbers: Mapping[str, Tensor], dots: Tensor) -> Tensor:
    """The activations of features from their products [n, k]; of topk those that they have if they are chosen.

    numbers: biases, gains and thresholds [k] of these features.
    """
    if meta.architecture == "gated":
        b_gate, b_mag, r_mag = (numbers[name].to(dots) for name in ("b_gate", "b_mag", "r_mag"))
        return torch.where(dots + b_gate > 0, (r_mag.exp() * dots + b_mag).relu(), 0)
    p = dots + numbers["b_enc"].to(dots)
    if meta.architecture == "linear":
        return p
    floor = numbers["threshold"].to(dots).clamp_min(0) if meta.architecture == "jumprelu" else 0.0
    return torch.where(p > floor, p, 0)


def decode(asset: Asset, activations: Tensor, x: Tensor) -> Tensor:
    """[n, d_out] float32, the reconstruction from activations [n, m]; x [n, d] is what its normalisation depends on."""
    meta = dictionary(asset)
    out = activations.float() @ asset.tensors["decoder"].float()
    if meta.architecture != "matching_pursuit" or meta.apply_b_dec_to_input:
        out = out + asset.tensors["b_dec"].float()
    if meta.read_site is not None and meta.normalize != "none":
        return out  # a transcoder normalises what it reads, not what it writes
    _, shift, scale = _normalised(meta, x.float())
    return out * scale + shift


_PER_FEATURE = ("encoder", "b_enc", "threshold", "b_gate", "b_mag", "r_mag")


def _rows(asset: Asset, name: str, indices: Sequence[int]) -> Tensor:
    """[k, ...] float64. A large dictionary is not hashed when it is opened, so what is read of it is checked here."""
    try:
        rows = take(asset.tensors, name, indices).double()
    except OSError as error:
        raise AssetCorrupt(f"{asset.ref}: {name} cannot be read: {error}") from error
    if not torch.isfinite(rows).all():
        raise AssetCorrupt(f"{asset.ref}: {name} holds NaN or infinity")
    return rows


def _normalised(meta: DictionaryMeta, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """z, and the shift and scale that take a reconstruction of z back to x."""
    if meta.normalize == "constant_norm_rescale":
        scale = (exact.pairs(x, x) / x.shape[1]).sqrt()[:, None].float()
        return x / scale, 0.0, scale
    if meta.normalize == "layer_norm":
        mean = (exact.dots(x, x.new_ones(1, x.shape[1])) / x.shape[1]).float()
        centred = x - mean
        deviation = (exact.pairs(centred, centred) / (x.shape[1] - 1)).sqrt()[:, None].float()
        return centred / (deviation + 1e-5), mean, deviation
    return x * meta.input_scale, 0.0, 1 / meta.input_scale


def _refuse_unreadable(asset: Asset, meta: DictionaryMeta) -> None:
    """One row of the encoder must tell a feature: callers have asked :func:`takes_encode`."""
    if meta.read_site is not None:
        why = (
            f"is a transcoder: it reads {meta.read_site} and writes {meta.site.value}, and edits read where they write"
        )
    elif meta.architecture == "basis":
        why = "has directions only and no encoder"
    elif takes_encode(meta):
        why = "is encoded token by token, which one row of it does not tell"
    else:
        return
    raise FeatureUnreadable(f"{asset.ref} {why}; use {_ADD}, which needs no activation")
