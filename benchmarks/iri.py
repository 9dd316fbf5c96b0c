"""IRI on a small vision-language model, as its paper measures it, over HTTP: python -m benchmarks.iri

Serves ``models/scenes`` in float32, traces recovery rates on questions about scenes of their own (the job ``trace``),
makes the recipe, chooses its scale on further scenes, then asks POPE's three samplings and for captions about scenes
that were used for nothing before: without steering, with the recipe at the paper's strengths for LLaVA-1.5-7B and at
the chosen scale, and at the chosen scale with recipes that have the same rates at layers drawn at random. Last, what an
injection costs.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.iri_report import CHOSEN, PAPER, UNSTEERED
from benchmarks.provenance import save
from rich.console import Console

from steersman.clients.evaluation import asking, benchmark
from steersman.clients.evaluation.asking import Question, Settings
from steersman.clients.evaluation.chair import Chair
from steersman.clients.evaluation.pope import Pope, says_yes
from steersman.clients.jobs import follow
from steersman.clients.lvlm import questions, vocabulary
from steersman.clients.lvlm.questions import SAMPLINGS
from steersman.clients.lvlm.scenes import KINDS
from steersman.clients.sdk import Steersman
from steersman.steering.tracing import Table, Traced, recipe
from tests.e2e.server import serve
from tests.models.tiny_llava import without_torchvision

MODEL = Path(__file__).parents[1] / "models" / "scenes"
NAME = "scenes"
LAMBDA_A, LAMBDA_M = 0.26, 0.16  # the paper's for LLaVA-1.5-7B
LEAST = 0.2  # what the noise must take from an answer's probability: rates are quotients by it
SCALES = (0.5, 1.0, 2.0, 3.0, 4.0)  # of both strengths, among which one is chosen
CAPTION_TOKENS = 32
TIMED_TOKENS = 32
OPTIONS = [
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "32",
    "--limit-mm-per-prompt",
    '{"image":1}',
]
Steering = Mapping[str, Any]
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--traced", type=int, default=40, help="scenes, one question of each [%(default)s]")
    parser.add_argument("--tuned", type=int, default=40, help="scenes that the scale is chosen on [%(default)s]")
    parser.add_argument("--scenes", type=int, default=150, help="that are tested [%(default)s]")
    parser.add_argument("--randoms", type=int, default=6, help="[%(default)s]")
    parser.add_argument("--timed", type=int, default=40, help="pairs of requests [%(default)s]")
    parser.add_argument("--name", default="iri", help="of the result file")
    args = parser.parse_args()
    drawn = questions.held_out(args.traced + args.tuned + args.scenes, 0)
    parts = {part: list(islice(drawn, getattr(args, part))) for part in ("traced", "tuned", "scenes")}
    with tempfile.TemporaryDirectory() as scratch:
        tmp = Path(scratch)
        for part, scenes in parts.items():
            questions.write(tmp / part, scenes)
        env = without_torchvision(tmp / "site")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (env["PYTHONPATH"], os.environ.get("PYTHONPATH"))))
        with serve(args.model, tmp, OPTIONS, env, NAME) as served, Steersman(served.url) as server:
            found = measure(args, server, tmp, [number for number, _ in parts["scenes"]])
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "name")}
    parameters = json.loads((args.model / "training.json").read_text())["parameters"]
    about = {"model": args.model.name, "parameters": parameters, "settings": settings}
    console.print(f"written to {save(args.name, {**about, **found})}")


def measure(args: argparse.Namespace, server: Steersman, tmp: Path, numbers: Sequence[int]) -> dict[str, Any]:
    table = trace(server, tmp / "traced")
    console.print(f"traced: {table.used} of {table.questions} questions are used")
    made = recipe(table, LAMBDA_A, LAMBDA_M)
    tuned = tune(server, Asked.read(tmp / "tuned"), made)
    scale = max(tuned, key=lambda each: (tuned[each], -each))
    console.print("chosen on other scenes:", tuned, scale)
    conditions: dict[str, Steering | None] = {UNSTEERED: None, PAPER: steering(made), CHOSEN: steering(made, scale)}
    randoms = [shuffled(made, seed) for seed in range(args.randoms)]
    conditions |= {f"random-{i}": steering(each, scale) for i, each in enumerate(randoms)}
    asked = Asked.read(tmp / "scenes")
    answers = {name: asked.answers(server, each) for name, each in conditions.items()}
    console.print(f"asked {len(asked.distinct)} questions under {len(conditions)} conditions")
    captions = {name: asked.captions(server, each) for name, each in conditions.items()}
    return {
        "traced": {
            "questions": table.questions,
            "used": table.used,
            "least": LEAST,
            "rates": {c: {g: list(rates) for g, rates in groups.items()} for c, groups in table.rates.items()},
        },
        "recipe": made,
        "scale": {"chosen": scale, "accuracy": {str(each): value for each, value in tuned.items()}},
        "randoms": randoms,
        "pope": {s: benchmark.summary(asked.pope[s], asked.of(s, answers)) for s in SAMPLINGS},
        "chair": benchmark.summary(asked.chair, captions),
        "answers": asked.told(answers, captions, numbers),
        "cost": cost(server, asked.chair.questions[: args.timed], steering(made, scale)),
    }


def trace(server: Steersman, folder: Path) -> Table:
    """Of the first object that each scene's questions ask for."""
    pope, boxes = Pope.read(folder / "pope_random.jsonl", folder / "images"), questions.read_boxes(folder)
    asked, seen = [], set()
    for question, there in zip(pope.questions, pope.labels, strict=True):
        if not there or question.image in seen:
            continue
        seen.add(question.image)
        kind = next(kind for kind in KINDS if kind in question.text)
        picture = base64.b64encode(question.image.read_bytes()).decode()
        box = boxes[question.image.name][kind]
        asked.append({"text": question.text, "image": picture, "answer": vocabulary.YES, "object": kind, "box": box})
    result = follow(server, {"kind": "trace", "questions": asked})
    return Table.of((Traced(q["clean"], q["corrupted"], q["patched"]) for q in result["questions"]), LEAST)


