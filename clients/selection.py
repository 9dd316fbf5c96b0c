"""Selection of a direction by what it does, over HTTP: of stored vectors' layers, the one that carries a behaviour.

Arditi et al. 2024 (arXiv 2406.11717) choose the refusal direction so. Every layer of every vector is a candidate (a
vector is what was read at one token; several of them are several positions). Of each is measured

- bypass: the score of prompts that show the behaviour, with the direction ablated wherever the model writes to the
  stream (what enters the first block, and what every attention and MLP adds), at all tokens;
- induce: the score of prompts that do not, with the direction added at its own layer, at all tokens;
- kl: how far the ablation moves the next token of these, in nats.

The score of a prompt is the log-odds ln(p/(1 − p)) that its answer begins with one of the behaviour's tokens. A server
tells the 20 likeliest tokens, so p counts those below as impossible, and kl is a lower bound (``divergence.py``). The
rule is `steering.extraction_layers.select_by_effect`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from statistics import fmean
from typing import Annotated, Any, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field

from steersman.clients.calibration import Progress, fetch_vector
from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.calibration_spec import Positive, Text, sha256
from steersman.clients.divergence import Logprobs, kl_bound
from steersman.clients.scorers import TOP, TokenSet
from steersman.clients.subject import Edit, Subject, get, post
from steersman.clients.vector_assets import VectorAsset
from steersman.steering.extraction_layers import Candidate, select_by_effect

CERTAIN: Final = 1e-6  # probabilities are not told more finely than this from 0 and 1


class SelectionSpec(BaseModel):
    """Tries every layer of stored vectors on the model, and chooses the one that carries a behaviour."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    vectors: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=16)] = Field(
        description="names or name@version of stored vectors, each read at another token"
    )
    showing: Annotated[list[Text], Field(min_length=1, max_length=1000)] = Field(
        description="what users ask where the behaviour shows"
    )
    others: Annotated[list[Text], Field(min_length=1, max_length=1000)] = Field(description="where it does not")
    tokens: Annotated[list[str], Field(min_length=1)] = Field(
        description="what answers that show it begin with, as the server spells tokens, spaces included"
    )
    scale: Positive = Field(1.0, description="at which a direction is added")
    max_kl: Positive = Field(0.1, description="nats that the ablation may move the next token of `others`")
    min_induce: Annotated[float, Field(allow_inf_nan=False)] = Field(
        0.0, description="log-odds that adding must reach on `others`"
    )
    last_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="of the layers, the last, which are too near the output to be a cause"
    )

    def settings(self) -> dict[str, Any]:
        """All but the texts, of which there are hashes."""
        hashes = {f"{name}_sha256": sha256(getattr(self, name)) for name in ("showing", "others")}
        return {**self.model_dump(mode="json", exclude={"vectors", "showing", "others"}), **hashes}


@dataclass
class Selection:
    """All that was measured."""

    model: str
    n_layers: int
    settings: dict[str, Any]  # the spec's
    prompts: dict[str, int]  # showing, others: how many
    unsteered: dict[str, float]  # the same: mean score
    vectors: list[str]  # name@version
    candidates: list[Candidate] = field(default_factory=list)  # position: which of the vectors
    selected: int | None = None  # index of the candidate
    refusal: str = ""  # why none is selected

    @property
    def best(self) -> Candidate | None:
        return None if self.selected is None else self.candidates[self.selected]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def select(http: httpx.AsyncClient, spec: SelectionSpec, progress: Progress) -> Selection:
    """Measures, and chooses where the rule allows it; :func:`save` stores that.

    Raises CalibrationError, and SteersmanError for what the server refuses.
    """
    served = await get(http, "/v1/steering/model")
    model = (await get(http, "/v1/models"))["data"][0]["id"]
    vectors = [await fetch_vector(http, ref) for ref in spec.vectors]
    for i, vector in enumerate(vectors):
        if vector.whole["site"] != "resid_post":
            raise CalibrationError(f"{vector.ref} is of {vector.whole['site']}; wanted: resid_post", f"vectors[{i}]")
    return await _Trial(spec, Subject(http, model), vectors, served["n_layers"], progress).run()


