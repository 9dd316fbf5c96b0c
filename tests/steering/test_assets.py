import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.steering.assets import (
    KINDS,
    Asset,
    content_sha256,
    dump_metadata,
    is_name,
    parse_metadata,
)
from steersman.steering.errors import (
    InvalidRequest,
    LayerOutOfRange,
    NonFinite,
    SteeringError,
    UnknownField,
    WidthMismatch,
)

MODEL = {"id": "tiny", "n_layers": 4, "d_model": 6}
L, D, M, R = 2, 6, 9, 3
DICTIONARY = {"encoder": (M, D), "decoder": (M, D), "b_dec": (D,)}


def metadata(kind: str, **fields: Any) -> dict[str, Any]:
    by_kind: dict[str, dict[str, Any]] = {
        "vector": {"layers": [1, 3]},
        "dictionary": {"layer": 2, "architecture": "jumprelu"},
        "neurons": {"neurons": [[3, 100], [0, 7]]},
        "recipe": {
            "rr_attn": [0, 0.5, 0.25, 0],
            "rr_mlp": [0.0] * 4,
            "sources": {"attn": [1]},
            "targets": {"attn": [1, 2]},
            "lambda_a": 0.26,
            "lambda_m": 0.16,
        },
        "affine": {"layers": [1, 3]},
        "profile": {"steering": {"interventions": [{"op": "add", "vector": "french", "scale": None}]}},
        "baseline": {"counts": [1000, 2000, 3000, 4000], "mean": [0.5, 1.0, 1.5, 2.0], "deviation": [0.1] * 4},
        "detector": {
            "features": ["answer_entropy.mean", "norm:3.max"],
            "threshold": 4.5,
            "center": [0.7, 12.0],
            "spread": [0.2, 3.0],
            "weights": [0.25, 0.75],
            "means": [[0.0, 0.1], [1.0, -1.0]],
            "covariance": "full",
            "covariances": [[[1.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 1.0]]],
        },
    }
    return {"name": "a-1.b_C", "kind": kind, "model": MODEL, **by_kind[kind], **fields}


def tensors(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "vector": {"vectors": (L, D)},
        "dictionary": {**DICTIONARY, "b_enc": (M,), "threshold": (M,)},
        "affine": {"R": (L, R, D), "A": (L, R, D), "b": (L, R)},
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.get(kind, {}).items()}


def asset(kind: str, **fields: Any) -> Asset:
    return Asset(parse_metadata(metadata(kind, **fields)), tensors(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_its_json(kind: str) -> None:
    made = asset(kind, recommended={"scale": 6, "how": "by eye"}, provenance={"n": 3, "x": None}, tokens={"last": 1})
    dumped = dump_metadata(made.meta)
    assert parse_metadata(dumped) == made.meta
    assert Asset(parse_metadata(dumped), made.tensors).sha256 == made.sha256 == content_sha256(dumped, made.tensors)
    assert made.ref == f"a-1.b_C@{made.version}"
    assert len(made.version) == 12
    assert dumped["provenance"] == {"n": 3, "x": None}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("vector", (1, 3)),
        ("dictionary", (2,)),
        ("neurons", (0, 3)),
        ("recipe", (1, 2)),
        ("affine", (1, 3)),
        ("profile", ()),
    ],
)
def test_edited_layers(kind: str, layers: tuple[int, ...]) -> None:
    assert asset(kind).meta.edited_layers == layers


