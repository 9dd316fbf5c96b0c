"""A tiny random-weight π0: SigLIP tower, Gemma backbone and Gemma action expert, as Transformers builds them.

    python -m tests.models.tiny_pi0 OUT     # with the dimensions of LIBERO's arm

Images are 28 × 28, four patches of 14. Its tokenizer is that of ``tiny.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models.tiny import BOS, EOS, PAD, VOCAB_SIZE, _randomise, _tokenizer

IMAGE = VOCAB_SIZE + 8  # beyond the embedding, as PaliGemma's is
PATCHES, SIZE, CAMERAS = 4, 28, 2
BACKBONE, EXPERT = 3, 3  # layers; each of the expert's sees the keys of one of the backbone's
D_MODEL, D_EXPERT, D_FF, EXPERT_FF = 64, 48, 96, 80
CHUNK, STEPS, MAX_DIMS = 5, 4, 6
KEY, DIMS, STATE_DIMS = "tiny_arm", 4, 3
STATS = {
    "action": {"mean": [0.1, -0.2, 0.0, 0.5], "std": [0.1, 0.3, 1.0, 0.2]},
    "proprio": {"mean": [0.0, 1.0, -1.0], "std": [1.0, 0.5, 2.0]},
}
POLICY: dict[str, Any] = {"type": "pi0", "cameras": CAMERAS, "norm_stats": {KEY: STATS}}
PANDA: dict[str, Any] = {  # for LIBERO's arm: it moves at random
    "action": {"mean": [0.0] * 7, "std": [0.3] * 7},
    "proprio": {"mean": [0.0] * 8, "std": [1.0] * 8},
}


def build_pi0(out: Path, seed: int = 11, policy: Mapping[str, Any] = POLICY, max_dims: int = MAX_DIMS) -> Path:
    """Writes the checkpoint into the folder ``out``."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCAB_SIZE}
    text = {"model_type": "gemma", "hidden_size": D_MODEL, "intermediate_size": D_FF, "num_hidden_layers": BACKBONE}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": 14, "vision_use_head": False}
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": {**text, **heads, **tokens},
            "vision_config": vision,
            "projection_dim": D_MODEL,
            "image_token_id": IMAGE,
        },
        dit_config={
            "model_type": "gemma",
            "hidden_size": D_EXPERT,
            "intermediate_size": EXPERT_FF,
            "num_hidden_layers": EXPERT,
            **heads,
            **tokens,
        },
        chunk_size=CHUNK,
        max_state_dim=max_dims,
        max_action_dim=max_dims,
        num_inference_steps=STEPS,
    )
    model = PI0ForConditionalGeneration(config).float().eval()
    _randomise(model, seed)
    model.save_pretrained(out)
    _tokenizer().save_pretrained(out)
    described = json.loads((out / "config.json").read_text()) | {"steersman_policy": dict(policy)}
    (out / "config.json").write_text(json.dumps(described))
    return out


if __name__ == "__main__":
    print(build_pi0(Path(sys.argv[1]), policy=POLICY | {"norm_stats": {"panda": PANDA}}, max_dims=8))
