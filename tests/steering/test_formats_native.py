import base64
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.steering.assets import DTYPES, Asset, parse_metadata
from steersman.steering.errors import (
    InlineMalformed,
    InvalidRequest,
    NonFinite,
    SteeringError,
    UnknownField,
    UploadMalformed,
)
from steersman.steering.formats import native

META: dict[str, Any] = {
    "name": "x",
    "kind": "vector",
    "model": {"id": "m", "n_layers": 2, "d_model": 3},
    "layers": [0, 1],
}


def make(dtype: str = "float32") -> Asset:
    generator = torch.Generator().manual_seed(0)
    return Asset(parse_metadata(META), {"vectors": torch.randn(2, 3, generator=generator).to(DTYPES[dtype])})


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms_come_back_as_the_same_version(dtype: str) -> None:
    asset = make(dtype)
    assert native.from_safetensors(native.to_safetensors(asset)).sha256 == asset.sha256
    text = json.dumps(native.to_json(asset))
    assert native.from_json(text).sha256 == native.from_json(text.encode()).sha256 == asset.sha256
    assert native.from_json(native.to_json(asset)).sha256 == asset.sha256


def test_metadata_beside_the_file_goes_first() -> None:
    data = native.to_safetensors(make())
    assert native.from_safetensors(data, {**META, "name": "y"}).name == "y"
    bare = safetensors.torch.save({"vectors": torch.ones(2, 3)})
    assert native.from_safetensors(bare, META).name == "x"
    with pytest.raises(InvalidRequest) as raised:
        native.from_safetensors(bare)
    assert raised.value.param == "metadata"
    with pytest.raises(UnknownField) as unknown:
        native.from_safetensors(bare, {**META, "model": {**META["model"], "q": 1}})
    assert unknown.value.param == "metadata.model.q"


@given(st.binary(max_size=200) | st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + b"{}"))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(UploadMalformed):
        native.from_safetensors(data, META)


@given(cut=st.integers(0, 150))
def test_truncated_files_are_refused_in_words(cut: int) -> None:
    whole = native.to_safetensors(make())
    with pytest.raises(UploadMalformed):
        native.from_safetensors(whole[: len(whole) - 1 - cut])


def test_a_header_without_metadata_is_refused_in_words() -> None:
    header = json.dumps({"__metadata__": None, "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(InvalidRequest) as raised:
        native.from_safetensors(len(header).to_bytes(8, "little") + header + bytes(4))
    assert raised.value.param == "metadata"


def test_nested_lists_are_float32() -> None:
    asset = native.from_json({**META, "tensors": {"vectors": [[1, 2, 3], [4, 5, 6.5]]}})
    assert torch.equal(asset.tensors["vectors"], torch.tensor([[1, 2, 3], [4, 5, 6.5]]))


@pytest.mark.parametrize(
    ("tensors", "error", "param"),
    [
        ([], InvalidRequest, "tensors"),
        ({"vectors": 3}, InlineMalformed, "tensors.vectors"),
        ({"vectors": [[1, 2], [3]]}, InlineMalformed, "tensors.vectors"),
        ({"vectors": ["a"]}, InlineMalformed, "tensors.vectors"),
        ({"vectors": [[10**400, 1, 2]]}, InlineMalformed, "tensors.vectors"),
        ({"vectors": {"shape": [2, 3], "data": "", "q": 1}}, UnknownField, "tensors.vectors.q"),
        ({"vectors": {"shape": [2, 3]}}, InlineMalformed, "tensors.vectors.data"),
        ({"vectors": {"shape": [2, 3], "data": "?"}}, InlineMalformed, "tensors.vectors.data"),
        ({"vectors": {"shape": [2, 3], "data": "ä"}}, InlineMalformed, "tensors.vectors.data"),
        ({"vectors": {"shape": [2, 3], "data": "AAAA"}}, InlineMalformed, "tensors.vectors.data"),
        ({"vectors": {"dtype": "int8", "shape": [2, 3], "data": ""}}, InlineMalformed, "tensors.vectors.dtype"),
        ({"vectors": {"dtype": [], "shape": [2, 3], "data": ""}}, InlineMalformed, "tensors.vectors.dtype"),
        ({"vectors": {"shape": [2**62, 2**62], "data": "AAAA"}}, InlineMalformed, "tensors.vectors.data"),
        ({"vectors": {"shape": [True, 1], "data": "AAAA"}}, InlineMalformed, "tensors.vectors.shape"),
        ({"vectors": {"shape": [0], "data": ""}}, InlineMalformed, "tensors.vectors.shape"),
        ({"vectors": {"shape": [1] * 4, "data": "AAAAAA=="}}, InlineMalformed, "tensors.vectors.shape"),
        ({"vectors": {"shape": "23", "data": ""}}, InlineMalformed, "tensors.vectors.shape"),
        ({"vectors": [[1e39, 0, 0], [0, 0, 0]]}, SteeringError, "tensors.vectors"),
    ],
)
def test_bad_tensors_name_their_field(tensors: Any, error: type[SteeringError], param: str) -> None:
    with pytest.raises(error) as raised:
        native.from_json({**META, "tensors": tensors})
    assert raised.value.param == param


def test_non_finite_bytes_are_refused() -> None:
    data = base64.b64encode(torch.full((2, 3), torch.nan).numpy().tobytes()).decode()
    with pytest.raises(NonFinite):
        native.from_json({**META, "tensors": {"vectors": {"shape": [2, 3], "data": data}}})


@pytest.mark.parametrize("text", ["", "[]", "nul", '{"name": NaN}', '{"name": 1, "name": 2}', "[" * 100_000, b"\xff"])
def test_what_is_no_json_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidRequest) as raised:
        native.from_json(text)
    assert raised.value.param == "body"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from(list(DTYPES)), st.integers(0, 2**31))
def test_tensors_survive_base64(shape: list[int], dtype: str, seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
    back = native.decode_tensor(native.encode_tensor(tensor), "x")
    assert back.dtype == tensor.dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    back.add_(1)  # owns its memory
