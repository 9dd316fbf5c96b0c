"""Neurons of a trained policy that are more active before a motion one way than before the other, as steering.

    python -m steersman.clients.policies.contrast CHECKPOINT --demonstrations DIR --out up.json --control control.json

Demonstrations are parted by what the expert does next along one dimension: the quarter that moves most one way against
the quarter that moves most the other. Compared are the neurons' activations at the tokens that the motion's own tokens
are predicted from, and these tokens are edited unless others are asked for. The control is as many random neurons of
the same layers, set to the same value.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.clients.policies import demonstrations, model
from steersman.clients.policies.train import BATCH, Lessons
from steersman.clients.simulators.metaworld import INSTRUCTIONS, TASKS
from steersman.steering.neurons_contrast import chance, contrast, control_sets, strongest

SAMPLES = 1000  # demonstrations that are looked at, the last ones
PART = 0.25  # of them, on each side
DIMENSIONS = ("x", "y", "z")


def places(lessons: Lessons, dimension: int) -> list[int]:
    """The positions of the tokens from which numbers of ``dimension`` are predicted, one for each action of a chunk."""
    start, (_, chunk, dims) = lessons.prompts.shape[1], lessons.actions.shape
    return [start - 1 + dims * i + dimension for i in range(chunk)]


@torch.no_grad()
def activations(policy: Any, lessons: Lessons, dimension: int) -> dict[int, Tensor]:
    """By layer, [n, d_ff]: means over the tokens from which numbers of ``dimension`` are predicted."""
    n, before = len(lessons.bins), torch.tensor(places(lessons, dimension))
    found: dict[int, list[Tensor]] = {}
    layers = policy.model.language_model.layers
    handles = []
    for i, layer in enumerate(layers):

        def keep(module: Any, inputs: tuple[Tensor], i: int = i) -> None:
            found.setdefault(i, []).append(inputs[0][:, before].mean(1))

        handles.append(layer.mlp.down_proj.register_forward_pre_hook(keep))
    try:
        for rows in torch.arange(n).split(BATCH):
            lessons.logits(policy, rows)
    finally:
        for handle in handles:
            handle.remove()
    return {i: torch.cat(parts) for i, parts in found.items()}


def find(policy: Any, lessons: Lessons, dimension: int, count: int) -> tuple[list[tuple[int, int]], float, float]:
    """The neurons, the mean of their activations where the motion is positive, and the share of them beyond chance."""
    order = lessons.actions[:, :, dimension].mean(1).argsort()
    part = int(PART * len(order))
    found = activations(policy, lessons, dimension)
    low, high = ({layer: rows[side] for layer, rows in found.items()} for side in (order[:part], order[-part:]))
    contrasts = {layer: contrast(high[layer], low[layer]) for layer in found}
    chosen = strongest(contrasts, count, sign=1)
    level = chance(high, low)
    mean = float(np.mean([high[layer][:, i].mean() for layer, i in chosen]))
    beyond = float(np.mean([contrasts[layer].effect[i] > level for layer, i in chosen]))
    return chosen, mean, beyond


def steering(neurons: Sequence[tuple[int, int]], value: float, tokens: Any) -> dict[str, Any]:
    inline = [list(pair) for pair in neurons]
    edit = {"op": "neurons", "neurons": {"inline": inline}, "mode": "set", "value": value, "tokens": tokens}
    return {"interventions": [edit]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="find neurons that stand for a motion")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--demonstrations", type=Path, required=True)
    parser.add_argument("--dimension", choices=DIMENSIONS, default="z")
    parser.add_argument("--top", type=int, default=10, help="neurons [%(default)s]")
    parser.add_argument("--value", type=float, required=True, help="what they are set to")
    parser.add_argument("--tokens", choices=("all", "prompt", "generated"), help="[those the motion is predicted from]")
    parser.add_argument("--out", type=Path, required=True, help="the steering object, for `steersman robot run`")
    parser.add_argument("--control", type=Path, help="the same of random neurons")
    args = parser.parse_args(argv)
    policy, action, state = model.load(args.checkpoint)
    lessons = Lessons(demonstrations.load(args.demonstrations).last(SAMPLES), INSTRUCTIONS[args.task], action, state)
    dimension = DIMENSIONS.index(args.dimension)
    chosen, mean, beyond = find(policy, lessons, dimension, args.top)
    tokens = args.tokens or {"positions": places(lessons, dimension)}
    args.out.write_text(json.dumps(steering(chosen, args.value, tokens)) + "\n")
    if args.control:
        config = policy.config.text_config
        widths = dict.fromkeys(range(config.num_hidden_layers), config.intermediate_size)
        (control,) = control_sets(chosen, widths, 1)
        args.control.write_text(json.dumps(steering(control, args.value, tokens)) + "\n")
    about = f"{beyond:.0%} beyond chance, {mean:.3g} on average before such motions, set to {args.value:g}"
    print(f"{len(chosen)} neurons of {args.dimension}, {about}: {chosen}")


if __name__ == "__main__":
    main()
