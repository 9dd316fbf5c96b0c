"""Trains the model of scenes, on one CPU core.

    python -m steersman.clients.lvlm.train --out models/scenes

First the vision tower (``eyes.py``), then, with the tower as it is, a shallow language model and the deep one that
grows out of it (``lessons.py``, ``model.py``), on scenes that are drawn as they are needed. State is kept every minute
in the folder, and the same command goes on from there to the same weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steersman.clients.learning import Schedule, learn
from steersman.clients.lvlm import eyes, lessons, model

EYES_SCENES, SCENES = 64, 16  # of a step
STAGES = {  # the vision tower alone; a shallow model; the deep one
    "eyes": Schedule(450, rate=2e-3, warm=50),
    "shallow": Schedule(350, rate=2e-3, warm=50),
    "deep": Schedule(100, rate=1e-3, warm=20),
}
HELD = 64  # scenes that are only looked at while training
TEST = 1_000_000_007  # added to the seed: scenes that are not learnt from


def train(stages: Mapping[str, Schedule], seed: int, out: Path) -> tuple[Any, dict[str, Any]]:
    """The model and how it went. Goes on from the states in ``out``."""
    kept = {name: out / f"{name}.pt" for name in stages}
    held = lessons.batch(seed + TEST, 0, HELD)
    kinds = eyes.shown(held.scenes)
    shallow = model.build(seed)
    first = stages["eyes"].steps * EYES_SCENES // SCENES  # every stage has scenes of its own

    def answer(made: Any, name: str, first: int) -> None:
        """All but the tower, on the batches from ``first`` on."""
        made.model.vision_tower.requires_grad_(False)
        told = partial(_told, lambda: lessons.right(made, held))
        learn(
            made,
            lambda step: lessons.loss(made, lessons.batch(seed, first + step, SCENES)),
            stages[name],
            kept[name],
            told,
        )

    if not kept["deep"].exists():
        naming = eyes.Naming(shallow)
        if not kept["shallow"].exists():
            told = partial(_told, lambda: eyes.right(naming, held.pictures, kinds))
            learn(naming, lambda step: naming(*eyes.batch(seed, step, EYES_SCENES)), stages["eyes"], kept["eyes"], told)
        answer(shallow, "shallow", first)
    deep = model.deepen(shallow, seed)
    answer(deep, "deep", first + stages["shallow"].steps)
    about = {"seed": seed, "scenes": {"eyes": EYES_SCENES, "shallow": SCENES, "deep": SCENES}}
    about |= {"stages": {name: asdict(schedule) for name, schedule in stages.items()}, "questions": lessons.QUESTIONS}
    about |= {"parameters": sum(p.numel() for p in deep.parameters()), "held_out": lessons.right(deep, held)}
    return deep, about


def _told(shares: Callable[[], dict[str, float]]) -> str:
    return "held out " + ", ".join(f"{name} {share:.3f}" for name, share in shares().items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--seed", type=int, default=0)
    for name, schedule in STAGES.items():
        parser.add_argument(f"--{name}-steps", type=int, default=schedule.steps, help="[%(default)s]")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums do not depend on how many cores there are
    args.out.mkdir(parents=True, exist_ok=True)
    stages = {name: replace(schedule, steps=getattr(args, f"{name}_steps")) for name, schedule in STAGES.items()}
    made, about = train(stages, args.seed, args.out)
    model.save(made.eval(), args.out)
    (args.out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    for name in stages:
        (args.out / f"{name}.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
