"""The ``steering`` object of a request, as pydantic models: the only place that says what may be asked.

Unknown fields, wrong types and numbers that are not finite are errors; nothing is coerced or dropped.
:func:`parse` turns pydantic's complaints into :class:`~steersman.steering.errors.SteeringError` with the
JSON path of the bad field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steersman.steering import errors
from steersman.steering.recipes import Recipe
from steersman.steering.signals import MAX_SIGNALS, check_signals
from steersman.steering.sites import Site

MAX_INTERVENTIONS = 64
MAX_PROBES = 64
MAX_NEURONS = 16384  # of one inline list; a stored set may be larger
MAX_FEATURES = 256  # of one intervention
MAX_NUMBER = 1e6
"""No coefficient may be larger: far beyond any use, and float32 sums stay finite."""

Number = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_NUMBER, le=MAX_NUMBER)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Position = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InlineVector(Model):
    """A direction given in the request. ``data`` is base64 of the little-endian array."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    shape: Annotated[list[Index], Field(min_length=1, max_length=3)] = Field(
        description="[d], [n_layers, d], or [n_layers, k, d] for a subspace of k directions"
    )
    layers: list[Index] | None = Field(None, description="one per first axis; absent for shape [d]")
    site: Site | None = None
    data: str


class Inline(Model):
    inline: InlineVector


class InlineNeurons(Model):
    inline: list[tuple[Index, Index]] = Field(min_length=1, max_length=MAX_NEURONS, description="[layer, index] pairs")


def _layers(value: Any) -> Any:
    if isinstance(value, str) and value != "all" and not re.fullmatch(r"\d{1,6}-\d{1,6}", value):
        raise ValueError('must be an integer, a list of integers, "a-b" (both included) or "all"')
    return value


Vector = Annotated[str, Field(min_length=1)] | Inline
Layers = Annotated[Index | Annotated[list[Index], Field(min_length=1)] | str, AfterValidator(_layers)]


def _some_tokens(patches: tuple[int, int]) -> tuple[int, int]:
    if patches[0] >= patches[1]:
        raise ValueError(f"the range [{patches[0]}, {patches[1]}) is empty")
    return patches


def _four_edges(box: Any) -> Any:
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError("must be [x0, y0, x1, y1] in pixels of the image as sent, or a list of such boxes")
    return tuple(box)  # after this function it is no longer JSON to pydantic, where a list would do


