"""numpy arrays in msgpack and in JSON, in the two ways that robots' programs write them.

In msgpack, as ``openpi-client`` does: ``{b"__ndarray__": True, b"data", b"dtype", b"shape"}`` for an array,
``{b"__npgeneric__": True, b"data", b"dtype"}`` for a scalar. In JSON, as the ``json-numpy`` package does:
``{"__numpy__": base64, "dtype", "shape"}``, a shape of no dimensions for a scalar. Only booleans, integers and floats
of up to eight bytes are taken; everything else, and bytes that do not fill their shape, is a ValueError.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


def pack(value: Any) -> bytes:
    """A tree of dictionaries, lists, scalars and arrays as msgpack."""
    return msgspec.msgpack.encode(value, enc_hook=_packed)


def unpack(data: bytes) -> Any:
    """What :func:`pack` was given; its arrays are read-only views of ``data``."""
    try:
        return _walked(msgspec.msgpack.decode(data))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"is not msgpack: {error}") from None


def to_json(value: Any) -> str:
    return json.dumps(value, default=_encoded)


def from_json(text: str | bytes) -> Any:
    """What :func:`to_json` was given."""
    try:
        return json.loads(text, object_hook=_decoded)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        dtype = _dtype(value.dtype.str).str
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": dtype, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": _dtype(value.dtype.str).str}
    raise TypeError(f"{type(value).__name__} has no msgpack form")


def _walked(value: Any) -> Any:
    if isinstance(value, list):
        return [_walked(v) for v in value]
    if not isinstance(value, dict):
        return value
    if b"__ndarray__" in value:
        return _array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        dtype, scalar = _dtype(value.get(b"dtype")), value.get(b"data")
        if not isinstance(scalar, int | float) or (dtype.kind != "f" and isinstance(scalar, float)):
            raise ValueError(f"a scalar of {dtype} must be such a number")
        try:
            return dtype.type(scalar)
        except OverflowError as error:
            raise ValueError(f"a scalar does not fit its dtype: {error}") from None
    return {k: _walked(v) for k, v in value.items()}


def _encoded(value: Any) -> Mapping[str, Any]:
    if isinstance(value, np.ndarray | np.generic):
        data = base64.b64encode(value.tobytes()).decode()
        return {"__numpy__": data, "dtype": _dtype(value.dtype.str).str, "shape": list(value.shape)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _decoded(found: dict[str, Any]) -> Any:
    if "__numpy__" not in found:
        return found
    try:
        data = base64.b64decode(found["__numpy__"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("an array's data is not base64") from None
    array = _array(data, found.get("dtype"), found.get("shape"))
    return array if array.ndim else array[()]


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(f"an array's dtype must be of booleans, integers or floats, not {name!r}")
    return np.dtype(name)


def _array(data: Any, dtype: Any, shape: Any) -> NDArray[Any]:
    kind = _dtype(dtype)
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape) or len(shape) > 32:
        raise ValueError(f"an array's shape must be a list of sizes, not {str(shape)[:80]}")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * kind.itemsize:
        size = len(data) if isinstance(data, bytes) else "no"
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has {size} bytes of data")
    return np.frombuffer(data, kind).reshape(shape)
