"""What the metadata of every kind of asset is made of: names, numbers, the model it was made for, its origin."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from steersman.steering.errors import InvalidRequest

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(name: str) -> bool:
    """Whether `name` may name an asset. It becomes a folder's name, so nothing that could leave the store's root."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def _check_name(name: str) -> str:
    if not is_name(name):
        raise ValueError("a name is 1 to 128 of A-Z a-z 0-9 . _ -, starts with a letter or digit and has no '..'")
    return name


def canonical_json(value: Any) -> str:
    """One text per JSON value: sorted keys, no spaces, ASCII, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _as_json(value: Any) -> Any:
    """A copy of `value` as JSON holds it: what is hashed and stored is what the asset in memory says."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, RecursionError) as error:
        raise ValueError("must be plain JSON") from error


def _check_tokens(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError("a token selection is a word or an object")
    return _as_json(value)


def check_increasing(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(b <= a for a, b in itertools.pairwise(layers)):
        raise ValueError("layers must be strictly increasing")
    return layers


Index = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Layers = Annotated[tuple[Index, ...], Field(min_length=1), AfterValidator(check_increasing)]
Text = Annotated[str, Field(max_length=65536)]
FreeObject = Annotated[dict[str, Any], AfterValidator(_as_json)]
Shapes = Mapping[str, tuple[int, ...]]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(Frozen):
    """The model that an asset was made for."""

    id: Annotated[str, Field(min_length=1, max_length=512)]
    n_layers: Count
    d_model: Count
    fingerprint: str | None = None  # of the weights, when known


class Recommended(Frozen):
    """The strength to use when a request names none, and how it was found."""

    scale: Number
    how: Text = ""


class CommonMeta(Frozen):
    name: Annotated[str, AfterValidator(_check_name)]
    model: ModelRef
    source: Text = ""
    licence: Text = ""
    description: Text = ""
    provenance: FreeObject = Field(default_factory=dict)  # how it was created: method, data, tool, ...
    recommended: Recommended | None = None
    tokens: Annotated[Any, AfterValidator(_check_tokens)] = None  # default token selection; absent: the op's own

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers that the asset has something for, ascending."""
        return ()

    def check_tensors(self, shapes: Shapes) -> None:
        """Raises unless `shapes` is what the metadata announces."""
        expect_tensors(shapes, ())

    @model_validator(mode="after")
    def _layers_in_model(self) -> CommonMeta:
        if self.edited_layers and self.edited_layers[-1] >= self.model.n_layers:
            raise beyond(self.edited_layers[-1], self.model.n_layers)
        return self


def beyond(layer: int, n_layers: int) -> PydanticCustomError:
    """What a validator raises of a layer that the model does not have."""
    return PydanticCustomError(
        "layer_out_of_range",
        "layer {layer} is beyond the model's {n} layers, which count from 0",
        {"layer": layer, "n": n_layers},
    )


def expect_tensors(shapes: Shapes, wanted: tuple[str, ...]) -> None:
    if set(shapes) != set(wanted):
        have, want = ", ".join(sorted(shapes)) or "none", ", ".join(wanted) or "none"
        raise InvalidRequest(f"tensors: {have}; wanted: {want}", "tensors")