def _some_pixels(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError("is empty: [x0, y0, x1, y1] needs x0 < x1 and y0 < y1")
    return box


def _one_or_several(box: Any) -> str:
    return "several" if isinstance(box, list) and box and isinstance(box[0], list | tuple) else "one"


Pixel = Annotated[float, Field(allow_inf_nan=False, ge=0, le=MAX_NUMBER)]
Patches = Annotated[tuple[Index, Index], AfterValidator(_some_tokens)]
Box = Annotated[tuple[Pixel, Pixel, Pixel, Pixel], BeforeValidator(_four_edges), AfterValidator(_some_pixels)]
Boxes = Annotated[Annotated[Box, Tag("one")] | Annotated[list[Box], Tag("several")], Discriminator(_one_or_several)]


class TokenSet(Model):
    """A union of selectors, less ``exclude``. Positions are absolute; negative ones count from the prompt's end."""

    prompt: bool = False
    generated: bool = False
    positions: list[Position] | None = None
    ranges: list[tuple[Position, Position]] | None = Field(None, description="half-open [a, b)")
    last: Index | None = Field(None, description="the prompt's last n tokens")
    image: bool | Index | Annotated[list[Index], Field(min_length=1)] = Field(
        False, description="the tokens of images: of all, or of those with these indices in the prompt"
    )
    patches: Annotated[list[Patches], Field(min_length=1)] | None = Field(
        None, description="of the images, only these of their own tokens: half-open [a, b), from 0"
    )
    box: Boxes | None = Field(
        None, description="of the images, only tokens that show a part of these boxes, in pixels of the image as sent"
    )
    text: str | list[str] | None = Field(None, description="prompt tokens that overlap this text, wherever it occurs")
    token_ids: list[Index] | None = Field(None, description="tokens with these ids, of the prompt or generated")
    roles: list[str] | None = Field(None, description="the contents of chat messages with these roles")
    exclude: Literal["all", "prompt", "generated", "last_prompt"] | TokenSet | None = None

    @field_validator("patches", "box")
    @classmethod
    def _of_image(cls, part: Any, info: ValidationInfo) -> Any:
        if part is not None and info.data.get("image") is False:
            raise ValueError("needs image: true, or an image's index")
        return part


Tokens = Literal["all", "prompt", "generated", "last_prompt"] | TokenSet


def _one_source(vector: object, dictionary: object, index: object) -> None:
    if (vector is None) == (dictionary is None):
        raise ValueError("needs either vector, or dictionary and index")
    if (dictionary is None) != (index is None):
        raise ValueError("dictionary and index go together")


class Gate(Model):
    """The edit applies only where the condition holds."""

    vector: Vector | None = None
    dictionary: Annotated[str, Field(min_length=1)] | None = None
    index: Index | None = Field(None, description="a feature of the dictionary")
    layer: Index | None = Field(None, validate_default=True, description="default: the dictionary's")
    site: Site | None = None
    measure: Literal["cosine", "projection", "feature"] = Field("cosine", description="feature: with a dictionary")
    above: Number | None = None
    below: Number | None = None
    over: Literal["token", "prompt_mean", "last_prompt"] = "token"
    hold: bool = Field(False, description="a token gate stays open for all later tokens once it has opened")

    @field_validator("layer")
    @classmethod
    def _of_vector(cls, layer: int | None, info: ValidationInfo) -> int | None:
        if layer is None and info.data.get("vector") is not None:
            raise PydanticCustomError("missing", "a gate on a vector needs the layer where it is read")
        return layer

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.above is None and self.below is None:
            raise ValueError("needs above, below or both")
        _one_source(self.vector, self.dictionary, self.index)
        if self.vector is not None and self.measure == "feature":
            raise ValueError("measure feature goes with dictionary and index")
        if self.dictionary is not None and "measure" in self.model_fields_set and self.measure != "feature":
            raise ValueError("with dictionary the measure is feature")
        return self


class Selecting(Model):
    layers: Layers | None = Field(None, description="default: the asset's")
    tokens: Tokens = "all"
    when: Gate | None = None


class Common(Selecting):
    site: Site | None = Field(None, description="default: the asset's")
    preserve_norm: bool = Field(False, description="rescale the result to the norm before this edit")


class Directed(Common):
    vector: Vector
    from_layer: Index | None = Field(
        None, description="use the asset's direction of this layer at every layer of `layers`"
    )


_SCALE = AliasChoices("scale", "strength", "coefficient")


class Add(Directed):
    """x + scale·v, or x + scale·‖x‖·v̂ with ``relative: "norm"``."""

    op: Literal["add"]
    scale: Number | None = Field(None, validation_alias=_SCALE, description="default: the asset's recommended, else 1")
    relative: Literal["norm"] | None = None


class Ablate(Directed):
    """x − strength·V̂V̂ᵀx."""

    op: Literal["ablate"]
    strength: Number = 1.0


class Clamp(Directed):
    """x + (c − v̂·x)v̂ with c = ``value``, or v̂·x bounded to [``min``, ``max``]."""

    op: Literal["clamp"]
    value: Number | None = None
    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Clamp:
        bounds = self.min is not None or self.max is not None
        if bounds == (self.value is not None):
            raise ValueError("needs either value, or min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min must not exceed max")
        return self


class Multiply(Directed):
    """x + (factor − 1)(v̂·x)v̂."""

    op: Literal["multiply"]
    factor: Number


class Rotate(Directed):
    """Turns x's part in the plane of ``vector`` and ``toward`` by ``degrees``, from the first to the second."""

    op: Literal["rotate"]
    toward: Vector
    degrees: Number


class Feature(Common):
    """x + (a′ − a)·W_dec[i] with a = f_i(x) by the dictionary's own encoder, so the reconstruction error is kept.

    a′ is ``value`` (``set``), a + value (``add``), a·value (``scale``) or 0 (``ablate``). The features of a list are
    all read before any is changed; interventions that follow each other see each other's changes.
    """

    op: Literal["feature"]
    dictionary: Annotated[str, Field(min_length=1)]
    index: Index | Annotated[list[Index], Field(min_length=1, max_length=MAX_FEATURES)]
    mode: Literal["set", "add", "scale", "ablate"] = "set"
    value: Number | Annotated[list[Number], Field(min_length=1, max_length=MAX_FEATURES)] | None = None
    only_if_active: bool = Field(False, description="leave tokens alone on which the feature is not active")

    @property
    def indices(self) -> list[int]:
        return self.index if isinstance(self.index, list) else [self.index]

    @property
    def values(self) -> list[float]:
        """One for each of ``indices``; 0 for ``ablate``."""
        return self.value if isinstance(self.value, list) else [self.value or 0.0] * len(self.indices)

    @model_validator(mode="after")
    def _one_value_each(self) -> Feature:
        if (self.mode == "ablate") != (self.value is None):
            raise ValueError("set, add and scale need value; ablate goes without")
        if len(set(self.indices)) != len(self.indices):
            raise ValueError("a feature is named twice")
        if len(self.values) != len(self.indices):
            raise ValueError("a list of values needs one for each index")
        return self


class Neurons(Common):
    """Sets, adds to or scales named neurons at ``mlp_post``."""

    op: Literal["neurons"]
    neurons: Annotated[str, Field(min_length=1)] | InlineNeurons
    mode: Literal["set", "add", "scale"] = "set"
    value: Number


class Heads(Common):
    """z_h·factor, or z_h + scale·v_h, for attention heads [layer, head]."""

    op: Literal["heads"]
    heads: Annotated[list[tuple[Index, Index]], Field(min_length=1)]
    factor: Number | None = None
    vector: Vector | None = None
    scale: Number | None = Field(None, validation_alias=_SCALE)

    @model_validator(mode="after")
    def _one_of(self) -> Heads:
        if (self.factor is None) == (self.vector is None):
            raise ValueError("needs either factor or vector")
        if self.factor is not None and self.scale is not None:
            raise ValueError("scale goes with vector, not with factor")
        return self


class Affine(Common):
    """x + strength·Rᵀ(Ax + b − Rx), from an ``affine`` asset (LoReFT's form)."""

    op: Literal["affine"]
    affine: Annotated[str, Field(min_length=1)]
    strength: Number = 1.0


class Patch(Common):
    """x replaced by a captured activation, wholly or, with ``basis``, in a subspace: x + VᵀV(captured − x).

    Several rows go to as many ``tokens.positions``, by default those that they were captured at; a single one, such as
    a mean over tokens, goes to whichever tokens are selected.
    """

    op: Literal["patch"]
    capture: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="the id of a kept capture")]
    prompt: Index = Field(0, description="which of the capture's prompts")
    source_positions: Annotated[list[Position], Field(min_length=1)] | None = Field(
        None, description="which of the captured positions; negative ones count from the prompt's end"
    )
    basis: Vector | None = Field(None, description="the subspace, one or more directions")


