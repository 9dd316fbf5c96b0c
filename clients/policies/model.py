"""A small policy of LLaVA's architecture: CLIP's tower, a projector, a Llama. Its checkpoint is as vLLM serves it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.clients import small_llava
from steersman.clients.policies import vocabulary
from steersman.clients.policies.demonstrations import CHUNK
from steersman.clients.policies.vocabulary import BINS, CELLS, FIRST_ACTION, FIRST_STATE, Scale
from steersman.clients.simulators.metaworld import SIZE
from steersman.clients.small_llava import IMAGE

PATCH = 16  # pixels
PATCHES = (SIZE // PATCH) ** 2
WIDTH, LAYERS, VISION_LAYERS = 128, 4, 3


def build(seed: int) -> Any:
    """LlavaForConditionalGeneration in float32."""
    shape = small_llava.Shape(
        words=len(vocabulary.WORDS),
        size=SIZE,
        patch=PATCH,
        width=WIDTH,
        layers=LAYERS,
        vision_layers=VISION_LAYERS,
        hidden=2 * WIDTH,
    )
    model = small_llava.build(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    for weights in (model.get_input_embeddings().weight, model.lm_head.weight):
        _smooth(weights, FIRST_ACTION, BINS, generator)
    _smooth(model.get_input_embeddings().weight, FIRST_STATE, CELLS, generator)
    return model


@torch.no_grad()
def _smooth(weights: Tensor, first: int, n: int, generator: torch.Generator) -> None:
    """Starts the ``n`` rows that stand for numbers as waves over them: numbers that are near look alike."""
    x = torch.linspace(0, 1, n)[:, None]
    waves = torch.cat([f(torch.pi * k * x) for k in (0.5, 1, 2, 4, 8, 16) for f in (torch.sin, torch.cos)], dim=1)
    rows = waves @ torch.randn(waves.shape[1], weights.shape[1], generator=generator)
    weights[first : first + n] = 0.02 * rows / rows.std()


def describe(key: str, cameras: int, action: Scale, state: Scale) -> dict[str, Any]:
    """``steersman_policy``, by which the server reads the checkpoint."""
    return {
        "type": "bins",
        "prompt": vocabulary.PROMPT,
        "first_token": FIRST_ACTION,
        "bins": BINS,
        "chunk": CHUNK,
        "image_token": IMAGE,
        "cameras": cameras,
        "norm_stats": {key: {"action": action.described(), "proprio": state.described()}},
    }


def save(model: Any, policy: Mapping[str, Any], out: Path) -> None:
    """Writes the checkpoint, with tokenizer and image processor, into the folder ``out``."""
    small_llava.save(model, vocabulary.tokenizer(), out, {"steersman_policy": dict(policy)})


def load(folder: Path) -> tuple[Any, Scale, Scale]:
    """A checkpoint that :func:`save` wrote, and the scales of its actions and states."""
    from transformers import LlavaForConditionalGeneration

    policy = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    (stats,) = json.loads((folder / "config.json").read_text())["steersman_policy"]["norm_stats"].values()
    return policy, _scale(stats["action"]), _scale(stats["proprio"])


def _scale(about: Mapping[str, Any]) -> Scale:
    return Scale(np.array(about["q01"]), np.array(about["q99"]), np.array(about["mask"]))
