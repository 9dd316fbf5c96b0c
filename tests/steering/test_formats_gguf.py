import contextlib
import struct
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.steering.assets import Asset, ModelRef, parse_metadata
from steersman.steering.errors import (
    AssetKindMismatch,
    FormatUnavailable,
    InvalidRequest,
    LayerOutOfRange,
    ModelMismatch,
    NonFinite,
    SiteUnsupported,
    SteeringError,
    UploadMalformed,
    WidthMismatch,
)
from steersman.steering.formats.gguf import from_gguf, to_gguf

MODEL = ModelRef(id="tiny", n_layers=8, d_model=5)


def make(dtype: torch.dtype = torch.float32, layers: tuple[int, ...] = (1, 2, 7), **fields: Any) -> Asset:
    meta = {"name": "x", "kind": "vector", "model": MODEL.model_dump(), "layers": layers, **fields}
    vectors = torch.randn(len(layers), 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Asset(parse_metadata(meta), {"vectors": vectors})


def foreign(path: Path, rows: dict[str, np.ndarray], arch: str = "controlvector", easysteer: bool = False) -> bytes:
    """As repeng's `export_gguf` writes it; EasySteer adds its own fields."""
    writer = gguf.GGUFWriter(path / "in.gguf", arch)
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", len(rows))
    if easysteer:
        writer.add_string("controlvector.method", "diffmean")
        writer.add_float32("controlvector.normalize", 1.0)
        writer.add_string("controlvector.token_pos", "-1")
        writer.add_float32("controlvector.explained_variance.0", float("nan"))
    for name, row in rows.items():
        writer.add_tensor(name, row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path / "in.gguf").read_bytes()


ROWS = {f"direction.{layer}": np.arange(5, dtype=np.float32) + layer for layer in (2, 0, 7)}


def test_repeng(tmp_path: Path) -> None:
    asset = from_gguf(foreign(tmp_path, ROWS), name="happy", model=MODEL, licence="MIT")
    assert (asset.name, asset.meta.licence, asset.meta.edited_layers) == ("happy", "MIT", (0, 2, 7))
    assert asset.meta.kind == "vector"
    assert asset.meta.site == "resid_post"
    assert torch.equal(asset.tensors["vectors"], torch.arange(5.0) + torch.tensor([[0.0], [2], [7]]))
    assert asset.meta.provenance == {"format": "gguf", "model_hint": "mistral", "layer_count": 3}


def test_easysteer(tmp_path: Path) -> None:
    asset = from_gguf(foreign(tmp_path, ROWS, easysteer=True), name="happy", model=MODEL)
    assert asset.meta.provenance["method"] == "diffmean"
    assert asset.meta.provenance["normalize"] == 1.0
    assert asset.meta.provenance["token_pos"] == "-1"
    assert asset.meta.provenance["explained_variance.0"] == "nan"


def test_export_is_what_llama_cpp_and_repeng_read(tmp_path: Path) -> None:
    asset = make()
    (tmp_path / "out.gguf").write_bytes(to_gguf(asset, model_hint="llama", for_llama_cpp=True))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2", "direction.7"]
    for tensor, row in zip(reader.tensors, asset.tensors["vectors"], strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, row.numpy())


@settings(max_examples=25, deadline=None)
@given(layers=st.sets(st.integers(0, 7), min_size=1), scale=st.floats(allow_nan=False, allow_infinity=False))
def test_our_export_comes_back_as_the_same_version(layers: set[int], scale: float) -> None:
    asset = make(layers=tuple(sorted(layers)), recommended={"scale": scale}, description="ä", tokens={"last": 1})
    for model in (None, MODEL, MODEL.model_copy(update={"fingerprint": "f"})):
        back = from_gguf(to_gguf(asset), model=model)
        assert back.ref == asset.ref
        assert back.meta == asset.meta
    assert from_gguf(to_gguf(asset), name="other").name == "other"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    asset = make(dtype)
    assert torch.equal(from_gguf(to_gguf(asset)).tensors["vectors"], asset.tensors["vectors"].float())


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ({}, UploadMalformed),
        ({"direction.1": np.zeros(5, np.float32), "other": np.zeros(5, np.float32)}, UploadMalformed),
        ({"direction.01": np.zeros(5, np.float32)}, UploadMalformed),
        ({"direction.-1": np.zeros(5, np.float32)}, UploadMalformed),
        ({"direction.1": np.zeros(5, np.float32), "direction.2": np.zeros(4, np.float32)}, UploadMalformed),
        ({"direction.1": np.zeros(5, np.float16)}, UploadMalformed),
        ({"direction.1": np.zeros((5, 5), np.float32)}, UploadMalformed),
        ({"direction.8": np.zeros(5, np.float32)}, LayerOutOfRange),
        ({"direction.1": np.zeros(6, np.float32)}, WidthMismatch),
        ({"direction.1": np.full(5, np.nan, np.float32)}, NonFinite),
    ],
)
def test_bad_tensors(tmp_path: Path, rows: dict[str, np.ndarray], error: type[SteeringError]) -> None:
    with pytest.raises(error):
        from_gguf(foreign(tmp_path, rows), name="x", model=MODEL)


