"""What a calibration is asked to do, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from steersman.clients.scorers import Scorer

Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=100_000)]


class CalibrationSpec(BaseModel):
    """Sweeps layer × scale of a stored vector, and recommends one of each."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    vector: Annotated[str, Field(min_length=1)] = Field(description="name or name@version of a stored vector")
    prompts: Annotated[list[Text], Field(min_length=2, max_length=1000)] = Field(description="what users ask")
    scorer: Scorer
    goal: Literal["increase", "decrease"] = Field("increase", description="what is wanted of the score")
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="default: all of the vector's"
    )
    scales: Annotated[list[Scale], Field(max_length=100)] = []
    target_kl: Annotated[list[Positive], Field(max_length=20)] | None = Field(
        None,
        description="nats per token on the neutral texts; scales that reach them are found for each layer. "
        "Default: 0.25, 0.5 and 3, where no scales are given",
    )
    damage: Literal["kl", "perplexity"] = Field(
        "kl",
        description="nats per token. kl: from the unsteered model's next tokens, on the neutral texts; "
        "perplexity: what the unsteered model's own answers become less likely by",
    )
    max_damage: Positive = Field(1.0, description="nats per token that a recommended scale may do")
    neutral: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="default: plain English texts that come with the project"
    )
    seeds: Annotated[int, Field(ge=2, le=100)] = Field(5, description="random directions of the same norm")
    min_standard_errors: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        3.0, description="by which a recommended scale's effect must beat the random directions"
    )
    instruction: Text | None = Field(None, description="asked for in words instead, after each prompt: a control")
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 40
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0

    def settings(self) -> dict[str, Any]:
        """All but the texts, of which there are hashes."""
        texts = {"prompts": self.prompts, "neutral": self.neutral}
        hashes = {f"{name}_sha256": sha256(given) for name, given in texts.items() if given is not None}
        return {**self.model_dump(mode="json", exclude={"vector", "neutral", "prompts"}), **hashes}

    @property
    def sign(self) -> int:
        return 1 if self.goal == "increase" else -1

    @property
    def targets(self) -> list[float]:
        if self.target_kl is None:
            return [] if self.scales else [0.25, 0.5, 3.0]
        return self.target_kl


@dataclass(frozen=True)
class Control:
    """Random directions of the vector's norm, at one layer and scale."""

    by_seed: list[float]  # mean score with each
    mean: float
    beaten_by: float | None  # standard errors by which the vector's effect lies above (goal: below); None: no spread


@dataclass
class Cell:
    """One layer and scale."""

    layer: int
    scale: float
    effect: float  # mean score
    damage: float  # nats per token
    target_kl: float | None  # the divergence that the scale was found for
    scores: list[float]  # of each prompt's answer
    example: str  # the answer to the first prompt; empty for scorers of first tokens
    random: Control | None = None  # None: not measured


@dataclass
class Calibration:
    """All that was measured."""

    vector: str  # name@version
    settings: dict[str, Any]  # the spec's
    model: str
    unsteered: float  # mean score
    unsteered_scores: list[float]
    prompted: float | None  # mean score with the instruction in words
    cells: list[Cell] = field(default_factory=list)
    recommended: int | None = None  # index of the cell
    refusal: str = ""  # why none is recommended

    @property
    def best(self) -> Cell | None:
        return None if self.recommended is None else self.cells[self.recommended]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_json` gave."""
        controls = [None if cell["random"] is None else Control(**cell["random"]) for cell in told["cells"]]
        cells = [Cell(**{**cell, "random": c}) for cell, c in zip(told["cells"], controls, strict=True)]
        return cls(**{**told, "cells": cells})

    def evidence(self) -> dict[str, Any]:
        """What the new version's provenance keeps: the numbers without answers."""
        out = self.to_json()
        del out["recommended"], out["refusal"], out["unsteered_scores"]
        out["prompts"] = len(self.unsteered_scores)
        out["cells"] = [{k: v for k, v in cell.items() if k not in ("scores", "example")} for cell in out["cells"]]
        return out


def sha256(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
