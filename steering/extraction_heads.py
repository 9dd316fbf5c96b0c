"""Inference-time intervention: which attention heads know, and the direction in which each of them does.

Source: Li et al. 2023 (arXiv 2306.03341) and its code. The edit is z_h ← z_h + α·σ_h·θ̂_h at the input of `o_proj`,
for the K heads whose probes are best, at the prompt's last token and at every generated one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.steering.assets import Asset, ModelRef, parse_metadata
from steersman.steering.logistic import fit

TOKENS = {"generated": True, "last": 1}


@dataclass(frozen=True)
class HeadDirections:
    """What :func:`find_heads` found. H heads of width e in each of L layers."""

    heads: tuple[tuple[int, int], ...]  # (layer, head), the best first
    accuracy: Tensor  # [L, H] float32, each head's probe on the examples held out
    vectors: Tensor  # [L, H·e] float32, σ_h·θ̂_h in the chosen heads' places, 0 in the others'
    layers: tuple[int, ...]  # [L] the model's layers that the rows stand for


def find_heads(
    positive: Tensor,
    negative: Tensor,
    layers: Sequence[int],
    k: int,
    *,
    direction: Literal["means", "probe"] = "means",
    held_out: float = 0.2,
    l2: float = 1.0,
    seed: int = 0,
) -> HeadDirections:
    """The k heads whose logistic probes best tell held-out positives from negatives, and their scaled directions.

    positive, negative: [n, L, H, e] and [m, L, H, e], `attn_z` of each example, head by head; `layers` names the L.
    direction: θ_h is the difference of the class means, which the paper found best, or the probe's normal.
    σ_h is the standard deviation (over n) of all examples' z_h·θ̂_h. Directions and σ use every example; the accuracy
    that ranks the heads uses a share `held_out` of each class, drawn by `seed`, that the ranking probe did not see.
    Equal accuracies rank by layer, then head.
    """
    _check(positive, negative, layers, k, held_out)
    generator = torch.Generator().manual_seed(seed)
    seen, unseen = zip(*(_split(len(side), held_out, generator) for side in (positive, negative)), strict=True)
    accuracy, probes = [], []
    for i in range(len(layers)):
        p, n = positive[:, i].double().transpose(0, 1).cpu(), negative[:, i].double().transpose(0, 1).cpu()  # [H, n, e]
        weight, bias = _probe(p[:, seen[0]], n[:, seen[1]], l2)
        accuracy.append(_accuracy(p[:, unseen[0]], n[:, unseen[1]], weight, bias))
        theta = p.mean(1) - n.mean(1) if direction == "means" else _probe(p, n, l2)[0]
        probes.append(_scaled(theta, torch.cat([p, n], dim=1)))
    ranked = torch.stack(accuracy).flatten().sort(descending=True, stable=True).indices[:k].tolist()
    n_heads = positive.shape[2]
    chosen = [divmod(index, n_heads) for index in ranked]
    vectors = torch.zeros(len(layers), n_heads, positive.shape[3])
    for row, head in chosen:
        if not probes[row][head].any():
            raise ValueError(f"layer {layers[row]}, head {head}: the classes' means do not differ")
        vectors[row, head] = probes[row][head].float()
    return HeadDirections(
        tuple((layers[row], head) for row, head in chosen),
        torch.stack(accuracy).float(),
        vectors.flatten(1),
        tuple(layers),
    )


def head_assets(
    found: HeadDirections,
    name: str,
    model: ModelRef,
    alpha: float = 15.0,
    provenance: Mapping[str, Any] | None = None,
    **fields: Any,
) -> list[Asset]:
    """Two assets: the vector `NAME-heads` at `attn_z`, and the profile `NAME` that adds it to the chosen heads.

    `alpha` is the strength in standard deviations (the paper's best is 15). `provenance` is added to what the vector's
    says of the method. `fields`: source, licence, ... of both. The profile names the vector's exact version.
    """
    kept = [i for i, layer in enumerate(found.layers) if any(layer == chosen for chosen, _ in found.heads)]
    common = {"model": model.model_dump(mode="json"), "tokens": TOKENS, **fields}
    accuracy = [float(found.accuracy[found.layers.index(layer), head]) for layer, head in found.heads]
    about = {
        "name": f"{name}-heads",
        "kind": "vector",
        "site": "attn_z",
        "layers": [found.layers[i] for i in kept],
        "provenance": {
            **(provenance or {}),
            "method": "iti",
            "heads": [list(head) for head in found.heads],
            "held_out_accuracy": accuracy,
        },
        **common,
    }
    vector = Asset(parse_metadata(about), {"vectors": found.vectors[kept]})
    edit = {
        "op": "heads",
        "heads": [list(head) for head in found.heads],
        "vector": vector.ref,
        "scale": alpha,
        "tokens": TOKENS,
    }
    profile = {"name": name, "kind": "profile", "steering": {"interventions": [edit]}, **common}
    return [vector, Asset(parse_metadata(profile))]


def _check(positive: Tensor, negative: Tensor, layers: Sequence[int], k: int, held_out: float) -> None:
    if positive.dim() != 4 or negative.shape[1:] != positive.shape[1:]:
        raise ValueError(f"states must be [n, L, H, e] on both sides, not {[*positive.shape]} and {[*negative.shape]}")
    if len(layers) != positive.shape[1] or any(b <= a for a, b in itertools.pairwise(layers)):
        raise ValueError(f"layers must name the {positive.shape[1]} layers of the states, in ascending order")
    if not 1 <= k <= positive.shape[1] * positive.shape[2]:
        raise ValueError(f"k is {k}; there are {positive.shape[1] * positive.shape[2]} heads")
    if not 0 < held_out < 1 or min(len(positive), len(negative)) < 2:
        raise ValueError("held_out must lie between 0 and 1, and each side needs at least 2 examples")
    if not torch.isfinite(positive).all() or not torch.isfinite(negative).all():
        raise ValueError("states hold NaN or infinity")


def _split(n: int, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices seen and held out, at least one of each."""
    order = torch.randperm(n, generator=generator)
    cut = min(max(round(n * held_out), 1), n - 1)
    return order[cut:], order[:cut]


def _probe(positive: Tensor, negative: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Logistic probes of [H, n, e] and [H, m, e]: normals [H, e], intercepts [H]."""
    labels = torch.cat([torch.ones(positive.shape[1]), torch.zeros(negative.shape[1])])
    return fit(torch.cat([positive, negative], dim=1), labels, l2)


def _accuracy(positive: Tensor, negative: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[H], the share of [H, n, e] and [H, m, e] on the right side."""
    right = [((side @ weight[:, :, None])[:, :, 0] + bias[:, None]) for side in (positive, negative)]
    count = positive.shape[1] + negative.shape[1]
    return ((right[0] > 0).sum(1) + (right[1] < 0).sum(1)).double() / count


def _scaled(theta: Tensor, states: Tensor) -> Tensor:
    """σ_h·θ̂_h, [H, e]; zero where θ_h is."""
    norm = theta.norm(dim=1, keepdim=True)
    unit = torch.where(norm > 0, theta / norm.clamp_min(1e-300), torch.zeros_like(theta))
    return unit * (states @ unit[:, :, None])[:, :, 0].std(dim=1, correction=0)[:, None]
