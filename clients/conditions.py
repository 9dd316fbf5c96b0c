"""Conditional steering from labelled prompts: the condition fitted to a served model, and checked as it is served.

Activations come from ``POST /v1/steering/captures``, so any model that a server steers will do; the mathematics is in
`steering/conditions.py`. What a check counts are the server's own decisions, as its answers tell them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from steersman.clients.sdk import Steersman
from steersman.clients.vector_assets import encode
from steersman.steering import conditions

Over = Literal["last_prompt", "prompt_mean"]
OVER: Final[tuple[Over, ...]] = ("last_prompt", "prompt_mean")
SELECTED: Final[dict[Over, dict[str, str]]] = {  # what a gate reads, as a capture asks for it
    "last_prompt": {"tokens": "last_prompt", "reduce": "last"},
    "prompt_mean": {"tokens": "prompt", "reduce": "mean"},
}
BATCH: Final = 32  # prompts of one capture
CONCURRENT: Final = 16  # requests under way at once
SHIPPED: Final = "harmful_prompts.jsonl"


@dataclass(frozen=True)
class Example:
    prompt: str
    positive: bool


@dataclass(frozen=True)
class Fitted:
    """A condition for one model; ``layer`` is the model's."""

    condition: conditions.Condition
    layer: int
    over: Over
    site: str
    by_layer: dict[int, conditions.Bound]
    examples: Sequence[Example]

    def asset(self, name: str, model: Mapping[str, Any], **about: Any) -> dict[str, Any]:
        """The vector asset, as JSON. ``model``: what ``GET /v1/steering/model`` says."""
        bound = self.condition.bound
        texts = json.dumps([[e.prompt, e.positive] for e in self.examples])
        provenance = {
            "method": "condition: unit difference of the classes' mean states",
            "over": self.over,
            bound.side: bound.threshold,
            "f1_cross_validated": bound.f1,
            "positive": sum(e.positive for e in self.examples),
            "negative": sum(not e.positive for e in self.examples),
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        }
        return {
            "name": name,
            "kind": "vector",
            "model": {"id": model["model"], "n_layers": model["n_layers"], "d_model": model["d_model"]},
            "site": self.site,
            "layers": [self.layer],
            "provenance": provenance,
            "tensors": {"vectors": encode(self.condition.direction.numpy()[None])},
            **about,
        }

    def gate(self, ref: str) -> dict[str, Any]:
        """The ``when`` of an intervention, once the vector is stored as ``ref``."""
        return self.condition.gate(ref, self.layer, self.over)


@dataclass(frozen=True)
class Score:
    """How decisions on labelled prompts compare with their labels."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @classmethod
    def of(cls, decided: Sequence[bool], examples: Sequence[Example]) -> Score:
        pairs = [(d, e.positive) for d, e in zip(decided, examples, strict=True)]
        return cls(*(pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def f1(self) -> float:
        right = 2 * self.true_positive
        return right / (right + self.false_positive + self.false_negative) if right else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "f1": self.f1}


def read_examples(file: Path | None, positive: str, split: str | None = None) -> list[Example]:
    """JSON lines of ``{"prompt", "label", "split"?}``; None: the set that the project ships.

    ``split``: only lines that state it. Raises ValueError, which names the line that is none.
    """
    source = resources.files("steersman.clients") / "data" / SHIPPED if file is None else file
    out, labels = [], set()
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file or SHIPPED}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "label")):
            raise ValueError(f'{where}: wanted is {{"prompt": text, "label": text}}')
        if split is None or row.get("split") == split:
            out.append(Example(row["prompt"], row["label"] == positive))
            labels.add(row["label"])
    if len({e.positive for e in out}) < 2:
        found = ", ".join(sorted(labels)) or "none"
        raise ValueError(f"{file or SHIPPED}: wanted are prompts labelled {positive!r} and others; labels: {found}")
    return out


def states(
    server: Steersman,
    prompts: Sequence[str],
    layers: Sequence[int],
    site: str,
    over: Over,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """[n, L, d] what a gate reads of each prompt, asked as a user's message. ``advance``: how many were done."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": p}] for p in prompts[start : start + BATCH]]
        found = server.capture(chats, sites=[site], layers=list(layers), **SELECTED[over])
        parts.append(torch.stack([torch.from_numpy(found.rows(site, layer)) for layer in layers], 1))
        advance(len(chats))
    return torch.cat(parts)


def fit(
    server: Steersman,
    examples: Sequence[Example],
    layers: Sequence[int],
    site: str = "resid_post",
    over: Over = "last_prompt",
    advance: Callable[[int], object] = lambda count: None,
) -> Fitted:
    """The condition that tells positive prompts from the others best, on the served model."""
    read = states(server, [e.prompt for e in examples], layers, site, over, advance)
    positive = torch.tensor([e.positive for e in examples])
    found, bounds = conditions.fit(read[positive], read[~positive])
    by_layer = dict(zip(layers, bounds, strict=True))
    return Fitted(found, layers[found.layer], over, site, by_layer, examples)


def profile(name: str, model: Mapping[str, Any], then: Sequence[Mapping[str, Any]], gate: Any) -> dict[str, Any]:
    """A profile, as JSON: the interventions ``then``, each where the gate is open."""
    return {
        "name": name,
        "kind": "profile",
        "model": {"id": model["model"], "n_layers": model["n_layers"], "d_model": model["d_model"]},
        "steering": {"interventions": [{**given, "when": gate} for given in then]},
    }


def decisions(
    server: Steersman,
    prompts: Sequence[str],
    steering: Mapping[str, Any],
    advance: Callable[[int], object] = lambda count: None,
) -> list[bool]:
    """For each prompt, whether a gate of ``steering`` opened. ValueError where it has no gate that decides once."""
    model = server.served_model()

    def decide(prompt: str) -> bool:
        turns = [{"role": "user", "content": prompt}]
        answer = server.chat(turns, {"default": False, **steering}, model=model, max_tokens=1, temperature=0.0)
        gates = [i["gate"]["open"] for i in answer["steering"]["interventions"] if i["gate"]]
        found = [one for gate in gates if gate is not None for one in gate]
        if not found:
            raise ValueError("the steering has no gate that decides once for a prompt")
        advance(1)
        return any(found)

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(decide, prompts))
