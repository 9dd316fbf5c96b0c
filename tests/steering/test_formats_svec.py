import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.steering.assets import ModelRef
from steersman.steering.errors import (
    InvalidRequest,
    LayerOutOfRange,
    NonFinite,
    SteeringError,
    UploadMalformed,
    WidthMismatch,
)
from steersman.steering.formats import uploads
from steersman.steering.formats.svec import from_svec

MODEL = ModelRef(id="tiny", n_layers=4, d_model=3)
ROW = [1.0, 2, -0.5]


def svec(directions: Any, **fields: Any) -> bytes:
    return json.dumps({"model_type": "llama", "directions": directions, "explained_variances": {}, **fields}).encode()


def test_layers_are_one_lower_and_in_order() -> None:
    asset = from_svec(svec({"4": ROW, "2": [0, 0, 1]}), name="x", model=MODEL, licence="MIT")
    assert asset.meta.edited_layers == (1, 3)
    assert asset.meta.site == "resid_post"
    assert asset.meta.licence == "MIT"
    assert torch.equal(asset.tensors["vectors"], torch.tensor([[0, 0, 1], ROW]))
    assert "left_out" not in asset.meta.provenance


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_every_float32_survives_its_spelling(row: list[float]) -> None:
    asset = from_svec(svec({"1": row}), name="x", model=MODEL)
    assert torch.equal(asset.tensors["vectors"][0], torch.tensor(row))


def test_an_upload_is_known_by_how_it_begins() -> None:
    fields = {"name": "x", "model": MODEL.model_dump()}
    asset = uploads.read(b"\n  " + svec({"1": ROW}), fields)
    assert asset.ref == from_svec(svec({"1": ROW}), name="x", model=MODEL).ref
    with pytest.raises(InvalidRequest) as raised:
        uploads.read(svec({"1": ROW}), {"name": "x"})
    assert raised.value.param == "model"
    # A safetensors file whose header happens to be 123 = ord("{") bytes long is none.
    with pytest.raises(UploadMalformed, match="safetensors"):
        uploads.read((123).to_bytes(8, "little") + b"{}", fields)


@pytest.mark.parametrize(
    ("directions", "error"),
    [
        ({}, UploadMalformed),
        ([ROW], UploadMalformed),
        ({"0": ROW}, LayerOutOfRange),
        ({"5": ROW}, LayerOutOfRange),
        ({"-1": ROW}, UploadMalformed),
        ({"01": ROW}, UploadMalformed),
        ({"1.0": ROW}, UploadMalformed),
        ({"../1": ROW}, UploadMalformed),
        ({"1": ROW, "2": ROW[:2]}, UploadMalformed),
        ({"1": ROW[:2]}, WidthMismatch),
        ({"1": []}, UploadMalformed),
        ({"1": [ROW]}, UploadMalformed),
        ({"1": [True, 0, 0]}, UploadMalformed),
        ({"1": ["1", 0, 0]}, UploadMalformed),
        ({"1": [None, 0, 0]}, UploadMalformed),
        ({"1": [10**400, 0, 0]}, UploadMalformed),
        ({"1": [1e300, 0, 0]}, NonFinite),
    ],
)
def test_bad_directions(directions: Any, error: type[SteeringError]) -> None:
    with pytest.raises(error):
        from_svec(svec(directions), name="x", model=MODEL)


@pytest.mark.parametrize(
    "data",
    [
        svec({"1": ROW}, extra=1),
        svec({"1": ROW}, explained_variances=[1]),
        svec({"1": ROW}).replace(b"-0.5", b"NaN"),
        b'{"directions": {"1": [1, 2, 3], "1": [4, 5, 6]}}',
        b"[1]",
        b"",
    ],
)
def test_bad_files(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        from_svec(data, name="x", model=MODEL)


def test_nesting_without_end_costs_nothing() -> None:
    start = time.monotonic()
    with pytest.raises(InvalidRequest):
        from_svec(b'{"directions": ' + b"[" * 10**6, name="x", model=MODEL)
    assert time.monotonic() - start < 5


WHOLE = svec({"0": ROW, "1": ROW})


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_files_are_read_or_refused_in_words(at: int, byte: int, cut: bool) -> None:
    data = WHOLE[:at] if cut else WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :]
    try:
        asset = from_svec(data, name="x", model=MODEL)
    except InvalidRequest:
        return
    assert not cut
    assert asset.tensors["vectors"].shape == (len(asset.meta.edited_layers), 3)
