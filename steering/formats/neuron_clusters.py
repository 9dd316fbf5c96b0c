"""Clusters of neurons as `mechanistic-steering-vlas` (arXiv 2509.00328) releases them, in a YAML or JSON file.

`{name: [id, ..]}`, or `{name: {id: [token, ..]}}` with what each neuron's top tokens were. An id is layer·d_ff + index,
counted through the language model's layers from 0; what a neuron's index means is that of `mlp_post`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from steersman.steering.errors import FormatUnavailable, InvalidRequest


def read(text: str | bytes) -> dict[str, list[int]]:
    """Cluster name to flat ids; `InvalidRequest` (`clusters`) names what is wrong."""
    data = _parse(text)
    if not isinstance(data, Mapping) or not data:
        raise InvalidRequest("must be an object of clusters by name", "clusters")
    out = {}
    for name, ids in data.items():
        if not isinstance(ids, list | Mapping):
            raise InvalidRequest("must be a list of ids, or an object by id", f"clusters.{name}")
        numbers = [int(i) if isinstance(i, str) and i.isascii() and i.isdigit() else i for i in ids]
        if bad := [i for i in numbers if type(i) is not int or i < 0]:
            raise InvalidRequest(f"{bad[0]!r} is no id", f"clusters.{name}")
        if len(set(numbers)) != len(numbers):
            raise InvalidRequest("an id is named twice", f"clusters.{name}")
        out[str(name)] = numbers
    return out


def pairs(ids: list[int], n_layers: int, d_ff: int) -> list[tuple[int, int]]:
    """(layer, index) of flat ids."""
    if beyond := [i for i in ids if i >= n_layers * d_ff]:
        raise InvalidRequest(f"{beyond[0]} is beyond {n_layers} layers of {d_ff} neurons", "clusters")
    return [divmod(i, d_ff) for i in ids]


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise FormatUnavailable("reading YAML needs the package pyyaml", "clusters") from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"neither JSON nor YAML: {error}", "clusters") from error
