"""Directions from contrast texts: hidden states of a Hugging Face model, then the difference of two means.

The states are the residual stream leaving each block (`resid_post`), taken by hooks on the blocks: the last entry of
`output_hidden_states` will not do, since the final norm has been applied to it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

# Where model families keep their decoder blocks.
BLOCK_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "model.decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
)


def difference_of_means(positive: Tensor, negative: Tensor) -> Tensor:
    """mean(positive) − mean(negative) in float32; [n, ..., d] and [m, ..., d] give [..., d]."""
    if positive.shape[1:] != negative.shape[1:]:
        raise ValueError(f"shapes differ: {tuple(positive.shape)} and {tuple(negative.shape)}")
    if len(positive) == 0 or len(negative) == 0:
        raise ValueError("both sides need at least one example")
    return positive.float().mean(0) - negative.float().mean(0)


@torch.inference_mode()
def collect_hf(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    token: Literal["last", "mean"] = "mean",
    prompts: Sequence[str] | None = None,
) -> Tensor:
    """`resid_post` of each text at each layer: [n_texts, n_layers, d] float32 on the CPU.

    `token` is "last" (the text's last token) or "mean" (over the text's tokens). `prompts[i]`, when given, is fed
    before `texts[i]` and not averaged: for a chat model it is the templated question, and the text the answer.
    The sequence's first token is left out of a mean (unless it is the only one): it is an attention sink in most
    models, whose huge state would enter with weight 1/length and so leak the texts' lengths into the direction.
    One text is run at a time, so nothing is padded.
    """
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts for {len(texts)} texts")
    blocks = decoder_blocks(model)
    backbone = getattr(model, "base_model", model)  # the model without its vocabulary head, whose logits nobody reads
    states: dict[int, Tensor] = {}  # layer -> [tokens, d] of the text being run

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            states[layer] = (output[0] if isinstance(output, tuple) else output)[0].float().cpu()

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    rows = []
    try:
        for i, text in enumerate(texts):
            before = tokenizer(prompts[i], add_special_tokens=False)["input_ids"] if prompts is not None else []
            ids = before + tokenizer(text, add_special_tokens=not before)["input_ids"]
            if len(ids) == len(before):
                raise ValueError(f"text {i} has no tokens")
            backbone(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            start = min(max(len(before), 1), len(ids) - 1) if token == "mean" else len(ids) - 1
            rows.append(torch.stack([states[layer][start:].mean(0) for layer in layers]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(rows)


def decoder_blocks(model: Any) -> Any:
    """The model's decoder blocks, in order, as its `ModuleList`."""
    for path in BLOCK_PATHS:
        blocks = model
        for name in path.split("."):
            blocks = getattr(blocks, name, None)
        if blocks is not None:
            return blocks
    raise ValueError(f"no decoder blocks found in {type(model).__name__}")
