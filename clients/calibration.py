"""Calibration of a stored vector over HTTP: layer × scale, effect beside damage, random directions as a control.

1. The prompts are answered unsteered (and, where wanted, with an instruction in words).
2. For each layer, the scales that reach the wanted divergences are searched for, on the neutral texts.
3. Every layer and scale: the mean score of the answers (effect), and the damage.
4. The layers with a cell worth recommending are tried with random directions of the vector's norm, at all scales, in
   the order in which they would be recommended, until one has a cell that beats them.
5. What is recommended is stored as a new version of the vector: that layer, that scale, and the evidence.

Rules: ``calibration_rules.py``. Everything is greedy, so the same server gives the same answers up to its own rounding.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata, resources
from json import loads
from statistics import fmean
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from steersman.clients.calibration_rules import (
    CalibrationError,
    beaten_by,
    layers_to_control,
    reach,
    recommend,
)
from steersman.clients.calibration_spec import Calibration, CalibrationSpec, Cell, Control
from steersman.clients.divergence import Logprobs
from steersman.clients.scorers import TOP
from steersman.clients.subject import Edit, Subject, get, post
from steersman.clients.vector_assets import VectorAsset


class Progress(Protocol):
    def expect(self, total: int, unit: str) -> None: ...

    def advance(self, count: int = 1) -> None: ...


async def calibrate(http: httpx.AsyncClient, spec: CalibrationSpec, progress: Progress) -> Calibration:
    """Measures, and recommends where the rules allow it; :func:`save` stores that.

    Raises CalibrationError, and SteersmanError for what the server refuses.
    """
    model = (await get(http, "/v1/models"))["data"][0]["id"]
    sampling = {} if spec.repetition_penalty == 1 else {"repetition_penalty": spec.repetition_penalty}
    return await _Sweep(spec, Subject(http, model, **sampling), await fetch_vector(http, spec.vector), progress).run()


async def save(http: httpx.AsyncClient, found: Calibration) -> str:
    """Stores the recommendation as a new version of the vector; its ref. Needs the admin key where there is one."""
    best = found.best
    assert best is not None, "something is recommended"
    vector = await fetch_vector(http, found.vector)
    how = (
        f"steersman {metadata.version('steersman')} calibrate: {found.settings['scorer']['by']} score "
        f"{best.effect:.4g}, unsteered {found.unsteered:.4g}; {best.damage:.3g} nats of {found.settings['damage']}"
    )
    whole = vector.recommending(best.layer, best.scale, how, {"of": vector.ref, **found.evidence()})
    return str((await post(http, "/v1/steering/assets", whole))["ref"])


def neutral_texts() -> list[str]:
    """Those that come with the project."""
    text = (resources.files("steersman.clients") / "data" / "neutral.json").read_text(encoding="utf-8")
    found: list[str] = loads(text)["texts"]
    return found


async def fetch_vector(http: httpx.AsyncClient, ref: str) -> VectorAsset:
    """A stored vector. Raises CalibrationError for another kind of asset."""
    exact = str((await get(http, f"/v1/steering/assets/{quote(ref, safe='@')}"))["ref"])
    return VectorAsset.of(exact, await get(http, f"/v1/steering/assets/{quote(exact, safe='@')}", format="json"))


class _Sweep:
    def __init__(self, spec: CalibrationSpec, subject: Subject, vector: VectorAsset, progress: Progress) -> None:
        self.spec = spec
        self.subject = subject
        self.vector = vector
        self.progress = progress
        self.layers = sorted(spec.layers if spec.layers is not None else vector.rows)
        if missing := [layer for layer in self.layers if layer not in vector.rows]:
            message = f"{vector.ref} has nothing for layers {missing}; it has {[*vector.rows]}"
            raise CalibrationError(message, "layers")
        if len(set(self.layers)) != len(self.layers):
            raise CalibrationError("a layer is named twice", "layers")
        self.texts = spec.neutral if spec.neutral is not None else neutral_texts()
        self.plain: list[list[Logprobs | None]] = []  # the unsteered model's predictions of the neutral texts
        self.answers: list[tuple[list[int], int]] = []  # its own answers after their prompts; where they begin
        self.plain_losses: list[float] = []  # of these answers, nats per token

    async def run(self) -> Calibration:
        spec, per_layer = self.spec, len(self.spec.scales) + len(self.spec.targets)
        searches = len(self.layers) * len(spec.targets)
        self.total = 1 + searches + len(self.layers) * per_layer + per_layer * spec.seeds
        self.progress.expect(self.total, "measurements")
        scores, _ = await self._answers(None)
        self.plain = list(await asyncio.gather(*(self.subject.predictions(t, None, TOP) for t in self.texts)))
        for i, told in enumerate(self.plain):
            if len(told) < 2:
                raise CalibrationError("a single token predicts nothing: give longer texts", f"neutral[{i}]")
        if spec.damage == "perplexity":
            await self._prepare_perplexity()
        prompted = None
        if spec.instruction is not None:
            prompted = fmean((await self._answers(None, f"\n\n{spec.instruction}"))[0])
        self.progress.advance()
        found = Calibration(self.vector.ref, spec.settings(), self.subject.model, fmean(scores), scores, prompted)
        grid = [(layer, scale, target) for layer in self.layers for scale, target in await self._scales(layer)]
        found.cells = list(await asyncio.gather(*(self._cell(*place) for place in grid)))
        await self._control(found)
        return found

    async def _scales(self, layer: int) -> list[tuple[float, float | None]]:
        """Scales of a layer, ascending, and the divergence that each was found for."""

        async def measure(scale: float) -> float:
            return await self.subject.kl(self.texts, self.plain, self.vector.edit(layer, scale))

        out: list[tuple[float, float | None]] = [(scale, None) for scale in self.spec.scales]
        for target in self.spec.targets:
            try:
                out.append(((await reach(measure, target)).scale, target))
            except CalibrationError as error:
                raise CalibrationError(f"layer {layer}: {error}", error.param) from None
            self.progress.advance()
        return sorted(out, key=lambda each: each[0])

    async def _cell(self, layer: int, scale: float, target: float | None) -> Cell:
        edit = self.vector.edit(layer, scale)
        (scores, example), damage = await asyncio.gather(self._answers(edit), self._damage(edit))
        self.progress.advance()
        return Cell(layer, scale, fmean(scores), damage, target, scores, example)

    async def _control(self, found: Calibration) -> None:
        spec, per_layer = self.spec, (len(self.spec.scales) + len(self.spec.targets)) * self.spec.seeds
        layers = layers_to_control(found.cells, found.unsteered, spec.sign, spec.max_damage)
        self.total -= 0 if layers else per_layer
        for i, layer in enumerate(layers):
            places = [j for j, cell in enumerate(found.cells) if cell.layer == layer]
            self.total += per_layer if i else 0  # the first one has been counted
            self.progress.expect(self.total, "measurements")
            cells = await asyncio.gather(*(self._controlled(found.cells[j]) for j in places))
            for j, cell in zip(places, cells, strict=True):
                found.cells[j] = cell
            found.recommended = recommend(
                found.cells, found.unsteered, spec.sign, spec.max_damage, spec.min_standard_errors
            )
            if found.recommended is not None:
                return
        self.progress.expect(self.total, "measurements")
        found.refusal = (
            "no layer and scale moves the score as wanted with at most "
            f"{spec.max_damage:g} nats of damage, {spec.min_standard_errors:g} standard errors beyond random directions"
        )

    async def _controlled(self, cell: Cell) -> Cell:
        async def one(seed: int) -> list[float]:
            scores, _ = await self._answers(self.vector.random_edit(cell.layer, cell.scale, seed))
            self.progress.advance()
            return scores

        by_seed = await asyncio.gather(*(one(seed) for seed in range(self.spec.seeds)))
        means = [fmean(row) for row in by_seed]
        return replace(cell, random=Control(means, fmean(means), beaten_by(cell.scores, by_seed, self.spec.sign)))

    async def _answers(self, edit: Edit, after: str = "") -> tuple[list[float], str]:
        """The score of each prompt's answer, and the first answer."""
        scorer = self.spec.scorer
        body = {"max_tokens": self.spec.max_tokens, **scorer.ask()}
        found = await asyncio.gather(*(self.subject.answer(p + after, edit, **body) for p in self.spec.prompts))
        choices: Sequence[Mapping[str, Any]] = [each["choices"][0] for each in found]
        return [scorer.score(choice) for choice in choices], str(choices[0]["message"]["content"] or "")

    async def _damage(self, edit: Edit) -> float:
        """Nats per token."""
        if self.spec.damage == "kl":
            return await self.subject.kl(self.texts, self.plain, edit)
        losses = await asyncio.gather(*(self.subject.loss(ids, start, edit) for ids, start in self.answers))
        return math.fsum(losses) / len(losses) - fmean(self.plain_losses)

    async def _prepare_perplexity(self) -> None:
        asked = {"max_tokens": self.spec.max_tokens, "return_token_ids": True}
        found = await asyncio.gather(*(self.subject.answer(p, None, **asked) for p in self.spec.prompts))
        for each in found:
            prompt, answer = list(each["prompt_token_ids"]), list(each["choices"][0]["token_ids"])
            if answer:
                self.answers.append((prompt + answer, len(prompt)))
        if not self.answers:
            raise CalibrationError("the unsteered model answers none of them, so it has no perplexity", "prompts")
        losses = (self.subject.loss(ids, start, None) for ids, start in self.answers)
        self.plain_losses = list(await asyncio.gather(*losses))
