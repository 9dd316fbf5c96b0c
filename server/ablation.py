"""The ablation job: how far answers fall when a layer's attention or MLP, a head or a neuron is taken out of a run.

Taken out of every token of the prompt, one unit at a time: set to zero, or to its mean over all tokens of the job's
prompts but each one's first, which in most models is an attention sink unlike the rest.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from steersman.server.captures import Captured, CapturedPrompt, capture
from steersman.server.jobs import Progress
from steersman.server.state import SteeringState
from steersman.server.tracing import FIELDS, kept, layers_at
from steersman.server.tracing_prompts import Posed, pose
from steersman.server.tracing_runs import Outcome, all_of, refuse_dosage, run
from steersman.server.tracing_spec import AblateSpec, of_question
from steersman.steering.activations import Floats
from steersman.steering.errors import InvalidRequest, located
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from steersman.steering.spec import TokenSet

PARTS = {"attn": Site.ATTN_OUT, "mlp": Site.MLP_OUT}
Edits = list[dict[str, Any]]


class Unit(NamedTuple):
    layer: int
    part: str | int  # attn or mlp, a head's or a neuron's number


def units(spec: AblateSpec, state: SteeringState) -> list[Unit]:
    """What is taken out, in order. Raises for what the served model does not have."""
    model = state.frontend.model
    refuse_dosage(state)
    if spec.neurons is not None:
        with located("neurons"):
            for layer, index in spec.neurons:
                if index >= (width := model.width(Site.MLP_POST, layer)):
                    raise InvalidRequest(f"neuron {index} does not exist: layer {layer} has {width}")
        return [Unit(*pair) for pair in spec.neurons]
    if spec.units == "heads":
        layers = layers_at(state, Site.ATTN_Z, spec.layers)
        return [Unit(layer, head) for layer in layers for head in range(model.n_heads)]
    return [Unit(layer, part) for part, site in PARTS.items() for layer in layers_at(state, site, spec.layers)]


async def ablate(spec: AblateSpec, state: SteeringState, progress: Progress) -> dict[str, Any]:
    """The job's result: each question's probabilities, of the whole model and without each unit."""
    chosen, posed = units(spec, state), []
    for i, question in enumerate(spec.questions):
        with of_question(i, FIELDS):
            posed.append(await pose(state, question))
    progress.expect(len(posed) * (1 + len(chosen)), "runs")
    means = await _means(spec, state, chosen, posed)

    async def one(question: Posed, edits: Edits) -> Outcome:
        found = await run(state, question, edits)
        progress.advance()
        return found

    async with AsyncExitStack() as stack:
        edits = await _edits(spec, state, chosen, means, stack)
        told = []
        for i, asked in enumerate(posed):
            with of_question(i):
                clean, *without = await all_of([partial(one, asked, each) for each in ([], *edits)])
            told.append(
                {
                    "answer": asked.answer,
                    "set": spec.questions[i].set,
                    "clean": clean.probability,
                    "first": clean.token,
                    "without": [outcome.probability for outcome in without],
                    "first_without": [outcome.token for outcome in without],
                }
            )
    return {"assets": [], "units": [list(unit) for unit in chosen], "questions": told}


async def _edits(
    spec: AblateSpec, state: SteeringState, chosen: Sequence[Unit], means: Mapping[Place, Floats], stack: AsyncExitStack
) -> list[Edits]:
    """The interventions that take out each unit. What they need is kept on the server until ``stack`` ends."""
    if spec.units == "neurons":
        return [[_neuron(unit, means)] for unit in chosen]
    if spec.units == "heads":
        return [_head(unit, means) for unit in chosen]
    model, places = state.frontend.model, [_place(unit, "layers") for unit in chosen]
    rows = {p: means[p] if means else np.zeros(model.width(p.site, p.layer), np.float32) for p in places}
    held = Captured(model.name, sorted(places, key=lambda p: p.order), [CapturedPrompt([0], [0], rows)], "mean", None)
    capture_id = await stack.enter_async_context(kept(state, held))
    return [
        [{"op": "patch", "capture": capture_id, "site": p.site.value, "layers": [p.layer], "tokens": "all"}]
        for p in places
    ]


def _neuron(unit: Unit, means: Mapping[Place, Floats]) -> dict[str, Any]:
    value = float(means[Place(unit.layer, Site.MLP_POST)][int(unit.part)]) if means else 0.0
    return {"op": "neurons", "neurons": {"inline": [[unit.layer, int(unit.part)]]}, "mode": "set", "value": value}


def _head(unit: Unit, means: Mapping[Place, Floats]) -> Edits:
    heads = [[unit.layer, int(unit.part)]]
    out: Edits = [{"op": "heads", "heads": heads, "factor": 0}]
    if means:
        row = np.ascontiguousarray(means[Place(unit.layer, Site.ATTN_Z)], "<f4")
        inline = {"dtype": "float32", "shape": [len(row)], "data": base64.b64encode(row.tobytes()).decode()}
        out.append({"op": "heads", "heads": heads, "vector": {"inline": inline}, "scale": 1.0})
    return out


def _place(unit: Unit, kind: str) -> Place:
    site = Site.MLP_POST if kind == "neurons" else Site.ATTN_Z if kind == "heads" else PARTS[str(unit.part)]
    return Place(unit.layer, site)


async def _means(
    spec: AblateSpec, state: SteeringState, chosen: Sequence[Unit], posed: Sequence[Posed]
) -> dict[Place, Floats]:
    """[width] the mean activation at every place that a unit belongs to; nothing where units are set to zero."""
    if spec.value == "zero":
        return {}
    places = sorted({_place(unit, spec.units) for unit in chosen}, key=lambda p: p.order)
    totals = {p: np.zeros(state.frontend.model.width(p.site, p.layer)) for p in places}
    seen = 0
    for i, question in enumerate(posed):
        length = question.prompt.length
        tokens = TokenSet(ranges=[(min(1, length - 1), length)])
        count = max(length - 1, 1)
        with of_question(i):
            for site in {p.site for p in places}:
                layers = [p.layer for p in places if p.site is site]
                found = await capture(state, [question.given], [site], layers, tokens, "mean")
                for place, row in found.prompts[0].rows.items():
                    totals[place] += count * row.astype(np.float64)
        seen += count
    return {place: (total / seen).astype(np.float32) for place, total in totals.items()}