class InlineRecipe(Model):
    inline: Recipe = Field(description="sources: by default the 3 layers of the highest rates; targets: the best 10")


class Inject(Selecting):
    """x + scale·λ·Σ_k RR_k·x_k over the recipe's source layers k before this one, rescaled to ‖x‖ (IRI).

    At ``attn_out`` and ``mlp_out``, each with sources, targets and λ of its own; x_k is what layer k put out there for
    the same token, before any edit at that place. ``layers`` names some of the targets.
    """

    op: Literal["inject"]
    recipe: Annotated[str, Field(min_length=1)] | InlineRecipe
    scale: Number | None = Field(None, description="of both λ; default: the asset's recommended, else 1")
    tokens: Tokens = TokenSet(generated=True, last=1)


Intervention = Annotated[
    Add | Ablate | Clamp | Multiply | Rotate | Feature | Neurons | Heads | Affine | Patch | Inject,
    Field(discriminator="op"),
]


class Probe(Model):
    """What is only read, and reported per layer: a direction's coordinate v̂·x, or a feature's activation."""

    vector: Vector | None = None
    dictionary: Annotated[str, Field(min_length=1)] | None = None
    index: Index | None = Field(None, description="a feature of the dictionary")
    layers: Layers | None = None
    site: Site | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Probe:
        _one_source(self.vector, self.dictionary, self.index)
        return self


