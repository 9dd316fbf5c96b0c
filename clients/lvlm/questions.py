"""Writes scenes that were not learnt from, with POPE's questions about them, as ``steersman eval`` reads them.

    python -m steersman.clients.lvlm.questions --out DIR [--scenes 500]

As in POPE (arXiv 2305.10355), images show three objects or more; of each, three that are there are asked for, and three
that are not, chosen in three ways: at random, the most frequent of all, and those that most often come with what is
there. Beside ``pope_random.jsonl``, ``pope_popular.jsonl`` and ``pope_adversarial.jsonl``, which share the questions
that are answered yes, ``chair.jsonl`` has the objects of each image and ``boxes.jsonl`` where they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.clients.lvlm import scenes
from steersman.clients.lvlm.scenes import KINDS, Scene
from steersman.clients.lvlm.train import TEST
from steersman.clients.lvlm.vocabulary import NO, YES, question

SAMPLINGS = ("random", "popular", "adversarial")
EACH = 3  # questions of either answer about an image
COUNTED = 2_000  # scenes from which it is known what is frequent and what comes together
SKIPPED = 500  # the first test scenes are for looking at while training
ENDINGS = {True: YES, False: NO}


def held_out(count: int, seed: int = 0, first: int = SKIPPED) -> Iterator[tuple[int, Scene]]:
    """Scenes of enough objects that are not learnt from, with their numbers, from the number ``first`` on."""
    number = first
    while count:
        scene = scenes.draw(seed + TEST, number)
        if len(scene.kinds) >= EACH:
            yield number, scene
            count -= 1
        number += 1


@cache
def together(seed: int) -> NDArray[np.int64]:
    """[kinds, kinds] in how many scenes two kinds are; on the diagonal, in how many each is."""
    out = np.zeros((len(KINDS), len(KINDS)), np.int64)
    for number in range(COUNTED):
        kinds = np.array(scenes.draw(seed, number).kinds)
        out[kinds[:, None], kinds[None]] += 1
    return out


def absent(scene: Scene, sampling: str, rng: np.random.Generator, seed: int) -> list[int]:
    """``EACH`` kinds that are not there. Of equal ones those that come first in ``KINDS``."""
    others = np.array([kind for kind in range(len(KINDS)) if kind not in scene.kinds])
    if sampling == "random":
        return [int(kind) for kind in rng.permutation(others)[:EACH]]
    counts = together(seed)
    odds = counts.diagonal() if sampling == "popular" else counts[list(scene.kinds)].sum(0)
    return [int(kind) for kind in others[np.argsort(-odds[others], kind="stable")][:EACH]]


def asked(number: int, scene: Scene, seed: int = 0) -> dict[str, list[tuple[int, bool]]]:
    """By sampling what is asked for, and whether it is there, in turn."""
    rng = np.random.default_rng([seed, number, 2])
    there = [int(kind) for kind in rng.permutation(scene.kinds)[:EACH]]
    return {
        sampling: [
            pair
            for yes, no in zip(there, absent(scene, sampling, rng, seed), strict=True)
            for pair in ((yes, True), (no, False))
        ]
        for sampling in SAMPLINGS
    }


def write(out: Path, drawn: Iterable[tuple[int, Scene]], seed: int = 0) -> None:
    """Images, questions, objects and boxes into the folder ``out``."""
    from PIL import Image

    (out / "images").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[Any]] = {name: [] for name in (*(f"pope_{s}" for s in SAMPLINGS), "chair", "boxes")}
    for number, scene in drawn:
        image = f"{number:06}.png"
        Image.fromarray(scene.picture).save(out / "images" / image)
        for sampling, pairs in asked(number, scene, seed).items():
            rows = lines[f"pope_{sampling}"]
            for kind, there in pairs:
                rows.append(
                    {"question_id": len(rows) + 1, "image": image, "text": question(kind), "label": ENDINGS[there]}
                )
        names = [KINDS[kind] for kind in scene.kinds]
        lines["chair"].append({"image": image, "objects": names})
        lines["boxes"].append({"image": image, "boxes": dict(zip(names, scene.boxes, strict=True))})
    for name, rows in lines.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_boxes(folder: Path) -> dict[str, dict[str, list[int]]]:
    """By image and object, the boxes that :func:`write` wrote into ``folder``."""
    told = map(json.loads, (folder / "boxes.jsonl").read_text().splitlines())
    return {each["image"]: each["boxes"] for each in told}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=500, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="that of the training [%(default)s]")
    args = parser.parse_args(argv)
    write(args.out, held_out(args.scenes, args.seed), args.seed)


if __name__ == "__main__":
    main()
