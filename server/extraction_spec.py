"""What an extraction job may be asked: contrast examples, a method, and where the activations are read."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from steersman.server.engine.frontend import DEFAULT_NAME
from steersman.steering.assets import canonical_json, is_name
from steersman.steering.extraction_methods import METHODS, Length
from steersman.steering.sites import Site
from steersman.steering.spec import Layers, Model, Number, Position

MAX_EXAMPLES = 20_000  # of a side
MAX_TEXT = 200_000  # characters


def _asset_name(name: str) -> str:
    if not is_name(name) or name.startswith(DEFAULT_NAME):
        raise ValueError(f"must name an asset: A-Z a-z 0-9 . _ -, from a letter or digit on, not {DEFAULT_NAME}...")
    return name


AssetName = Annotated[str, AfterValidator(_asset_name)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Note = Annotated[str, Field(max_length=65536)]


class Message(Model):
    role: Annotated[str, Field(min_length=1)]
    content: Annotated[str, Field(max_length=MAX_TEXT)]


Example = Text | Annotated[list[Message], Field(min_length=1)]


class Pair(Model):
    """Two examples that differ in what the direction is to mean."""

    positive: Example
    negative: Example
    prompt: Example | None = Field(None, description="fed before both and not read: a question, as text or messages")
    group: Annotated[str, Field(pattern=r"[A-Za-z0-9._-]+")] | None = Field(
        None, description="method shift: one direction for each group"
    )


class Heads(Model):
    """Of method heads: inference-time intervention (Li et al. 2023)."""

    k: Annotated[int, Field(ge=1)] = Field(48, description="heads to choose")
    alpha: Number = Field(15.0, description="strength, in standard deviations")
    direction: Literal["means", "probe"] = "means"


class ExtractSpec(Model):
    """Makes a direction from the served model's activations on contrast examples."""

    kind: Literal["extract"]
    name: AssetName
    method: Literal["mean_difference", "pca", "pca_uncentred", "linear_probe", "lda", "shift", "heads"] = (
        "mean_difference"
    )
    pairs: Annotated[list[Pair], Field(min_length=1, max_length=MAX_EXAMPLES)] | None = None
    positive: Annotated[list[Example], Field(min_length=1, max_length=MAX_EXAMPLES)] | None = None
    negative: Annotated[list[Example], Field(min_length=1, max_length=MAX_EXAMPLES)] | None = None
    layers: Layers = "all"
    site: Site | None = Field(None, description="default: resid_post; for method heads attn_z")
    token: Literal["last", "mean"] | Position = Field(
        "mean", description="read at: the last token, the mean, or a position; negative ones count from the end"
    )
    length: Length = Field("gap", description="gap: scale 1 moves the negatives' mean to the positives'; or unit")
    heads: Heads | None = None
    description: Note = ""
    source: Note = ""
    licence: Note = ""

    @property
    def at(self) -> Site:
        return self.site or (Site.ATTN_Z if self.method == "heads" else Site.RESID_POST)

    def sides(self) -> tuple[list[tuple[Example | None, Example]], list[tuple[Example | None, Example]]]:
        """Positive and negative examples, each with what is fed before it."""
        if self.pairs is not None:
            return [(p.prompt, p.positive) for p in self.pairs], [(p.prompt, p.negative) for p in self.pairs]
        return [(None, e) for e in self.positive or ()], [(None, e) for e in self.negative or ()]

    def data_sha256(self) -> str:
        """Of the examples, in canonical JSON."""
        data = self.model_dump(mode="json", include={"pairs", "positive", "negative"}, exclude_none=True)
        return hashlib.sha256(canonical_json(data).encode()).hexdigest()

    @model_validator(mode="after")
    def _consistent(self) -> ExtractSpec:
        sets = self.positive is not None, self.negative is not None
        if sets != ((False, False) if self.pairs is not None else (True, True)):
            raise ValueError("give either pairs, or positive and negative")
        paired = self.method == "shift" or (self.method in METHODS and METHODS[self.method].paired)
        if self.pairs is None and paired:
            raise ValueError(f"method {self.method} needs pairs")
        if self.method == "heads" and self.at is not Site.ATTN_Z:
            raise ValueError("method heads reads attn_z")
        if self.heads is not None and self.method != "heads":
            raise ValueError("heads goes with method heads")
        if self.method in ("heads", "shift") and "length" in self.model_fields_set:
            raise ValueError(f"length is not for method {self.method}, which has its own")
        if self.method != "shift" and any(p.group is not None for p in self.pairs or ()):
            raise ValueError("groups go with method shift")
        if self.method == "shift" and len({p.group is None for p in self.pairs or ()}) > 1:
            raise ValueError("give every pair a group, or none")
        for i, pair in enumerate(self.pairs or ()):
            if pair.prompt is not None and not (isinstance(pair.positive, str) and isinstance(pair.negative, str)):
                raise ValueError(f"pairs[{i}] has a prompt, so its positive and negative are texts")
        return self
