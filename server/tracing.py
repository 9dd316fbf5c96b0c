"""The tracing job: recovery rates of questions (FCCT), through the server's own captures, patches and exact logprobs.

Every run is one request of the engine's batch. The clean run's activations are kept while the patches that need them
run, a component and as many layers at a time as ``--steering-max-capture-mb`` has room for, and forgotten after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from steersman.server.captures import Captured, capture
from steersman.server.jobs import Progress
from steersman.server.state import SteeringState
from steersman.server.tracing_prompts import Posed, corrupted, groups, pose
from steersman.server.tracing_runs import Outcome, all_of, refuse_dosage, run
from steersman.server.tracing_spec import Question, TraceSpec, of_question
from steersman.steering.activations import nbytes, to_parts
from steersman.steering.directions import chosen_layers
from steersman.steering.errors import InvalidRequest, located
from steersman.steering.sites import Site
from steersman.steering.spec import Layers, TokenSet
from steersman.steering.tracing import COMPONENTS, Component, Group, window

SHARE = 4  # a capture takes at most this part of what captures may: others wait for it
FIELDS = tuple(Question.model_fields)


@dataclass(frozen=True)
class Case:
    """A question that is ready to be traced."""

    clean: Posed
    corrupted: Posed
    groups: dict[Group, list[int]]


def layers_at(state: SteeringState, site: Site, asked: Layers) -> list[int]:
    """The layers that are asked for, ascending; ``all``: those that have the site. Raises for others."""
    model = state.frontend.model
    with located("layers"):
        if asked == "all":
            if not model.sites.get(site):
                model.width(site, 0)
            return sorted(model.sites[site])
        layers = sorted(chosen_layers(asked, (), model.n_layers))
        for layer in layers:
            model.width(site, layer)
        return layers


def check(spec: TraceSpec, state: SteeringState) -> None:
    """Raises for what the served model or the settings do not allow."""
    refuse_dosage(state)
    for component in spec.components:
        layers_at(state, COMPONENTS[component], spec.layers)


async def trace(spec: TraceSpec, state: SteeringState, progress: Progress) -> dict[str, Any]:
    """The job's result: each question's probabilities, clean, corrupted and patched."""
    layers = {c: layers_at(state, COMPONENTS[c], spec.layers) for c in spec.components}
    per_group = sum(map(len, layers.values()))
    cases = []
    for i, question in enumerate(spec.questions):
        with of_question(i, FIELDS):
            cases.append(await _case(spec, state, question))
    progress.expect(sum(2 + per_group * len(case.groups) for case in cases), "runs")
    told = []
    for i, case in enumerate(cases):
        with of_question(i):
            told.append(await _Tracing(spec, state, case, layers, progress).told())
    return {"assets": [], "n_layers": state.frontend.model.n_layers, "questions": told}


async def _case(spec: TraceSpec, state: SteeringState, question: Question) -> Case:
    clean = await pose(state, question)
    found = await asyncio.to_thread(groups, question, clean, spec.groups)
    if not found:
        raise InvalidRequest("has none of the groups that are asked for: name its object, or give its box")
    return Case(clean, await corrupted(state, spec, question, clean), found)


@dataclass(frozen=True)
class _Tracing:
    """One question's runs."""

    spec: TraceSpec
    state: SteeringState
    case: Case
    layers: Mapping[Component, list[int]]
    progress: Progress

    async def told(self) -> dict[str, Any]:
        case, n_layers = self.case, self.state.frontend.model.n_layers
        clean, bad = await all_of([partial(self._run, case.clean), partial(self._run, case.corrupted)])
        patched: dict[Component, dict[Group, list[float | None]]] = {}
        for component in self.layers:
            rows = patched[component] = {group: [None] * n_layers for group in case.groups}
            for centres in self._portions(component):
                for (layer, group), p in (await self._portion(component, centres)).items():
                    rows[group][layer] = p
        return {
            "answer": case.clean.answer,
            "clean": clean.probability,
            "corrupted": bad.probability,
            "first": {"clean": clean.token, "corrupted": bad.token},
            "groups": {group: len(positions) for group, positions in case.groups.items()},
            "patched": patched,
        }

    async def _run(self, posed: Posed, *edits: Mapping[str, Any]) -> Outcome:
        found = await run(self.state, posed, edits)
        self.progress.advance()
        return found

    @property
    def _positions(self) -> list[int]:
        """All that are ever patched."""
        return sorted({position for positions in self.case.groups.values() for position in positions})

    def _portions(self, component: Component) -> Iterator[list[int]]:
        """The component's layers, as many at a time as there is room to keep with their windows."""
        settings, layers = self.state.settings, self.layers[component]
        width = self.state.frontend.model.width(COMPONENTS[component], layers[0])
        one = nbytes([len(self._positions)], [width], "none")
        room = min(settings.max_capture_mb, settings.max_kept_captures_mb) << 20
        count = max(room // SHARE // one - (self.spec.window - 1), 1)
        return (layers[i : i + count] for i in range(0, len(layers), count))

    async def _portion(self, component: Component, centres: Sequence[int]) -> dict[tuple[int, Group], float]:
        site = COMPONENTS[component]
        windows = {layer: window(layer, self.spec.window, self.layers[component]) for layer in centres}
        read = sorted({layer for covered in windows.values() for layer in covered})
        chosen = TokenSet(positions=self._positions)
        found = await capture(self.state, [self.case.clean.given], [site], read, chosen)
        cells = [(layer, group) for layer in centres for group in self.case.groups]
        async with kept(self.state, found) as capture_id:

            def patch(layer: int, group: Group) -> Callable[[], Coroutine[Any, Any, Outcome]]:
                edit = {"op": "patch", "capture": capture_id, "site": site.value, "layers": windows[layer]}
                return partial(self._run, self.case.corrupted, {**edit, "source_positions": self.case.groups[group]})

            outcomes = await all_of([patch(*cell) for cell in cells])
        return {cell: outcome.probability for cell, outcome in zip(cells, outcomes, strict=True)}


@asynccontextmanager
async def kept(state: SteeringState, found: Captured) -> AsyncIterator[str]:
    """Keeps a capture for as long as the context lasts: its id."""
    store = state.frontend.kept
    await asyncio.to_thread(store.refuse, found.nbytes)
    context = store.lent([bytes(part) for part in to_parts(found)])
    capture_id = await asyncio.to_thread(context.__enter__)
    try:
        yield capture_id
    finally:
        context.__exit__(None, None, None)