def test_what_a_file_does_not_state_must_be_given(tmp_path: Path) -> None:
    data = foreign(tmp_path, ROWS)
    with pytest.raises(InvalidRequest) as raised:
        from_gguf(data, name="x")
    assert raised.value.param == "model"
    with pytest.raises(InvalidRequest) as raised:
        from_gguf(data, model=MODEL)
    assert raised.value.param == "name"
    with pytest.raises(UploadMalformed):
        from_gguf(foreign(tmp_path, ROWS, arch="llama"), name="x", model=MODEL)


def test_our_export_for_another_model_is_refused() -> None:
    with pytest.raises(ModelMismatch):
        from_gguf(to_gguf(make()), model=MODEL.model_copy(update={"id": "huge"}))


def test_what_the_format_cannot_hold_is_refused() -> None:
    model = MODEL.model_dump()
    calm = Asset(parse_metadata({"name": "x", "kind": "profile", "model": model, "steering": {}}))
    with pytest.raises(AssetKindMismatch):
        to_gguf(calm)
    with pytest.raises(SiteUnsupported):
        to_gguf(make(site="resid_pre"))
    subspace = {"name": "x", "kind": "vector", "model": model, "layers": [1]}
    with pytest.raises(InvalidRequest, match="subspaces"):
        to_gguf(Asset(parse_metadata(subspace), {"vectors": torch.ones(1, 2, 5)}))
    to_gguf(make(layers=(0, 1)))
    with pytest.raises(InvalidRequest, match="layer 0"):
        to_gguf(make(layers=(0, 1)), for_llama_cpp=True)


WHOLE = to_gguf(make())


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=80) | st.binary(max_size=80).map(lambda b: b"GGUF" + struct.pack("<I", 3) + b))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(UploadMalformed):
        from_gguf(data, name="x", model=MODEL)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(WHOLE) - 64))
def test_truncated_files_are_refused_in_words(length: int) -> None:
    with pytest.raises(UploadMalformed):
        from_gguf(WHOLE[:length], name="x", model=MODEL)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(WHOLE) - 1), bits=st.integers(1, 255))
def test_a_changed_byte_is_read_or_refused_in_words(at: int, bits: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= bits
    with contextlib.suppress(InvalidRequest):
        from_gguf(bytes(data), model=MODEL)


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 0, 2**60),
        struct.pack("<QQ", 2**60, 0),
        struct.pack("<QQ", 0, 1) + field(b"a", 9, struct.pack("<IQ", 0, 2**60)),
        struct.pack("<QQ", 0, 1) + field(b"a", 9, struct.pack("<IQ", 9, 1) * 1000),
        struct.pack("<QQ", 0, 1) + field(b"a", 8, struct.pack("<Q", 2**63)),
    ],
    ids=["fields", "tensors", "array", "nested", "string"],
)
def test_counts_that_lie_cost_nothing(body: bytes) -> None:
    start = time.monotonic()
    with pytest.raises(UploadMalformed):
        from_gguf(b"GGUF" + struct.pack("<I", 3) + body, name="x", model=MODEL)
    assert time.monotonic() - start < 5


def test_tensors_at_one_place_are_not_copied_out_many_times() -> None:
    """Each lies within the file, all together do not: a file of a few MiB would become terabytes."""
    layers, length = 8, 1 << 10
    head = b"GGUF" + struct.pack("<IQQ", 3, layers, 1)
    head += field(b"general.architecture", 8, struct.pack("<Q", 13) + b"controlvector")
    for layer in range(layers):
        name = b"direction.%d" % layer
        head += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, length, 0, 0)
    head += b"\0" * (-len(head) % 32)
    with pytest.raises(UploadMalformed, match="more than it holds"):
        from_gguf(head + bytes(4 * length), name="x", model=ModelRef(id="tiny", n_layers=8, d_model=length))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (lambda: from_gguf(WHOLE), lambda: to_gguf(make())):
        with pytest.raises(FormatUnavailable, match="pip install gguf"):
            call()
