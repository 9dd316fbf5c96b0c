"""Our own uploads: a `.safetensors` file, or JSON, to an asset and back.

- safetensors: the metadata is `asset.json`'s object, given beside the file or under the key `steersman` of its header.
- JSON: the metadata's object with one more field, `tensors`: name -> {"dtype", "shape", "data"}, data being base64 of
  the little-endian array; or name -> nested lists of numbers, read as float32.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

import safetensors.torch
import torch

from steersman.steering.assets import DTYPES, LABEL_DTYPES, Asset, canonical_json, dump_metadata, parse_metadata
from steersman.steering.errors import (
    InlineMalformed,
    InvalidRequest,
    SteeringError,
    UnknownField,
    UploadMalformed,
    located,
)
from steersman.steering.rows import RowFile

HEADER_KEY: Final = "steersman"
_MAX_DIMENSIONS: Final = 3
_READABLE: Final = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in LABEL_DTYPES.values()}


def from_safetensors(data: bytes, metadata: Mapping[str, Any] | None = None) -> Asset:
    """`metadata`, where given, stands in place of the file's own."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except Exception as error:  # the reader documents no list of what it raises
        raise UploadMalformed(f"not a safetensors file: {error}", "file") from error
    if metadata is None:
        text = header.get(HEADER_KEY)
        if text is None:
            raise InvalidRequest(f"no metadata is given, and the file's header has no '{HEADER_KEY}'", "metadata")
        metadata = loads(text, "metadata")
    with located("metadata"):
        meta = parse_metadata(dict(metadata))
    return Asset(meta, tensors)


def to_safetensors(asset: Asset) -> bytes:
    """One file that `from_safetensors` reads back to the same version."""
    return b"".join(to_parts(asset))


def to_parts(asset: Asset) -> Iterator[bytes]:
    """The same file a part at a time: of tensors on disk, no more than a part is held in memory."""
    metadata = {HEADER_KEY: canonical_json(dump_metadata(asset.meta))}
    if isinstance(asset.tensors, RowFile):
        yield from asset.tensors.content(metadata)
    else:
        yield bytes(safetensors.torch.save(dict(asset.tensors), metadata))


def from_json(value: str | bytes | Mapping[str, Any]) -> Asset:
    fields = dict(value) if isinstance(value, Mapping) else loads(value, "body")
    tensors = fields.pop("tensors", {})
    if not isinstance(tensors, Mapping):
        raise InvalidRequest("must be an object of tensors by name", "tensors")
    meta = parse_metadata(fields)
    return Asset(meta, {name: _tensor(tensor, f"tensors.{name}") for name, tensor in tensors.items()})


def to_json(asset: Asset) -> dict[str, Any]:
    return {
        **dump_metadata(asset.meta),
        "tensors": {name: encode_tensor(tensor) for name, tensor in asset.tensors.items()},
    }


def encode_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(raw).decode(),
    }


def decode_tensor(value: Mapping[str, Any], param: str) -> torch.Tensor:
    """{"dtype", "shape", "data"} as a tensor that owns its memory; `InlineMalformed` names the bad field."""
    for key in value:
        if key not in ("dtype", "shape", "data"):
            raise UnknownField(f"unknown field '{key}'", f"{param}.{key}")
    dtype, shape, data = value.get("dtype", "float32"), value.get("shape"), value.get("data")
    if not isinstance(dtype, str) or dtype not in _READABLE:
        raise InlineMalformed(f"must be one of {', '.join(_READABLE)}", f"{param}.dtype")
    if not isinstance(shape, list | tuple) or not 1 <= len(shape) <= _MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise InlineMalformed(f"must be 1 to {_MAX_DIMENSIONS} positive integers", f"{param}.shape")
    if not isinstance(data, str):
        raise InlineMalformed("must be base64 text", f"{param}.data")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InlineMalformed(f"must be base64 text: {error}", f"{param}.data") from error
    wanted = math.prod(shape) * _READABLE[dtype].itemsize
    if len(raw) != wanted:
        raise InlineMalformed(f"holds {len(raw)} bytes; {dtype} {list(shape)} needs {wanted}", f"{param}.data")
    return torch.frombuffer(bytearray(raw), dtype=_READABLE[dtype]).reshape(tuple(shape))


def loads(text: str | bytes, param: str) -> dict[str, Any]:
    """A JSON object. Unlike Python's reader: no NaN, no infinity, no key twice."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_distinct)
    except SteeringError as error:
        raise error.at(param) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}", param) from error
    if not isinstance(value, dict):
        raise InvalidRequest("must be a JSON object", param)
    return value


def _tensor(value: Any, param: str) -> torch.Tensor:
    if isinstance(value, Mapping):
        return decode_tensor(value, param)
    try:
        if not isinstance(value, list):
            raise TypeError("neither an object nor a list")
        return torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InlineMalformed(f"not a tensor: {error}", param) from error


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not a JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidRequest("a key is given twice")
    return value
