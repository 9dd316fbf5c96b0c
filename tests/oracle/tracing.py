"""Causal tracing with plain hooks on Hugging Face's LLaVA, written without anything of the project's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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

    patched: dict[str, dict[str, list[float]]] = {}
    for part in PARTS:
        patched[part] = {group: [] for group in groups}
        for module in modules[part]:
            kept: list[Tensor] = []
            run(clean, partial(_keep, kept), module)
            for group, positions in groups.items():
                patched[part][group].append(run(corrupted, partial(_put, kept[0], positions), module))
    return run(clean), run(corrupted), patched


def _keep(kept: list[Tensor], _: Any, __: Any, out: Any) -> None:
    kept.append((out[0] if isinstance(out, tuple) else out).clone())


def _put(rows: Tensor, positions: list[int], _: Any, __: Any, out: Any) -> Any:
    x = (out[0] if isinstance(out, tuple) else out).clone()
    x[:, positions] = rows[:, positions]
    return (x, *out[1:]) if isinstance(out, tuple) else x
