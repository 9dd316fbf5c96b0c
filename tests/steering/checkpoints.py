"""Small checkpoints written tensor by tensor, and the dense computation that projections are compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.steering.library import noise

LAYERS, D, D_FF, V = 3, 8, 20, 50


def tensors(prefix: str = "model.", head: str | None = "lm_head.weight", seed: int = 0) -> dict[str, Tensor]:
    """A Llama-like decoder's matrices, those that neurons need and some that they do not."""
    out = {f"{prefix}embed_tokens.weight": noise(V, D, seed=seed), f"{prefix}norm.weight": 1 + noise(D, seed=seed + 1)}
    if head:
        out[head] = noise(V, D, seed=seed + 2)
    for i in range(LAYERS):
        layer = f"{prefix}layers.{i}"
        out[f"{layer}.mlp.down_proj.weight"] = noise(D, D_FF, seed=seed + 10 + i)
        out[f"{layer}.mlp.gate_up_proj.weight"] = noise(2 * D_FF, D, seed=seed + 20 + i)
        out[f"{layer}.self_attn.o_proj.weight"] = noise(D, D, seed=seed + 30 + i)
        out[f"{layer}.input_layernorm.weight"] = torch.ones(D)
    return out


def write(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-6, **(config or {})}))
    names = sorted(weights)
    if shards == 1:
        save_file({n: weights[n].contiguous() for n in names}, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: weights[n].contiguous() for n in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def columns(weights: Mapping[str, Tensor], prefix: str = "model.") -> Tensor:
    """[neurons, d], layer by layer."""
    return torch.cat([weights[f"{prefix}layers.{i}.mlp.down_proj.weight"].T for i in range(LAYERS)])
