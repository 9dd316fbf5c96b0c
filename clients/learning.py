"""The loop that trains the project's small models: AdamW, resumed where it was stopped to the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EVERY = 60.0  # seconds between two states kept


@dataclass(frozen=True)
class Schedule:
    """The rate rises for ``warm`` steps to ``rate``, then falls along a cosine to nothing."""

    steps: int
    rate: float = 1e-3
    warm: int = 100
    decay: float = 0.01

    def at(self, step: int) -> float:
        if step < self.warm:
            return self.rate * (step + 1) / self.warm
        return self.rate * 0.5 * (1 + float(np.cos(np.pi * (step - self.warm) / max(1, self.steps - self.warm))))


def kept(file: Path, settings: Mapping[str, Any]) -> Any:
    """What was kept in ``file``; None where it is not there. Raises ValueError where it is of other settings."""
    if not file.exists():
        return None
    state = torch.load(file, weights_only=True)
    if state["settings"] != dict(settings):
        raise ValueError(
            f"{file} is of another training, {state['settings']}, not {dict(settings)}: remove it to begin"
        )
    return state


def keep(file: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    torch.save({"settings": dict(settings), **state}, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def learn(
    parts: nn.Module,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    file: Path,
    told: Callable[[], str] = str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Trains the parameters of ``parts``; ``loss`` of a step must depend on its number and on them alone.

    The state is in ``file`` every minute and after the last step, and is gone on from where that is; ``told`` is
    printed with each. Raises ValueError where it is of another schedule or other ``settings``.
    """
    settings = {**asdict(schedule), **(settings or {})}
    chosen = [p for p in parts.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.decay)
    step, spent = 0, 0.0
    if state := kept(file, settings):
        parts.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["seconds"]
    started = saved = time.monotonic()
    while step < schedule.steps:
        found = loss(step)
        optimiser.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = schedule.at(step)
        optimiser.step()
        step += 1
        now = time.monotonic()
        if now - saved > EVERY or step == schedule.steps:
            saved, seconds = now, spent + now - started
            state = {"model": parts.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            keep(file, settings, {**state, "seconds": seconds})
            print(f"step {step}/{schedule.steps}, {seconds:.0f} s: loss {found.item():.4f} {told()}", flush=True)
