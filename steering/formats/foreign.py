"""What the readers of other projects' files share: rows by layer, and an asset from what file and user say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from steersman.steering.assets import D_MODEL_SITES, Asset, ModelRef, parse_metadata, validation_error
from steersman.steering.errors import InvalidRequest, LayerOutOfRange, UploadMalformed, WidthMismatch


def stated_model(fields: Mapping[str, Any]) -> tuple[ModelRef | None, dict[str, Any]]:
    """The `model` among the metadata that a user gave, if any, and the other fields."""
    rest = dict(fields)
    stated = rest.pop("model", None)
    try:
        return (None if stated is None else ModelRef.model_validate(stated)), rest
    except ValidationError as error:
        raise validation_error(error, "metadata.model") from None


def needed_model(model: ModelRef | None, what: str) -> ModelRef:
    """`model`; an error that says that `what` does not state it where it is missing."""
    if model is None:
        raise InvalidRequest(f"{what} does not state its model's id and size: name the model", "model")
    return model


def stack(rows: Mapping[int, Tensor]) -> tuple[list[int], Tensor]:
    """Rows [...] by layer as the layers in ascending order and [L, ...]."""
    if not rows:
        raise UploadMalformed("it holds no layer", "file")
    if len({(row.shape, row.dtype) for row in rows.values()}) != 1:
        raise UploadMalformed("its layers differ in shape or number type", "file")
    layers = sorted(rows)
    return layers, torch.stack([rows[layer] for layer in layers])


def assemble(metadata: Mapping[str, Any], given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Asset:
    """The asset of a file: its `metadata`, before which go the fields `given` by the user that are not None.

    `metadata` names at least kind, site, layers and model. Layers and widths that do not fit the model are errors at
    `file`.
    """
    stated = {**metadata, **{key: value for key, value in given.items() if value is not None}}
    if "name" not in stated:
        raise InvalidRequest("the file states no name", "name")
    model = ModelRef.model_validate(metadata["model"])
    about = f"{model.id} ({model.n_layers} layers, d_model {model.d_model})"
    last = max(metadata["layers"])
    if last >= model.n_layers:
        raise LayerOutOfRange(f"layer {last} is beyond {about}", "file")
    width = next(iter(tensors.values())).shape[-1]
    if metadata["site"] in D_MODEL_SITES and width != model.d_model:
        raise WidthMismatch(f"its rows are {width} wide, not those of {about}", "file")
    return Asset(parse_metadata(stated), tensors)
