"""Causal tracing with plain hooks on Hugging Face's LLaVA, written without anything of the project's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PARTS = ("attn", "mlp", "hidden")


@torch.no_grad()
def probabilities(
    model: Any, ids: Sequence[int], clean: Tensor, corrupted: Tensor, answer: int, groups: dict[str, list[int]]
) -> tuple[float, float, dict[str, dict[str, list[float]]]]:
    """P of the token ``answer`` after ``ids``, with the picture, with the corrupted one, and patched.

    clean, corrupted: pixels [1, 3, h, w]. Patched: by component and group, a number for each layer.
    """
    layers = model.model.language_model.layers
    modules = {
        "attn": [layer.self_attn for layer in layers],
        "mlp": [layer.mlp for layer in layers],
        "hidden": list(layers),
    }

    def run(pixels: Tensor, hook: Any = None, at: Any = None) -> float:
        handle = None if at is None else at.register_forward_hook(hook)
        try:
            out = model(input_ids=torch.tensor([list(ids)]), pixel_values=pixels, use_cache=False)
        finally:
            if handle is not None:
                handle.remove()
        return float(out.logits[0, -1].double().softmax(-1)[answer])

    def activation(out: Any) -> Tensor:
        found = out[0] if isinstance(out, tuple) else out
        assert isinstance(found, Tensor)
        return found

    patched: dict[str, dict[str, list[float]]] = {}
    for part in PARTS:
        patched[part] = {group: [] for group in groups}
        for module in modules[part]:
            kept: list[Tensor] = []
            run(clean, lambda _, __, out: kept.append(activation(out).clone()), module)
            for group, positions in groups.items():

                def put(_: Any, __: Any, out: Any, positions: list[int] = positions, kept: Any = kept) -> Any:
                    x = activation(out).clone()
                    x[:, positions] = kept[0][:, positions]
                    return (x, *out[1:]) if isinstance(out, tuple) else x

                patched[part][group].append(run(corrupted, put, module))
    return run(clean), run(corrupted), patched