async def save(http: httpx.AsyncClient, found: Selection) -> str:
    """Stores the chosen layer as a new version of its vector; its ref. Needs the admin key where there is one."""
    best = found.best
    assert best is not None, "something is selected"
    vector = await fetch_vector(http, found.vectors[best.position])
    how = (
        f"steersman {metadata.version('steersman')} select: ablated the log-odds fall from "
        f"{found.unsteered['showing']:.3g} to {best.bypass:.3g}, added they rise from {found.unsteered['others']:.3g} "
        f"to {best.induce:.3g}; {best.kl:.3g} nats"
    )
    evidence = {"of": vector.ref, **found.to_json()}
    whole = vector.recommending(best.layer, found.settings["scale"], how, evidence, "selection")
    return str((await post(http, "/v1/steering/assets", whole))["ref"])


class _Trial:
    def __init__(
        self, spec: SelectionSpec, subject: Subject, vectors: list[VectorAsset], n_layers: int, progress: Progress
    ) -> None:
        self.spec = spec
        self.subject = subject
        self.vectors = vectors
        self.n_layers = n_layers
        self.progress = progress
        self.scorer = TokenSet(by="tokens", tokens=spec.tokens)
        self.plain: list[Logprobs] = []  # of the others, unsteered

    async def run(self) -> Selection:
        spec = self.spec
        tried = [(i, layer) for i, vector in enumerate(self.vectors) for layer in sorted(vector.rows)]
        self.progress.expect(1 + len(tried), "directions")
        showing, _ = await self._ask(spec.showing, None)
        others, self.plain = await self._ask(spec.others, None)
        self.progress.advance()
        found = Selection(
            self.subject.model,
            self.n_layers,
            spec.settings(),
            {"showing": len(spec.showing), "others": len(spec.others)},
            {"showing": showing, "others": others},
            [vector.ref for vector in self.vectors],
        )
        found.candidates = list(await asyncio.gather(*(self._try(*each) for each in tried)))
        limits = {"max_kl": spec.max_kl, "min_induce": spec.min_induce, "last_share": spec.last_share}
        try:
            best = select_by_effect(found.candidates, self.n_layers, **limits)
        except ValueError as error:
            found.refusal = str(error)
        else:
            found.selected = found.candidates.index(best)
        return found

    async def _try(self, position: int, layer: int) -> Candidate:
        vector = self.vectors[position]
        without: list[Mapping[str, Any]] = [
            {"op": "ablate", "vector": vector.ref, "from_layer": layer, "site": site, "layers": layers}
            for site, layers in (("resid_pre", [0]), ("attn_out", "all"), ("mlp_out", "all"))
        ]
        (bypass, _), (induce, _), (_, moved) = await asyncio.gather(
            self._ask(self.spec.showing, without),
            self._ask(self.spec.others, vector.edit(layer, self.spec.scale)),
            self._ask(self.spec.others, without),
        )
        kl = fmean(kl_bound(p, q, TOP) for p, q in zip(self.plain, moved, strict=True))
        self.progress.advance()
        return Candidate(layer, position, bypass, induce, kl)

    async def _ask(self, prompts: Sequence[str], edit: Edit) -> tuple[float, list[Logprobs]]:
        """The mean score, and what each answer's first token was likely to be."""
        found = await asyncio.gather(*(self.subject.answer(p, edit, **self.scorer.ask()) for p in prompts))
        choices = [each["choices"][0] for each in found]
        tops = [choice["logprobs"]["content"][0]["top_logprobs"] for choice in choices]
        told: list[Logprobs] = [{each["token"]: float(each["logprob"]) for each in top} for top in tops]
        return fmean(log_odds(self.scorer.score(choice)) for choice in choices), told


def log_odds(p: float) -> float:
    p = min(max(p, CERTAIN), 1 - CERTAIN)
    return math.log(p / (1 - p))
