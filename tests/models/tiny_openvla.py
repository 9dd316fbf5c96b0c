"""A tiny random-weight OpenVLA that vLLM's own class loads: real sizes where the class fixes them, small elsewhere.

vLLM takes the vision towers from ``timm`` in their full size, 0.75 billion weights. A module of that name, which a test
puts on the server's path, gives it towers of the same widths and one layer's depth; everything else is vLLM's. The
vocabulary is OpenVLA's, and of the head only action tokens have weights: whatever the rest does, actions come out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.tiny import BOS, EOS, N_LAYERS, PAD, VOCAB_SIZE, _randomise, _tokenizer
from tests.server.robots import KEY, OPENVLA

VOCABULARY, PADDED, IMAGE = 32000, 32064, 32000
PATCHES = 256
D, D_FF = 64, 160
WIDTHS = {"vit_large_patch14_reg4_dinov2.lvd142m": 1024, "vit_so400m_patch14_siglip_224": 1152}
CONFIG: dict[str, Any] = {
    **OPENVLA,
    "norm_stats": {KEY: OPENVLA["norm_stats"][KEY]},
    "architectures": ["OpenVLAForActionPrediction"],
    "image_token_index": IMAGE,
    "image_sizes": [224, 224],
    "timm_model_ids": list(WIDTHS),
    "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True,
}
TIMM = '''"""In place of timm: towers of the right widths that are next to nothing."""

import torch
from torch import nn

WIDTHS = {widths}


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 14, 14)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def get_intermediate_layers(self, x, n):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        for block in self.blocks[: max(n) + 1]:
            x = torch.tanh(block(x))
        return [x]


def create_model(name, **options):
    return Tower(WIDTHS[name])
'''


def build_openvla(out: Path, seed: int = 3) -> Path:
    """Writes the checkpoint into the folder ``out``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaConfig(
        vocab_size=PADDED,
        hidden_size=D,
        intermediate_size=D_FF,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    language = LlamaForCausalLM(text).float()
    _randomise(language, seed)
    with torch.no_grad():
        language.lm_head.weight[: VOCABULARY - 256] = 0
        language.lm_head.weight[VOCABULARY:] = 0
    weights = {f"language_model.{name}": weight for name, weight in language.state_dict().items()}
    draw = torch.Generator().manual_seed(seed)

    def linear(name: str, into: int, *shape: int) -> None:
        fan_in = torch.Size(shape).numel()
        weights[f"{name}.weight"] = torch.randn(into, *shape, generator=draw) / fan_in**0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(into, generator=draw)

    for tower, width in zip(("featurizer", "fused_featurizer"), WIDTHS.values(), strict=True):
        linear(f"vision_backbone.{tower}.patch_embed.proj", width, 3, 14, 14)
        for i in range(2):
            linear(f"vision_backbone.{tower}.blocks.{i}", width, width)
    both = sum(WIDTHS.values())
    for name, into, width in (("fc1", 4 * both, both), ("fc2", D, 4 * both), ("fc3", D, D)):
        linear(f"projector.{name}", into, width)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, out / "model.safetensors", {"format": "pt"})
    described = CONFIG | {"text_config": text.to_dict() | {"architectures": ["LlamaForCausalLM"]}}
    (out / "config.json").write_text(json.dumps(described))
    _large_tokenizer(out)
    return out


def _large_tokenizer(out: Path) -> None:
    """That of ``tiny.py`` with as many tokens as OpenVLA's, which no text spells."""
    from transformers import PreTrainedTokenizerFast

    small = _tokenizer()
    described = json.loads(small.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary.update({f"<unused {i}>": i for i in range(VOCAB_SIZE, VOCABULARY)})
    (out / "tokenizer.json").write_text(json.dumps(described))
    names = {name: getattr(small, name) for name in ("pad_token", "bos_token", "eos_token")}
    made = PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"), **names)
    made.save_pretrained(out)


def stand_in(folder: Path) -> dict[str, str]:
    """Variables for a server whose ``timm`` is the one above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "timm.py").write_text(TIMM.replace("{widths}", repr(WIDTHS)))
    return {"PYTHONPATH": str(folder)}


class Oracle:
    """The checkpoint in plain torch, its language model Transformers' own."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        weights = load_file(folder / "model.safetensors")
        self.weights: Mapping[str, Tensor] = weights
        described = json.loads((folder / "config.json").read_text())["text_config"]
        self.language: Any = LlamaForCausalLM(LlamaConfig(**described)).float().eval()
        mine = {k.removeprefix("language_model."): v for k, v in weights.items() if k.startswith("language_model.")}
        self.language.load_state_dict(mine)

    @torch.no_grad()
    def tokens(
        self, ids: list[int], pixels: Tensor, n: int, neurons: Mapping[int, list[int]], value: float
    ) -> list[int]:
        """``n`` greedy tokens. ``ids``: BOS and text; ``pixels`` [6, 224, 224]; neurons are set at all tokens."""

        def hook(columns: list[int]) -> Any:
            def change(module: nn.Module, inputs: tuple[Tensor]) -> Any:
                x = inputs[0].clone()
                x[..., columns] = value
                return (x,)

            return change

        embed = self.language.get_input_embeddings()
        text = embed(torch.tensor([ids]))
        x = torch.cat([text[:, :1], self._image(pixels), text[:, 1:]], dim=1)
        layers = self.language.model.layers
        handles = [layers[i].mlp.down_proj.register_forward_pre_hook(hook(c)) for i, c in neurons.items()]
        found: list[int] = []
        try:
            for _ in range(n):
                found.append(int(self.language(inputs_embeds=x).logits[0, -1].argmax()))
                x = torch.cat([x, embed(torch.tensor([found[-1:]]))], dim=1)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _image(self, pixels: Tensor) -> Tensor:
        """[1, 256, d]"""
        features = []
        for tower, part in (("featurizer", pixels[:3]), ("fused_featurizer", pixels[3:])):
            at = f"vision_backbone.{tower}"
            filters, bias = (self.weights[f"{at}.patch_embed.proj.{name}"] for name in ("weight", "bias"))
            x = nn.functional.conv2d(part[None], filters, bias, 14).flatten(2).transpose(1, 2)
            features.append(torch.tanh(self._linear(f"{at}.blocks.0", x)))  # the last but one of two
        x = torch.cat(features, dim=-1)
        for name in ("fc1", "fc2"):
            x = nn.functional.gelu(self._linear(f"projector.{name}", x))
        return self._linear("projector.fc3", x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
