"""What the readers of dictionaries share: checked access to a file's tensors and to its configuration."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from steersman.steering.errors import InvalidRequest, UploadMalformed

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Parts:
    """What a file says of a dictionary, in our names; what it leaves open is for the user to say."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    hook: str | None = None  # where it reads
    hook_out: str | None = None  # where a transcoder writes
    model: str | None = None  # its id


def take_only(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> None:
    """Raises unless the file holds just these tensors: an unknown one might change what the dictionary computes."""
    if set(tensors) != set(wanted):
        have, want = ", ".join(sorted(tensors)), ", ".join(sorted(wanted))
        raise UploadMalformed(f"it holds the tensors {have[:512]}; wanted: {want}", "file")


def matrix(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return _of_rank(tensors, name, 2)


def row(tensors: Mapping[str, Tensor], name: str, count: int | None = None) -> Tensor:
    """A vector; a scalar that stands for `count` equal numbers as these."""
    tensor = tensors.get(name)
    if tensor is not None and count is not None and tensor.dim() == 0:
        return tensor.expand(count)
    return _of_rank(tensors, name, 1)


def _of_rank(tensors: Mapping[str, Tensor], name: str, rank: int) -> Tensor:
    if name not in tensors:
        raise UploadMalformed(f"it has no tensor {name}", "file")
    tensor = tensors[name]
    if tensor.dim() != rank or not tensor.numel():
        raise UploadMalformed(f"{name} has the shape {list(tensor.shape)}, wanted: {rank} dimensions", "file")
    return tensor


def number(config: Mapping[str, Any], name: str, kind: type[N], param: str = "config") -> N:
    """A positive number of the configuration."""
    value = config.get(name)
    right = type(value) is int or (kind is float and type(value) is float)
    if not right or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise InvalidRequest(f"must be a positive {'integer' if kind is int else 'number'}", f"{param}.{name}")
    return kind(value)  # type: ignore[arg-type]


def stated_scale(config: Mapping[str, Any]) -> float:
    """`input_scale`, where a file's dictionary scales its input and does not say by what."""
    if "input_scale" not in config:
        raise InvalidRequest(
            "the activations were scaled by a number that the file does not state: give config.input_scale, √d over "
            "the mean norm of the activations, or 1 where it has been folded into the weights",
            "config.input_scale",
        )
    return number(config, "input_scale", float)


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest("must be true or false", f"config.{name}")
    return value


def text(config: Mapping[str, Any], name: str, default: str | None = None, param: str = "config") -> str:
    value = config.get(name, default)
    if not isinstance(value, str):
        raise InvalidRequest("must be a text", f"{param}.{name}")
    return value
