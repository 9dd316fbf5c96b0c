"""Teaches a policy's vision tower to see what matters, before its language model is trained.

What an expert does next is regressed from the projected patches and the state, through a small head that is then
thrown away. It costs a quarter of what a step of the whole model does, and every number has a gradient of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from steersman.clients.policies import model
from steersman.clients.small_llava import look

BATCH, RATE, HIDDEN = 64, 1e-3, 128


def train(policy: Any, pictures: Tensor, states: Tensor, wanted: Tensor, steps: int, seed: int) -> list[float]:
    """``pictures`` uint8 [n, cameras, height, width, 3], ``states`` [n, dims], ``wanted`` [n, numbers] in [0, 1].

    The squared error of each step's batch.
    """
    torch.manual_seed(seed)
    patches = nn.Linear(pictures.shape[1] * model.PATCHES * model.WIDTH, HIDDEN)
    sizes = (HIDDEN + states.shape[1], HIDDEN, HIDDEN, wanted.shape[1])
    first, middle, last = (nn.Linear(a, b) for a, b in pairwise(sizes))
    head = nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)
    trained = (policy.model.vision_tower, policy.model.multi_modal_projector, patches, head)
    optimiser = torch.optim.AdamW([p for part in trained for p in part.parameters()], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    errors: list[float] = []
    for step in range(1, steps + 1):
        rows = torch.randint(len(wanted), (BATCH,), generator=generator)
        summed = patches(look(policy, pictures[rows]).flatten(1))
        loss = ((head(torch.cat([summed, states[rows]], dim=1)) - wanted[rows]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        errors.append(loss.item())
        if step % 100 == 0:
            print(f"eyes: step {step}/{steps}: squared error {sum(errors[-100:]) / 100:.5f}", flush=True)
    return errors