def steering(made: Mapping[str, Any], scale: float = 1.0) -> Steering:
    return {"interventions": [{"op": "inject", "recipe": {"inline": dict(made)}, "scale": scale}], "report": "none"}


def shuffled(made: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The same rates at layers drawn at random: as many sources and targets, of the same weights."""
    rng = np.random.default_rng(seed)
    while True:
        out = {k: v for k, v in made.items() if k not in ("sources", "targets")}
        moved: dict[str, dict[str, list[int]]] = {"sources": {}, "targets": {}}
        for part in ("attn", "mlp"):
            to = rng.permutation(len(made[f"rr_{part}"]))  # layer i goes to to[i]
            rates = np.empty(len(to))
            rates[to] = made[f"rr_{part}"]
            out[f"rr_{part}"] = rates.tolist()
            for field, layers in moved.items():
                layers[part] = sorted(int(to[layer]) for layer in made[field][part])
        if all(moved["targets"][p][-1] > moved["sources"][p][0] for p in ("attn", "mlp")):
            return {**out, **moved}


@dataclass(frozen=True)
class Asked:
    """What is asked about some scenes. A question that two samplings share is asked once."""

    pope: Mapping[str, Pope]
    chair: Chair
    distinct: Mapping[tuple[Path, str], Question]

    @classmethod
    def read(cls, folder: Path) -> Asked:
        pope = {s: Pope.read(folder / f"pope_{s}.jsonl", folder / "images") for s in SAMPLINGS}
        chair = Chair.read(folder / "chair.jsonl", folder / "images", text=vocabulary.CAPTION)
        return cls(pope, chair, {(q.image, q.text): q for each in pope.values() for q in each.questions})

    def answers(self, server: Steersman, steered: Steering | None) -> dict[tuple[Path, str], str]:
        said = asking.ask(server, list(self.distinct.values()), steered, Settings(NAME, 1))
        return dict(zip(self.distinct, said, strict=True))

    def captions(self, server: Steersman, steered: Steering | None) -> list[str]:
        return asking.ask(server, self.chair.questions, steered, Settings(NAME, CAPTION_TOKENS))

    def of(self, sampling: str, answers: Mapping[str, Mapping[tuple[Path, str], str]]) -> dict[str, list[str]]:
        return {n: [each[q.image, q.text] for q in self.pope[sampling].questions] for n, each in answers.items()}

    def told(self, answers: Mapping[str, Any], captions: Mapping[str, Any], numbers: Sequence[int]) -> list[Any]:
        """By scene, what was asked in any sampling, the truth, and what was answered under each condition."""
        truth = {
            (q.image, q.text): label
            for each in self.pope.values()
            for q, label in zip(each.questions, each.labels, strict=True)
        }
        adversarial = {(q.image, q.text) for q in self.pope["adversarial"].questions}
        out = []
        for i, (number, question) in enumerate(zip(numbers, self.chair.questions, strict=True)):
            mine = [key for key in self.distinct if key[0] == question.image]
            rows = [
                {"text": key[1], "there": truth[key], "adversarial": key in adversarial}
                | {"yes": [name for name, said in answers.items() if says_yes(said[key])]}
                for key in mine
            ]
            spoken = {name: said[i] for name, said in captions.items() if not name.startswith("random")}
            out.append({"scene": number, "questions": rows, "captions": spoken})
        return out


def tune(server: Steersman, asked: Asked, made: Mapping[str, Any]) -> dict[float, float]:
    """Mean accuracy over the samplings at each scale."""
    out = {}
    for scale in SCALES:
        answers = {"tried": asked.answers(server, steering(made, scale))}
        each = [benchmark.summary(asked.pope[s], asked.of(s, answers))["tried"]["accuracy"] for s in SAMPLINGS]
        out[scale] = statistics.fmean(each)
    return out


def cost(server: Steersman, asked: Sequence[Question], steered: Steering) -> dict[str, Any]:
    """Medians of seconds: until the first token, and of each token after it; one request at a time, in turn."""

    def seconds(question: Question, given: Steering | None, tokens: int) -> float:
        turn = [asking.message(question.image, question.text)]
        start = time.perf_counter()
        server.chat(turn, given, model=NAME, max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return time.perf_counter() - start

    first: dict[str, list[float]] = {UNSTEERED: [], CHOSEN: []}
    each: dict[str, list[float]] = {UNSTEERED: [], CHOSEN: []}
    for i, question in enumerate(asked):
        pair = [(UNSTEERED, None), (CHOSEN, steered)]
        for name, given in pair[:: 1 if i % 2 else -1]:
            short, long = seconds(question, given, 1), seconds(question, given, 1 + TIMED_TOKENS)
            first[name].append(short)
            each[name].append((long - short) / TIMED_TOKENS)
    return {
        "first_token": {name: statistics.median(v) for name, v in first.items()},
        "per_token": {name: statistics.median(v) for name, v in each.items()},
        "per_token_ratio": statistics.median(b / a for a, b in zip(each[UNSTEERED], each[CHOSEN], strict=True)),
    }


if __name__ == "__main__":
    main()
