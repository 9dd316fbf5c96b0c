"""A tiny random-weight LLaVA checkpoint that is a robot policy: CLIP tower, projector, Llama; actions are its tokens.

Made as ``tiny.py`` makes the others, with an image processor and the description that ``server/policies/bins.py``
reads. Its tokenizer is that of ``tiny.py`` and one token for an image. Images are 28 × 28, four patches of 14.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import BOS, EOS, MAX_POSITIONS, N_LAYERS, PAD, VOCAB_SIZE, _randomise, _tokenizer

IMAGE = VOCAB_SIZE  # the id of the image's token
PATCHES = 4
SIZE = 28
FIRST, BINS, CHUNK = 8, 500, 2  # nearly every token is an action
KEY = "tiny_reach"
STATS = {"q01": [-0.1, -0.2, -0.3, 0.0], "q99": [0.1, 0.2, 0.3, 1.0], "mask": [True, True, True, False]}
POLICY: dict[str, Any] = {
    "type": "bins",
    "prompt": "In: What action should the robot take to {instruction}?\nOut:",
    "first_token": FIRST,
    "bins": BINS,
    "chunk": CHUNK,
    "image_token": IMAGE,
    "norm_stats": {KEY: {"action": STATS}},
}


def build_llava(out: Path, seed: int = 5) -> Path:
    """Writes the checkpoint into the folder ``out``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = LlamaConfig(
        vocab_size=VOCAB_SIZE + 64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=14,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).float().eval()
    _randomise(model, seed)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    _prefixed(out / "model.safetensors")
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    tokenizer.save_pretrained(out)
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size)
    images.save_pretrained(out)
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "image_token": "<image>"}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (out / "processor_config.json").write_text(json.dumps(processor))
    described = json.loads((out / "config.json").read_text()) | {"steersman_policy": POLICY}
    (out / "config.json").write_text(json.dumps(described))
    return out


def _prefixed(file: Path) -> None:
    """Gives CLIP's weights the ``vision_model.`` back that transformers 5 leaves out and vLLM looks for."""
    weights = load_file(file)
    named = {re.sub(r"(vision_tower\.)(?!vision_model\.)", r"\1vision_model.", k): v for k, v in weights.items()}
    save_file({k: v.clone() for k, v in named.items()}, file, {"format": "pt"})


def without_torchvision(folder: Path) -> dict[str, str]:
    """Variables for a server where torchvision is missing: vLLM's LLaVA imports a processor that needs it.

    The module that it imports is answered by transformers' own one for PIL, in every process that Python starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import importlib.abc, importlib.util, sys\n"
        "WANTED = 'transformers.models.pixtral.image_processing_pixtral'\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != WANTED or importlib.util.find_spec('torchvision'):\n"
        "            return None\n"
        "        return importlib.util.spec_from_loader(name, Loader())\n"
        "class Loader(importlib.abc.Loader):\n"
        "    def exec_module(self, module):\n"
        "        from transformers.models.pixtral import image_processing_pil_pixtral as pil\n"
        "        vars(module).update({k: v for k, v in vars(pil).items() if not k.startswith('__')})\n"
        "        module.PixtralImageProcessor = pil.PixtralImageProcessorPil\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@torch.no_grad()
def greedy(
    model: Any,
    ids: torch.Tensor,
    pixels: torch.Tensor,
    n: int,
    neurons: dict[int, list[int]],
    value: float,
    when: str | list[int],
) -> list[int]:
    """``n`` greedy tokens of Hugging Face's model with neurons set by plain hooks.

    ``ids`` [1, prompt] with the image's tokens, ``pixels`` [1, 3, 28, 28], ``neurons`` by layer, ``when``: all, prompt,
    generated, or positions in the prompt.
    """

    def chosen(length: int) -> slice | list[int]:
        """Of the tokens of a pass; the first pass has the prompt, each other one token."""
        if isinstance(when, list):
            return when if length > 1 else []
        return slice(None) if when == "all" or (when == "prompt") == (length > 1) else []

    def hook(columns: list[int]) -> Any:
        def change(module: Any, inputs: tuple[torch.Tensor]) -> Any:
            x = inputs[0].clone()
            edited = x[:, chosen(x.shape[1])]
            edited[..., columns] = value
            x[:, chosen(x.shape[1])] = edited
            return (x, *inputs[1:])

        return change

    layers = model.model.language_model.layers
    handles = [layers[i].mlp.down_proj.register_forward_pre_hook(hook(columns)) for i, columns in neurons.items()]
    try:
        out = model(input_ids=ids, pixel_values=pixels, use_cache=True)
        found = [int(out.logits[0, -1].argmax())]
        while len(found) < n:
            out = model(input_ids=torch.tensor([found[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(int(out.logits[0, -1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return found
