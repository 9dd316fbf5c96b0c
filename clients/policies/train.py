"""Trains a small policy on demonstrations, on one CPU core.

    python -m steersman.clients.policies.train --task reach-v3 --demonstrations DIR --out CHECKPOINT

First the vision tower alone (``eyes.py``), then all of it. Every number of the next actions is one token, learnt with
the tokens before it given. The target is not the one bin but a bell over it and its neighbours, so that a near miss
costs little: bins are in order. State is kept every minute in ``CHECKPOINT/training.pt``, and the same command goes on
from there, to the same weights as without a stop. Another command is refused there. ``--start`` begins with the
weights of a policy of another task.
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

from steersman.clients.learning import Schedule, keep, kept, learn
from steersman.clients.policies import demonstrations, eyes, model, vocabulary
from steersman.clients.policies.demonstrations import Demonstrations
from steersman.clients.policies.vocabulary import BINS, FIRST_ACTION, Scale
from steersman.clients.simulators.metaworld import INSTRUCTIONS, TASKS, MetaWorld
from steersman.clients.small_llava import IMAGE, look

BATCH = 32
RATE, WARM = 1e-3, 100  # of the schedule
BELL = 0.7  # bins, the width of the target
HELD = 500  # samples that are only looked at, the last ones


class Lessons:
    """Demonstrations as tensors."""

    def __init__(self, shown: Demonstrations, instruction: str, action: Scale, state: Scale) -> None:
        cameras = shown.pictures.shape[1]
        prompts = vocabulary.prompts(instruction, shown.states, state, cameras * model.PATCHES)
        self.pictures = torch.from_numpy(shown.pictures)  # uint8 [n, cameras, height, width, 3]
        self.states = torch.from_numpy(state.into(shown.states).astype(np.float32))  # [n, state dims]
        self.actions = torch.from_numpy(shown.actions)  # [n, chunk, dims], in the robot's units
        self.prompts = torch.from_numpy(prompts)  # [n, length]
        where = vocabulary.bins(shown.actions, action).reshape(len(prompts), -1)
        self.bins = torch.from_numpy(where.astype(np.float32))  # [n, chunk · dims], unrounded
        self.train = len(self.bins) - HELD
        if self.train < BATCH:
            raise ValueError(f"{len(self.bins)} samples are too few: {HELD} are held out")

    def logits(self, policy: Any, rows: Tensor) -> Tensor:
        """[rows, chunk · dims, BINS], each token after the right ones before it."""
        answers = FIRST_ACTION + self.bins[rows].round().long()
        ids = torch.cat([self.prompts[rows], answers[:, :-1]], dim=1)
        embedded = policy.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == IMAGE)[..., None], look(policy, self.pictures[rows]))
        last = policy.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        out: Tensor = policy.lm_head(last[:, -self.bins.shape[1] :])[..., FIRST_ACTION:]
        return out

    def loss(self, policy: Any, rows: Tensor) -> Tensor:
        bell = -((torch.arange(BINS) - self.bins[rows][..., None]) ** 2) / (2 * BELL**2)
        return -(bell.softmax(-1) * self.logits(policy, rows).log_softmax(-1)).sum(-1).mean()

    @torch.no_grad()
    def error(self, policy: Any) -> float:
        """How far the likeliest bins are off on what is held out, of the whole range."""
        held = torch.arange(self.train, len(self.bins))
        off = [(self.logits(policy, rows).argmax(-1) - self.bins[rows]).abs() for rows in held.split(BATCH)]
        return float(torch.cat(off).mean()) / BINS


def train(policy: Any, lessons: Lessons, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """How it went. Goes on from ``out/training.pt``, and raises ValueError where that is of other settings."""

    def loss(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return lessons.loss(policy, torch.randint(lessons.train, (BATCH,), generator=draw))

    def told() -> str:
        return f"held out {lessons.error(policy):.4f}"

    settings = {"steps": steps, "seed": seed, "samples": lessons.train}
    learn(policy, loss, Schedule(steps, RATE, WARM), out / "training.pt", told, settings)
    return {
        **settings,
        "held_out_error": lessons.error(policy),
        "parameters": sum(p.numel() for p in policy.parameters()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="train a small policy on demonstrations")
    parser.add_argument("--task", choices=TASKS, default="reach-v3")
    parser.add_argument("--demonstrations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--eyes-steps", type=int, default=800, help="of the vision tower alone, before")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with [random weights]")
    args = parser.parse_args(argv)
    shown = demonstrations.load(args.demonstrations)
    action = Scale.of(shown.actions.reshape(-1, shown.actions.shape[-1]), MetaWorld.moves, 0.01)
    state = Scale.of(shown.states, np.ones(shown.states.shape[1], np.bool_), 0.0)
    lessons = Lessons(shown, INSTRUCTIONS[args.task], action, state)
    args.out.mkdir(parents=True, exist_ok=True)
    policy = (model.load(args.start)[0] if args.start else model.build(args.seed)).train()
    n, seeing = lessons.train, args.out / "eyes.pt"
    settings = {"eyes_steps": args.eyes_steps, "seed": args.seed, "samples": n}
    settings["start"] = args.start.name if args.start else None
    if seen := kept(seeing, settings):
        policy.load_state_dict(seen["model"])
    else:
        wanted = lessons.bins[:n] / BINS
        eyes.train(policy, lessons.pictures[:n], lessons.states[:n], wanted, args.eyes_steps, args.seed)
        keep(seeing, settings, {"model": policy.state_dict()})
    about = train(policy, lessons, args.out, args.steps, args.seed)
    key = args.task.replace("-", "_")
    model.save(policy.eval(), model.describe(key, shown.pictures.shape[1], action, state), args.out)
    (args.out / "training.json").write_text(json.dumps({"task": args.task, **settings, **about}, indent=2) + "\n")
    for file in (seeing, args.out / "training.pt"):
        file.unlink()


if __name__ == "__main__":
    main()
