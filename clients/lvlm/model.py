"""The model of scenes: small enough to be trained on one CPU core and kept beside the code.

It starts with few layers, which learn fast, and is deepened by layers that do nothing at first: twelve layers that
start together take many times as long until they look at the image at all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steersman.clients import small_llava
from steersman.clients.lvlm import vocabulary
from steersman.clients.lvlm.scenes import SIZE

SHAPE = small_llava.Shape(
    words=len(vocabulary.WORDS), size=SIZE, patch=16, width=128, layers=12, vision_layers=4, hidden=384
)
SHALLOW = replace(SHAPE, layers=4)
WRITES = ("o_proj", "down_proj")  # what adds to the stream


@torch.no_grad()
def build(seed: int) -> Any:
    """A shallow one. Weights start so large that every layer's numbers are about as large as those that it is given."""
    model = small_llava.build(SHALLOW, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.model.language_model.layers.named_parameters():
        if weight.ndim == 2:
            size = 1 / math.sqrt(2 * SHALLOW.layers) if name.split(".")[-2] in WRITES else 1
            weight.normal_(0, size / math.sqrt(weight.shape[1]), generator=generator)
    model.lm_head.weight.normal_(0, 1 / math.sqrt(SHAPE.width), generator=generator)
    model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.weight.normal_(0, 1 / math.sqrt(layer.in_features), generator=generator)
    return model


@torch.no_grad()
def deepen(shallow: nn.Module, seed: int) -> Any:
    """A model of ``SHAPE`` that computes what ``shallow`` does: its layers, each with new ones after it."""
    model = small_llava.build(SHAPE, seed)
    apart = SHAPE.layers // SHALLOW.layers
    known = {_moved(name, apart): weights for name, weights in shallow.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for name, weights in model.state_dict().items():
        if name in known:
            weights.copy_(known[name])
        elif name.split(".")[-2] in WRITES:
            weights.zero_()
        elif weights.ndim == 2:
            weights.normal_(0, 1 / math.sqrt(weights.shape[1]), generator=generator)
    return model


def _moved(name: str, apart: int) -> str:
    before, found, after = name.partition("language_model.layers.")
    if not found:
        return name
    layer, _, rest = after.partition(".")
    return f"{before}{found}{int(layer) * apart}.{rest}"


def save(model: Any, out: Path) -> None:
    """In bfloat16."""
    small_llava.save(model.to(torch.bfloat16), vocabulary.tokenizer(), out, {})


def load(folder: Path) -> Any:
    """A checkpoint that :func:`save` wrote, in float32."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
