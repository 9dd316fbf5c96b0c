"""Neurons of a trained policy that are more active before a motion one way than before the other, as steering.

    python -m steersman.clients.policies.contrast CHECKPOINT --demonstrations DIR --out up.json --control control.json

Demonstrations are parted by what the expert does next: how far it moves along one dimension (``up``, ``down``), or how
far at all (``fast``, ``slow``). The quarter in which it does so most is set against the quarter in which it does so
least. Compared are the neurons' activations at the tokens that the motion's own tokens are predicted from, and these
tokens are edited unless others are asked for. As many neurons are taken of every layer. The control is as many random
ones of the same layers, set to the same value.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.clients.policies import demonstrations, model
from steersman.clients.policies.train import BATCH, Lessons
from steersman.clients.simulators.metaworld import INSTRUCTIONS, TASKS, MetaWorld
from steersman.steering.neurons_contrast import chance, contrast, control_sets, strongest

Neuron = tuple[int, int]  # layer, index

SAMPLES = 1000  # demonstrations that are looked at, the last ones
PART = 0.25  # of them, on each side


@dataclass(frozen=True)
class Motion:
    """More (``sign`` 1) or less (-1) along ``dimensions`` of an action: of one of them, the number; else the length."""

    dimensions: tuple[int, ...]
    sign: int

    def of(self, actions: Tensor) -> Tensor:
        """[n], means over the chunk of ``actions`` [n, chunk, dims], in the robot's units; without the sign."""
        moved = actions[..., list(self.dimensions)]
        return (moved[..., 0] if len(self.dimensions) == 1 else moved.norm(dim=-1)).mean(1)

    def places(self, lessons: Lessons) -> list[int]:
        """The positions of the tokens from which the numbers of ``dimensions`` are predicted, of a whole chunk."""
        start, (_, chunk, dims) = lessons.prompts.shape[1], lessons.actions.shape
        return [start - 1 + dims * i + dimension for i in range(chunk) for dimension in self.dimensions]


MOVES = tuple(int(i) for i in np.flatnonzero(MetaWorld.moves))
MOTIONS = {"up": Motion((2,), 1), "down": Motion((2,), -1), "fast": Motion(MOVES, 1), "slow": Motion(MOVES, -1)}


@torch.no_grad()
def activations(policy: Any, lessons: Lessons, motion: Motion) -> dict[int, Tensor]:
    """By layer, [n, d_ff]: means over the tokens from which the motion's numbers are predicted."""
    n, before = len(lessons.bins), torch.tensor(motion.places(lessons))
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


def find(policy: Any, lessons: Lessons, motion: Motion, count: int) -> tuple[list[Neuron], float, float]:
    """``count`` neurons of each layer, their mean activation before such motions, and the share beyond chance."""
    order = (motion.sign * motion.of(lessons.actions)).argsort()
    part = int(PART * len(order))
    found = activations(policy, lessons, motion)
    low, high = ({layer: rows[side] for layer, rows in found.items()} for side in (order[:part], order[-part:]))
    contrasts = {layer: contrast(high[layer], low[layer]) for layer in found}
    chosen = [pair for layer, each in contrasts.items() for pair in strongest({layer: each}, count, sign=1)]
    level = chance(high, low)
    mean = float(np.mean([high[layer][:, i].mean() for layer, i in chosen]))
    beyond = float(np.mean([contrasts[layer].effect[i] > level for layer, i in chosen]))
    return chosen, mean, beyond


def controls(policy: Any, chosen: Sequence[Neuron], count: int, besides: Collection[Neuron] = ()) -> list[list[Neuron]]:
    """``count`` random sets with as many neurons in each layer as ``chosen``, and none of it or of ``besides``."""
    config = policy.config.text_config
    widths = dict.fromkeys(range(config.num_hidden_layers), config.intermediate_size)
    return control_sets(chosen, widths, count, besides=besides)


def steering(neurons: Sequence[Neuron], value: float, tokens: Any) -> dict[str, Any]:
    inline = [list(pair) for pair in neurons]
    edit = {"op": "neurons", "neurons": {"inline": inline}, "mode": "set", "value": value, "tokens": tokens}
    return {"interventions": [edit]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="find neurons that stand for a motion")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--demonstrations", type=Path, required=True)
    parser.add_argument("--motion", choices=MOTIONS, default="up", help="[%(default)s]")
    parser.add_argument("--top", type=int, default=3, help="neurons of each layer [%(default)s]")
    parser.add_argument("--value", type=float, required=True, help="what they are set to")
    parser.add_argument("--tokens", choices=("all", "prompt", "generated"), help="[those the motion is predicted from]")
    parser.add_argument("--out", type=Path, required=True, help="the steering object, for `steersman robot run`")
    parser.add_argument("--control", type=Path, help="the same of random neurons")
    args = parser.parse_args(argv)
    policy, action, state = model.load(args.checkpoint)
    lessons = Lessons(demonstrations.load(args.demonstrations).last(SAMPLES), INSTRUCTIONS[args.task], action, state)
    motion = MOTIONS[args.motion]
    chosen, mean, beyond = find(policy, lessons, motion, args.top)
    tokens = args.tokens or {"positions": motion.places(lessons)}
    args.out.write_text(json.dumps(steering(chosen, args.value, tokens)) + "\n")
    if args.control:
        (control,) = controls(policy, chosen, 1)
        args.control.write_text(json.dumps(steering(control, args.value, tokens)) + "\n")
    about = f"{beyond:.0%} beyond chance, {mean:.3g} on average before such motions, set to {args.value:g}"
    print(f"{len(chosen)} neurons of {args.motion}, {about}: {chosen}")


if __name__ == "__main__":
    main()
