"""A small policy of LLaVA's architecture: CLIP's tower, a projector, a Llama. Its checkpoint is as vLLM serves it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.clients.policies import vocabulary
from steersman.clients.policies.demonstrations import CHUNK
from steersman.clients.policies.vocabulary import BINS, CELLS, FIRST_ACTION, FIRST_STATE, IMAGE, Scale
from steersman.clients.simulators.metaworld import SIZE

PATCH = 16  # pixels
PATCHES = (SIZE // PATCH) ** 2
MEAN, STD = 0.5, 0.25  # of a channel in [0, 1]
WIDTH, LAYERS, HEAD = 128, 4, 32  # heads as small as vLLM's attention takes them on a CPU
VISION_LAYERS = 3  # LLaVA reads the last but one


def build(seed: int) -> Any:
    """LlavaForConditionalGeneration in float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    heads = WIDTH // HEAD
    text = LlamaConfig(
        vocab_size=len(vocabulary.WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD,
        max_position_embeddings=256,
        pad_token_id=vocabulary.PAD,
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.EOS,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=heads,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
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


def pixels(pictures: Tensor) -> Tensor:
    """``pictures`` uint8 [n, cameras, height, width, 3] as the model takes them: [n · cameras, 3, height, width]."""
    return ((pictures.float() / 255 - MEAN) / STD).flatten(0, 1).permute(0, 3, 1, 2).contiguous()


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
    from safetensors.torch import load_file, save_file
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    weights = out / "model.safetensors"
    named = {  # transformers 5 leaves out a part of CLIP's names that vLLM looks for
        re.sub(r"(vision_tower\.)(?!vision_model\.)", r"\1vision_model.", k): v.clone()
        for k, v in load_file(weights).items()
    }
    save_file(named, weights, {"format": "pt"})
    vocabulary.tokenizer().save_pretrained(out)
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    images.save_pretrained(out)
    processor = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "image_token": vocabulary.SPECIAL[IMAGE]}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (out / "processor_config.json").write_text(json.dumps(processor))
    config = out / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steersman_policy": dict(policy)}, indent=2))


def load(folder: Path) -> tuple[Any, Scale, Scale]:
    """A checkpoint that :func:`save` wrote, and the scales of its actions and states."""
    from transformers import LlavaForConditionalGeneration

    policy = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    (stats,) = json.loads((folder / "config.json").read_text())["steersman_policy"]["norm_stats"].values()
    return policy, _scale(stats["action"]), _scale(stats["proprio"])


def _scale(about: Mapping[str, Any]) -> Scale:
    return Scale(np.array(about["q01"]), np.array(about["q99"]), np.array(about["mask"]))