@pytest.mark.parametrize(
    ("kind", "fields", "error", "param"),
    [
        ("vector", {"colour": 1}, UnknownField, "colour"),
        ("vector", {"model": {**MODEL, "size": 1}}, UnknownField, "model.size"),
        ("nonsense", {}, InvalidRequest, "kind"),
        ("vector", {"name": "../x"}, InvalidRequest, "name"),
        ("vector", {"model": {**MODEL, "n_layers": 0}}, InvalidRequest, "model.n_layers"),
        ("vector", {"layers": [0, 4]}, LayerOutOfRange, None),
        ("vector", {"layers": [2, 1]}, InvalidRequest, "layers"),
        ("vector", {"layers": [1, 1]}, InvalidRequest, "layers"),
        ("vector", {"layers": []}, InvalidRequest, "layers"),
        ("vector", {"layers": [1, True]}, InvalidRequest, "layers[1]"),
        ("vector", {"layers": [1, -1]}, InvalidRequest, "layers[1]"),
        ("vector", {"site": "resid"}, InvalidRequest, "site"),
        ("vector", {"recommended": {"scale": math.inf}}, NonFinite, "recommended.scale"),
        ("vector", {"recommended": {"scale": "6"}}, InvalidRequest, "recommended.scale"),
        ("vector", {"provenance": {"x": math.nan}}, InvalidRequest, "provenance"),
        ("vector", {"provenance": {"x": object()}}, InvalidRequest, "provenance"),
        ("vector", {"tokens": 3}, InvalidRequest, "tokens"),
        ("neurons", {"neurons": [[1, 2], [1, 2]]}, InvalidRequest, None),
        ("neurons", {"neurons": [[1, 2, 3]]}, InvalidRequest, "neurons[0]"),
        ("neurons", {"neurons": [[4, 0]]}, LayerOutOfRange, None),
        ("neurons", {"d_ff": 100}, InvalidRequest, None),
        ("dictionary", {"architecture": "topk"}, InvalidRequest, None),
        ("dictionary", {"k": 3}, InvalidRequest, None),
        ("dictionary", {"read_site": "mlp_in", "apply_b_dec_to_input": True}, InvalidRequest, None),
        ("dictionary", {"normalize": "layer_norm", "input_scale": 2.0}, InvalidRequest, None),
        ("dictionary", {"input_scale": 0.0}, InvalidRequest, "input_scale"),
        ("dictionary", {"read_site": "nowhere"}, InvalidRequest, "read_site"),
        ("recipe", {"rr_mlp": [0.0]}, InvalidRequest, "rr_mlp"),
        ("recipe", {"sources": {"attn": [4]}}, LayerOutOfRange, "sources"),
        ("recipe", {"lambda_a": math.nan}, NonFinite, "lambda_a"),
        ("profile", {"steering": []}, InvalidRequest, "steering"),
    ],
)
def test_bad_metadata_names_its_field(
    kind: str, fields: dict[str, Any], error: type[SteeringError], param: str | None
) -> None:
    value = {**metadata("vector" if kind == "nonsense" else kind), "kind": kind, **fields}
    with pytest.raises(SteeringError) as raised:
        parse_metadata(value)
    assert (type(raised.value), raised.value.param) == (error, param)


@pytest.mark.parametrize("value", [None, 3, [], "x", {}])
def test_what_is_no_metadata_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest):
        parse_metadata(value)