class Steering(Model):
    """What a request asks to be done inside the decoder layers."""

    profile: str | None = Field(None, description="stored interventions, applied first")
    default: bool = Field(True, description="false leaves out the server's default profile")
    interventions: list[Intervention] = Field(default_factory=list, max_length=MAX_INTERVENTIONS)
    probes: list[Probe] = Field(default_factory=list, max_length=MAX_PROBES)
    report: Literal["none", "summary", "layers", "tokens"] = "summary"
    stream_probes: bool = Field(False, description="send what the probes read with each chunk of a stream")
    signals: Annotated[list[str], AfterValidator(check_signals)] = Field(
        default_factory=list,
        max_length=MAX_SIGNALS,
        description="of each generated token: answer_entropy, evidence_entropy, conflict, logprob:ID, norm:LAYER, "
        "probe:VECTOR:LAYER",
    )

    @property
    def every_token(self) -> bool:
        """Whether what is reported tells of single tokens."""
        return self.report == "tokens" or self.stream_probes


def parse(data: object, path: str = "steering") -> Steering:
    """``data`` checked against :class:`Steering`; raises a SteeringError naming the field under ``path``."""
    return data if isinstance(data, Steering) else checked(Steering, data, path)


M = TypeVar("M", bound=Model)


def checked(model: type[M], data: object, path: str) -> M:
    """The same for any other request of ours."""
    try:
        # JSON mode: lists stand for tuples and strings for enums, everything else stays strict.
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _explain(error, data, path) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"is not plain JSON: {error}", param=path) from None


def _explain(error: ValidationError, data: object, path: str) -> errors.SteeringError:
    """The first complaint about a field that exists, as one of our errors."""
    param, found = _most_specific(error, data, path)
    first = found[0]
    kind, message = first["type"], _spell(found)
    if kind == "extra_forbidden":
        return errors.UnknownField(f"unknown field {first['loc'][-1]!r}", param=param)
    if kind == "too_long" and first["loc"] in (("interventions",), ("probes",)):
        return errors.TooManyInterventions(message, param=param)
    if kind == "finite_number":
        return errors.NonFinite("must be a finite number", param=param)
    if kind == "layer_out_of_range":
        return errors.LayerOutOfRange(message, param=param)
    if kind in ("less_than_equal", "greater_than_equal"):
        return errors.OutOfRange(message, param=param)
    return errors.InvalidRequest(message, param=param)


def _most_specific(error: ValidationError, data: object, path: str) -> tuple[str, list[Mapping[str, Any]]]:
    """The field that is wrong, and what is wrong with it.

    A union complains once for each of its members, in the members' order; the member that was meant is the one whose
    complaint lies deepest in the data.
    """
    param, found = "", list[Mapping[str, Any]]()
    for complaint in error.errors(include_url=False, include_context=False):
        here = json_path(path, data, complaint["loc"], complaint["type"])
        if not found or (here.startswith(param) and here[len(param) : len(param) + 1] in (".", "[")):
            param, found = here, [complaint]
        elif here == param:
            found.append(complaint)
    # Of the members that found the field itself wrong, one that got past its type was meant.
    return param, [e for e in found if not e["type"].endswith("_type")][:1] or found


def _spell(found: list[Mapping[str, Any]]) -> str:
    start = "Input should be "
    if found[0]["type"].startswith("union_tag"):
        return f"op must be one of {', '.join(OPS)}"
    messages = dict.fromkeys(str(e["msg"]) for e in found)
    if len(messages) > 1 and all(m.startswith(start) for m in messages):
        return start + " or ".join(m.removeprefix(start) for m in messages)
    return next(iter(messages)).removeprefix("Value error, ")


def json_path(prefix: str, data: object, loc: tuple[int | str, ...], kind: str) -> str:
    """pydantic's location as a JSON path, without the names of union members that it mixes in."""
    path, here = prefix, data
    for i, part in enumerate(loc):
        if i == 2 and loc[0] == "interventions":
            continue  # the op, as the union's tag; there are fields that are called like an op
        last = i == len(loc) - 1
        if isinstance(here, Mapping) and isinstance(part, str) and (part in here or (last and kind == "missing")):
            path, here = errors.join_path(path, part), here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            path, here = errors.join_path(path, f"[{part}]"), here[part]
    return errors.join_path(path, "op") if kind.startswith("union_tag") else path


OPS: tuple[str, ...] = tuple(get_args(m.model_fields["op"].annotation)[0] for m in get_args(get_args(Intervention)[0]))
"""The ops that requests may name."""
