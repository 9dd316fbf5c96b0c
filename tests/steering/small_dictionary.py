"""A small dictionary, as ours and as a file that SAELens writes."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.formats import uploads

D, M = 6, 9
MODEL = {"id": "tiny", "n_layers": 4, "d_model": D}
META = {"name": "sae", "kind": "dictionary", "model": MODEL, "layer": 2, "architecture": "jumprelu"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder": (M, D), "decoder": (M, D), "b_dec": (D,), "b_enc": (M,), "threshold": (M,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def asset(**fields: Any) -> Asset:
    return Asset(parse_metadata({**META, **fields}), tensors())


SAELENS = {"architecture": "jumprelu", "d_in": D, "d_sae": M, "metadata": {"hook_name": "blocks.1.hook_resid_post"},
           "apply_b_dec_to_input": False, "normalize_activations": "none"}  # fmt: skip


def lens(**changes: Any) -> dict[str, torch.Tensor]:
    own = tensors()
    state = {"W_enc": own["encoder"].T.contiguous(), "W_dec": own["decoder"]}
    state |= {n: own[n] for n in ("b_dec", "b_enc", "threshold")}
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


def read(state: dict[str, torch.Tensor], config: Any = None, **fields: Any) -> Asset:
    given = {"name": "sae", "model": MODEL, "config": SAELENS if config is None else config, **fields}
    return uploads.read(safetensors.torch.save(state), given)
