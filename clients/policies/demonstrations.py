"""Demonstrations of a scripted expert, for training a policy: pictures and state, and what the expert does next.

    python -m steersman.clients.policies.demonstrations --task reach-v3 --out DIR --episodes 4000

An expert alone shows only the way from one start. So between what is recorded the hand is now and then pushed about
at random; from wherever it is then, the next ``CHUNK`` actions are the expert's, undisturbed, and these are the label.
Files are shards of ``SHARD`` episodes, written beside and renamed; a run that was stopped goes on with the next one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steersman.clients.simulators.metaworld import TASKS, MetaWorld
from steersman.clients.simulators.simulator import Floats, Simulator

CHUNK = 4  # actions in one label
SHARD = 100  # episodes
SAMPLES = 5  # of one episode
PUSHED = 0.6  # the share of samples before which the hand is pushed
PUSH = 24  # actions at most, of one push
TRAIN_SEEDS = 1_000_000  # the first seed: those of evaluation are small numbers


class Shown(Simulator, Protocol):
    """A simulator that has an expert."""

    def expert(self) -> Floats: ...


@dataclass(frozen=True)
class Demonstrations:
    pictures: NDArray[np.uint8]  # [n, cameras, height, width, 3]
    states: NDArray[np.float32]  # [n, state dims]
    actions: NDArray[np.float32]  # [n, CHUNK, dims]

    def last(self, n: int) -> Demonstrations:
        return Demonstrations(self.pictures[-n:], self.states[-n:], self.actions[-n:])

    def save(self, file: Path) -> None:
        part = file.with_suffix(".part")
        with part.open("wb") as out:
            np.savez_compressed(out, pictures=self.pictures, states=self.states, actions=self.actions)
        part.rename(file)


def episode(simulator: Shown, seed: int) -> list[tuple[NDArray[np.uint8], Floats, Floats]]:
    """``SAMPLES`` of (pictures [cameras, height, width, 3], state, actions [CHUNK, dims])."""
    draw = np.random.default_rng(seed)
    simulator.reset(seed)
    found = []
    for _ in range(SAMPLES):
        if draw.random() < PUSHED:
            push = np.where(simulator.moves, draw.uniform(-1, 1, simulator.moves.shape), simulator.expert())
            for _ in range(draw.integers(1, PUSH + 1)):
                simulator.act(push)
        else:
            for _ in range(draw.integers(0, PUSH + 1)):
                simulator.act(simulator.expert())
        seen = simulator.observe()
        actions = []
        for _ in range(CHUNK):
            actions.append(simulator.expert())
            simulator.act(actions[-1])
        found.append((np.stack(list(seen.pictures.values())), seen.state, np.stack(actions)))
    return found


def collect(simulator: Shown, out: Path, episodes: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for first in range(0, episodes, SHARD):
        file = out / f"{simulator.name}-{first:06d}.npz"
        if file.exists():
            continue
        found = [x for i in range(first, first + SHARD) for x in episode(simulator, TRAIN_SEEDS + i)]
        pictures, states, actions = (np.stack(column) for column in zip(*found, strict=True))
        Demonstrations(pictures, states.astype(np.float32), actions.astype(np.float32)).save(file)
        print(f"{file.name}: {len(found)} samples", flush=True)


def load(folder: Path) -> Demonstrations:
    """All that is there. Raises FileNotFoundError where there is nothing."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"{folder} has no demonstrations: collect some first")
    parts = []
    for file in files:
        with np.load(file) as data:
            parts.append([data[name] for name in ("pictures", "states", "actions")])
    return Demonstrations(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="record demonstrations of a scripted expert")
    parser.add_argument("--task", choices=TASKS, default="reach-v3")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=4000)
    args = parser.parse_args(argv)
    collect(MetaWorld(args.task), args.out, args.episodes)


if __name__ == "__main__":
    main()
