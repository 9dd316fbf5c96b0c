"""Conditional activation steering's `.svec`: JSON `{model_type, directions: {"<L>": [..]}, explained_variances}`.

L is the 0-based block at whose **input** the direction is added (it was read at that block's output, which changes
nothing about where it acts). The input of block L is the output of block L − 1: the asset is at `resid_post`, every
layer one lower than in the file. Block 0's input is the embedding, which is no block's output: that direction is left
out, and the provenance says so. The provenance keeps the file's own layer numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from steersman.steering.assets import Asset, ModelRef
from steersman.steering.errors import LayerOutOfRange, UploadMalformed
from steersman.steering.formats.foreign import assemble, needed_model, stack
from steersman.steering.formats.native import loads
from steersman.steering.sites import Site

_LAYER: Final = re.compile(r"0|[1-9][0-9]{0,5}")
_FIELDS: Final = ("model_type", "directions", "explained_variances")


def from_svec(data: bytes, /, *, name: str | None = None, model: ModelRef | None = None, **fields: Any) -> Asset:
    """The file's vector. `model` is the served model, whose id a `.svec` does not state.

    `name` and further `fields` of the metadata (source, licence, ...) go before the file's own.
    """
    content = loads(data, "file")
    for key in content:
        if key not in _FIELDS:
            raise UploadMalformed(f"a .svec has no field '{key[:64]}'", "file")
    directions, variances = content.get("directions"), content.get("explained_variances", {})
    if not isinstance(directions, Mapping) or not isinstance(variances, Mapping):
        raise UploadMalformed("not a .svec: directions and explained_variances must be objects by layer", "file")
    rows = {_layer(key): _row(key, row) for key, row in directions.items()}
    embedding = rows.pop(0, None)
    if embedding is not None and not rows:
        raise LayerOutOfRange("it acts on the embedding alone, which is no layer's output", "file")
    layers, vectors = stack({layer - 1: row for layer, row in rows.items()})
    provenance = {"format": "svec", "model_type": content.get("model_type"), "explained_variances": dict(variances)}
    if embedding is not None:
        provenance["left_out"] = "layer 0: its input is the embedding, which is no layer's output"
    metadata = {
        "kind": "vector",
        "site": Site.RESID_POST.value,
        "layers": layers,
        "model": needed_model(model, "a .svec").model_dump(mode="json"),
        "provenance": provenance,
    }
    return assemble(metadata, {"name": name, **fields}, {"vectors": vectors})


def _layer(key: str) -> int:
    if _LAYER.fullmatch(key) is None:
        raise UploadMalformed(f"directions: '{key[:64]}' is no layer", "file")
    return int(key)


def _row(key: str, row: Any) -> Tensor:
    if not isinstance(row, list) or not row or not all(type(number) in (int, float) for number in row):
        raise UploadMalformed(f"directions: layer {key} is not a list of numbers", "file")
    try:
        return torch.tensor(row, dtype=torch.float32)
    except (OverflowError, RuntimeError) as error:  # an integer beyond what a float holds
        raise UploadMalformed(f"directions: layer {key} is not a list of numbers: {error}", "file") from error
