"""Small models of LLaVA's architecture that the project trains: CLIP's tower, a projector, a Llama, words as tokens.

Their checkpoints are as vLLM and transformers load them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEAN, STD = 0.5, 0.25  # of a channel in [0, 1]
HEAD = 32  # heads as small as vLLM's attention takes them on a CPU
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")  # the first words of each vocabulary
PAD, BOS, EOS, UNKNOWN, IMAGE = range(len(SPECIAL))


@dataclass(frozen=True)
class Shape:
    """What a model is built of. LLaVA reads the tower's last layer but one."""

    words: int
    size: int  # pixels of a side of an image
    patch: int
    width: int
    layers: int
    vision_layers: int
    hidden: int  # of the MLPs of the Llama
    positions: int = 256

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2


def build(shape: Shape, seed: int) -> Any:
    """LlavaForConditionalGeneration in float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    heads = shape.width // HEAD
    text = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD,
        max_position_embeddings=shape.positions,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=heads,
        image_size=shape.size,
        patch_size=shape.patch,
        projection_dim=shape.width,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=shape.patches,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).float()


def pixels(pictures: Tensor) -> Tensor:
    """``pictures`` uint8 [n, images, height, width, 3] as the model takes them: [n · images, 3, height, width]."""
    return ((pictures.float() / 255 - MEAN) / STD).flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def look(model: Any, pictures: Tensor) -> Tensor:
    """``pictures`` uint8 [n, images, height, width, 3]; as the language model is given them, [n, tokens, width]."""
    found = model.model.vision_tower(pixels(pictures), output_hidden_states=True).hidden_states[-2]
    seen: Tensor = model.model.multi_modal_projector(found[:, 1:])  # without CLIP's token for the whole
    return seen.reshape(len(pictures), -1, seen.shape[-1])


def tokenizer(words: Sequence[str], more_special: Sequence[str] = (), chat_template: str | None = None) -> Any:
    """``words``, those of ``SPECIAL`` first, for transformers and vLLM. Words are apart by spaces or punctuation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[UNKNOWN]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if chat_template is not None:
        marks = pre_tokenizers.Punctuation("isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([made.pre_tokenizer, marks])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNKNOWN],
        additional_special_tokens=[SPECIAL[IMAGE], *more_special],
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = chat_template
    return out


def save(model: Any, tokens: Any, out: Path, more: Mapping[str, Any]) -> None:
    """Writes the checkpoint, with the tokenizer ``tokens`` and an image processor, into the folder ``out``.

    ``more``: further fields of ``config.json``.
    """
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
    tokens.save_pretrained(out)
    vision = model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    images.save_pretrained(out)
    processor = {"processor_class": "LlavaProcessor", "patch_size": vision.patch_size, "image_token": SPECIAL[IMAGE]}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (out / "processor_config.json").write_text(json.dumps(processor))
    config = out / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(more), indent=2))
