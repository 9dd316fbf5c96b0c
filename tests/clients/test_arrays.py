"""Arrays in msgpack and JSON: the real openpi-client and json-numpy read ours, and we theirs."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from steersman.clients import arrays

VALUES = [
    np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    np.arange(6, dtype=">f4").reshape(3, 2),
    np.array([1.5, -2.25, np.inf]),
    np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    np.zeros((0, 3), np.float16),
    np.array(7, np.int64),
    np.array([True, False]),
]


def same(a: Any, b: Any) -> None:
    assert a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=")
    np.testing.assert_array_equal(a, b, strict=False)
    assert a.shape == b.shape


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.dtype}{v.shape}")
def test_round_trips(value: np.ndarray[Any, Any]) -> None:
    same(arrays.unpack(arrays.pack({"a": [value]}))["a"][0], value)
    same(arrays.from_json(arrays.to_json({"a": value}))["a"], value)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.dtype}{v.shape}")
def test_openpi_client(value: np.ndarray[Any, Any]) -> None:
    theirs = pytest.importorskip("openpi_client.msgpack_numpy", reason="pip install --no-deps openpi-client msgpack")
    same(arrays.unpack(theirs.packb({"a": value}))["a"], value)
    same(theirs.unpackb(arrays.pack({"a": value}))["a"], value)
    assert arrays.unpack(theirs.packb({"a": np.float32(1.5)})) == {"a": np.float32(1.5)}
    assert theirs.unpackb(arrays.pack({"a": np.int32(3), "b": None})) == {"a": 3, "b": None}


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.dtype}{v.shape}")
def test_json_numpy(value: np.ndarray[Any, Any]) -> None:
    theirs = pytest.importorskip("json_numpy", reason="pip install json-numpy")
    if value.size:
        same(arrays.from_json(theirs.dumps({"a": value}))["a"], value)
        same(theirs.loads(arrays.to_json({"a": value}))["a"], value)


def _array(**changes: Any) -> dict[bytes, Any]:
    about = {b"__ndarray__": True, b"data": bytes(6), b"dtype": "|u1", b"shape": [2, 3]}
    return {**about, **{k.encode(): v for k, v in changes.items()}}


BAD = [
    (_array(dtype="|O8"), "dtype"),
    (_array(dtype="<c8"), "dtype"),
    (_array(dtype="<f16"), "dtype"),
    (_array(dtype="u1,u1"), "dtype"),
    (_array(dtype=[["a", "<f4"]]), "dtype"),
    (_array(dtype=None), "dtype"),
    (_array(shape=[2, 4]), "bytes of data"),
    (_array(shape=[-1, 6]), "shape"),
    (_array(shape=[2.0, 3]), "shape"),
    (_array(shape=[True, 6]), "shape"),
    (_array(shape=[0, 2**40]), "shape"),
    (_array(shape=[1] * 33), "shape"),
    (_array(shape=None), "shape"),
    (_array(data="AAAAAA"), "bytes of data"),
    ({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}, "scalar"),
    ({b"__npgeneric__": True, b"data": [], b"dtype": "<i4"}, "scalar"),
]


@pytest.mark.parametrize(("value", "complaint"), BAD)
def test_arrays_that_are_none(value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        arrays.unpack(msgspec.msgpack.encode({"image": value}))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa1a", b"\x91" * 100_000])
def test_bytes_that_are_no_msgpack(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"msgpack|nested"):
        arrays.unpack(data)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"__numpy__": "!!", "dtype": "<f4", "shape": [1]}, "base64"),
        ({"__numpy__": 5, "dtype": "<f4", "shape": [1]}, "base64"),
        ({"__numpy__": "AAAA", "dtype": "|V3", "shape": [1]}, "dtype"),
        ({"__numpy__": "AAAA", "dtype": "|u1", "shape": [1]}, "bytes of data"),
        ({"__numpy__": "AAAA", "dtype": "|u1"}, "shape"),
    ],
)
def test_json_that_holds_no_array(value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        arrays.from_json(json.dumps(value))


def test_objects_have_no_form() -> None:
    with pytest.raises(ValueError, match="dtype"):
        arrays.pack(np.array([object()]))
    with pytest.raises(TypeError, match="no msgpack form"):
        arrays.pack({"a": object()})
