"""Checkpoints without weights, in the shapes of real models, for speed on a GPU: vLLM fills them with random numbers.

Shapes are from the models' published ``config.json``; the tokenizer is a small one with
made-up words for the other ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    "gemma-2-27b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 4608,
        "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 144,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def checkpoint(name: str, folder: Path) -> Path:
    """A folder with the shape's configuration and a tokenizer, to be served with ``--load-format dummy``."""
    from tests.models.tiny import VOCAB_SIZE, tiny_model

    config = {**SHAPES[name], "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    out, small = folder / name, tiny_model("llama")
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(small / "tokenizer_config.json", out)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"\u0120w{i}": i for i in range(VOCAB_SIZE, config["vocab_size"])}  # " w1234"
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    return out