def with_tensor(kind: str, name: str, tensor: torch.Tensor | None, **fields: Any) -> Asset:
    changed = tensors(kind)
    if tensor is None:
        del changed[name]
    else:
        changed[name] = tensor
    return Asset(parse_metadata(metadata(kind, **fields)), changed)


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "error", "param"),
    [
        ("vector", "vectors", None, InvalidRequest, "tensors"),
        ("vector", "other", torch.zeros(1), InvalidRequest, "tensors"),
        ("profile", "other", torch.zeros(1), InvalidRequest, "tensors"),
        ("vector", "vectors", torch.zeros(D), InvalidRequest, "tensors.vectors"),
        ("vector", "vectors", torch.tensor(1.0), InvalidRequest, "tensors.vectors"),
        ("vector", "vectors", torch.zeros(L + 1, D), InvalidRequest, "tensors.vectors"),
        ("vector", "vectors", torch.zeros(L, 0, D), InvalidRequest, "tensors.vectors"),
        ("vector", "vectors", torch.zeros(L, D + 1, D), InvalidRequest, "tensors.vectors"),
        ("vector", "vectors", torch.zeros(L, D + 1), WidthMismatch, "tensors.vectors"),
        ("vector", "vectors", torch.zeros(L, D, dtype=torch.float64), InvalidRequest, "tensors.vectors"),
        ("vector", "vectors", torch.full((L, D), math.nan), NonFinite, "tensors.vectors"),
        ("vector", "vectors", torch.full((L, D), math.inf).bfloat16(), NonFinite, "tensors.vectors"),
        ("dictionary", "encoder", torch.zeros(M, D + 1), InvalidRequest, "tensors.encoder"),
        ("dictionary", "decoder", torch.zeros(M, D + 1), WidthMismatch, "tensors.decoder"),
        ("dictionary", "decoder", torch.zeros(M + 1, D), InvalidRequest, "tensors.encoder"),
        ("dictionary", "b_dec", torch.zeros(M), InvalidRequest, "tensors.b_dec"),
        ("dictionary", "label_ends", torch.zeros(M, dtype=torch.int64), InvalidRequest, "tensors"),
        ("dictionary", "labels", torch.zeros(3), InvalidRequest, "tensors.labels"),
        ("dictionary", "skip", torch.zeros(D, D), InvalidRequest, "tensors"),
        ("dictionary", "threshold", torch.zeros(1), InvalidRequest, "tensors.threshold"),
        ("dictionary", "threshold", None, InvalidRequest, "tensors"),
        ("affine", "A", torch.zeros(L, R + 1, D), InvalidRequest, "tensors.A"),
        ("affine", "b", torch.zeros(L, D), InvalidRequest, "tensors.b"),
        ("affine", "R", torch.zeros(L, D + 1, D), InvalidRequest, "tensors.R"),
    ],
)
def test_tensors_must_fit_the_metadata(
    kind: str, name: str, tensor: torch.Tensor | None, error: type[SteeringError], param: str
) -> None:
    with pytest.raises(SteeringError) as raised:
        with_tensor(kind, name, tensor)
    assert (type(raised.value), raised.value.param) == (error, param)


def test_subspaces_and_sites_of_another_width() -> None:
    assert with_tensor("vector", "vectors", torch.zeros(L, 2, D)).tensors["vectors"].shape == (L, 2, D)
    assert with_tensor("vector", "vectors", torch.zeros(L, 50), site="mlp_post").tensors["vectors"].shape == (L, 50)


def test_an_asset_owns_its_tensors() -> None:
    shared = torch.randn(2, L, R, D)
    made = Asset(parse_metadata(metadata("affine")), {"R": shared[0], "A": shared[0], "b": shared[1, ..., 0]})
    before = made.tensors["R"].clone()
    shared.zero_()
    assert torch.equal(made.tensors["R"], before)
    assert content_sha256(dump_metadata(made.meta), made.tensors) == made.sha256


def test_the_hash_sees_names_dtypes_shapes_bytes_and_metadata() -> None:
    zeros = torch.zeros(2, 6)
    contents = [
        ({"a": 1}, {"x": zeros}),
        ({"a": 2}, {"x": zeros}),
        ({"a": 1}, {"y": zeros}),
        ({"a": 1}, {"x": zeros.reshape(3, 4)}),
        ({"a": 1}, {"x": -zeros}),
        ({"a": 1}, {"x": torch.zeros(2, 12, dtype=torch.float16)}),
        ({"a": 1}, {"x": torch.zeros(2, 12, dtype=torch.bfloat16)}),
        ({"a": 1}, {"x": zeros[:1], "y": zeros[1:]}),
        ({"a": 1}, {}),
    ]
    assert len({content_sha256(*content) for content in contents}) == len(contents)
    one, two = {"x": zeros, "y": zeros + 1}, {"y": zeros + 1, "x": zeros}
    assert content_sha256({"a": 1, "b": 2}, one) == content_sha256({"b": 2, "a": 1}, two)


@given(st.text(max_size=12) | st.from_regex(r"[A-Za-z0-9._/\\-]{1,12}", fullmatch=True))
def test_names_stay_inside_a_folder(name: str) -> None:
    if is_name(name):
        assert name
        assert name[0].isalnum()
        assert name.isascii()
        assert not set(name) & set("/\\@\0\n ")
        assert ".." not in name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a..b", ".a", "-a", "a\n", "a" * 129, "ä", "a@b", "a\0"])
def test_bad_names(name: str) -> None:
    assert not is_name(name)


@pytest.mark.parametrize("name", ["a", "0", "French.v2", "a" * 128, "gemma-scope-12"])
def test_good_names(name: str) -> None:
    assert is_name(name)
