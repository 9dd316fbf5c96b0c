"""A tiny π0 behind its own server, and the same checkpoint in Transformers with plain hooks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from steersman.server.pi0 import app as application
from steersman.server.pi0.engine import Pi0Engine, Pi0Frontend
from steersman.server.policies.pi0 import Pi0, Pi0Prompt
from steersman.server.policies.policy import Floats, Observation
from steersman.server.policies.robots import robots_of
from steersman.server.reports import Reports, block
from steersman.server.settings import Settings
from steersman.steering.sites import Site
from tests.models.tiny_pi0 import BACKBONE, CAMERAS, SIZE

Change = Callable[[Tensor], Tensor]
"""[n, d] -> [n, d]"""


def observation(
    seed: int, instruction: str = "pick up the red block", size: tuple[int, int] = (SIZE, SIZE)
) -> Observation:
    draw = np.random.default_rng(seed)
    pictures = {f"camera {i}": draw.integers(0, 256, (*size, 3), np.uint8) for i in range(CAMERAS)}
    return Observation(pictures, instruction, draw.normal(size=3), seed=seed)


class Station:
    """The application, and its parts."""

    def __init__(self, folder: Path, store: Path, **options: Any) -> None:
        settings = Settings(store=str(store), **options.pop("settings", {}))
        self.app: Any = application.build(
            folder, settings, device="cpu", dtype="float32", registry=CollectorRegistry(), **options
        )
        self.frontend: Pi0Frontend = self.app.state.steersman.frontend
        self.engine: Pi0Engine = self.app.state.pi0
        policy = robots_of(self.app).policy
        assert isinstance(policy, Pi0)
        self.policy = policy

    def prompt(self, seen: Observation) -> Pi0Prompt:
        return self.policy.prompt(seen)

    def batch(self, asked: Sequence[tuple[Observation, Any]]) -> list[tuple[Floats, Any]]:
        """One batch of these observations with their steering: the model's actions and the reports."""
        tickets, prompts = {}, {}
        for i, (seen, steering) in enumerate(asked):
            name = f"r{i}"
            prompts[name] = self.policy.prompt(seen)
            if steering is not None:
                tickets[name] = ticket = asyncio.run(self.frontend.prepare(steering))
                self.engine.steer(self.frontend, name, prompts[name], ticket.key)
        found = self.engine.model.sample(prompts)
        out: list[tuple[Floats, Any]] = []
        for name, actions in zip(prompts, found, strict=True):
            report = None
            if (ticket := tickets.get(name)) is not None:
                raw = asyncio.run(Reports(self.frontend).fetch(ticket))
                report = block(ticket, raw, "tokens" if ticket.whole else "summary")
                self.engine.forget(name)
                self.frontend.finish(ticket)
            out.append((actions, report))
        return out


class Oracle:
    """Transformers' model of the checkpoint, by itself."""

    def __init__(self, folder: Path) -> None:
        from transformers import PI0ForConditionalGeneration

        self.model: Any = PI0ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def sample(
        self,
        prompt: Pi0Prompt,
        changes: Mapping[tuple[int, Site], Change] | None = None,
        at: Sequence[int] | None = None,
    ) -> Floats:
        """[chunk, max_action_dim]. ``changes`` by layer and site, at positions ``at`` (None: all)."""
        length = len(prompt.token_ids)
        with self._hooked(changes or {}, length, None if at is None else set(at)):
            ids = torch.tensor([list(prompt.token_ids)])
            found = self.model.sample_actions(
                state=prompt.state[None],
                input_ids=ids,
                pixel_values=prompt.pixels[None],
                noise=prompt.noise[None],
                attention_mask=torch.ones_like(ids),
                pixel_attention_mask=torch.ones(1, len(prompt.pixels), dtype=torch.bool),
            )
        out: Floats = found[0].double().numpy()
        return out

    @contextmanager
    def _hooked(self, changes: Mapping[tuple[int, Site], Change], length: int, at: set[int] | None) -> Iterator[None]:
        handles: list[Any] = []
        for (number, site), change in changes.items():
            expert = number >= BACKBONE
            layers = self.model.model.dit.layers if expert else self.model.model.vlm.language_model.layers
            handles += _hook(layers[number - BACKBONE * expert], site, _Passes(length if expert else 0, at, change))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Passes:
    """The change at one place, pass after pass; the first one's first row is at position ``start``."""

    def __init__(self, start: int, at: set[int] | None, change: Change) -> None:
        self.start, self.at, self.change = start, at, change

    def __call__(self, x: Tensor) -> Tensor:
        rows = [i for i in range(x.shape[1]) if self.at is None or self.start + i in self.at]
        self.start += x.shape[1]
        out = x.clone()
        out[:, rows] = self.change(x[:, rows])
        return out


def _hook(layer: Any, site: Site, passes: _Passes) -> list[Any]:
    def before(module: Any, inputs: tuple[Tensor, ...]) -> Any:
        return (passes(inputs[0]), *inputs[1:])

    def after(module: Any, inputs: Any, output: Any) -> Any:
        return (passes(output[0]), *output[1:]) if isinstance(output, tuple) else passes(output)

    if site is Site.RESID_PRE:
        return [layer.register_forward_pre_hook(before)]
    if site is Site.RESID_POST:
        return [layer.register_forward_hook(after)]
    if site is Site.ATTN_OUT:
        return [layer.self_attn.register_forward_hook(after)]
    if site is Site.MLP_OUT:
        return [layer.mlp.register_forward_hook(after)]
    if site is Site.ATTN_Z:
        return [layer.self_attn.o_proj.register_forward_pre_hook(before)]
    if site is Site.MLP_POST:
        return [layer.mlp.down_proj.register_forward_pre_hook(before)]
    entering: list[Tensor] = []

    def enter(module: Any, inputs: tuple[Tensor, ...]) -> None:
        entering[:] = [inputs[0]]

    def between(module: Any, inputs: Any, output: Any) -> Any:
        stream = entering[0] + output[0]
        return (output[0] + passes(stream) - stream, *output[1:])

    return [layer.register_forward_pre_hook(enter), layer.self_attn.register_forward_hook(between)]
