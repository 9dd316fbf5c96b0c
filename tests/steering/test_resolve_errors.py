from typing import Any

import pytest
import torch

from steersman.steering.directions import Library
from steersman.steering.errors import (
    AssetKindMismatch,
    GateOrder,
    InlineMalformed,
    InvalidRequest,
    LayerMissing,
    LayerOutOfRange,
    ModelMismatch,
    NonFinite,
    SiteUnsupported,
    SteeringError,
    UnknownAsset,
    WidthMismatch,
)
from steersman.steering.plan import Place
from steersman.steering.resolve import Resolver
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.store import Store
from tests.steering.library import D_FF, D_HEAD, HEADS, LAYERS, MODEL, D, inline, noise
from tests.steering.stock import foreign, solve, stock


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stock(
        tmp_path_factory.mktemp("store"),
        foreign("other-model", id="org/other"),
        foreign("other-weights", fingerprint="abc"),
        foreign("other-depth", n_layers=9),
    )


@pytest.fixture(scope="module")
def resolver(store: Store) -> Resolver:
    return Resolver(Library(store, MODEL))


def error_of(resolver: Resolver, **fields: Any) -> tuple[type[SteeringError], str | None]:
    """The error of these fields in the second intervention, its path from there on."""
    with pytest.raises(SteeringError) as raised:
        solve(resolver, {"op": "add", "vector": "v"}, fields)
    assert raised.value.param is not None
    assert raised.value.param.startswith("steering.interventions[1].")
    return type(raised.value), raised.value.param.removeprefix("steering.interventions[1].")


def bad_inline(**changes: Any) -> dict[str, Any]:
    good = inline(noise(1, D), [1])["inline"]
    return {"inline": {k: v for k, v in {**good, **changes}.items() if v is not None}}


PARALLEL = inline(-3 * noise(2, D), [1, 3])
NAN = torch.tensor([[float("nan")] * D])
ADD, ABLATE = {"op": "add", "vector": "v"}, {"op": "ablate", "vector": "v"}
CASES: list[tuple[dict[str, Any], type[SteeringError], str]] = [
    # assets
    ({"op": "add", "vector": "gone"}, UnknownAsset, "vector"),
    ({"op": "add", "vector": "../v"}, UnknownAsset, "vector"),
    ({"op": "add", "vector": "v@ffffffffffff"}, UnknownAsset, "vector"),
    ({"op": "add", "vector": "cluster"}, AssetKindMismatch, "vector"),
    ({"op": "add", "vector": "other-model"}, ModelMismatch, "vector"),
    ({"op": "add", "vector": "other-depth"}, ModelMismatch, "vector"),
    ({"op": "rotate", "vector": "v", "toward": "gone", "degrees": 1}, UnknownAsset, "toward"),
    ({"op": "neurons", "neurons": "v", "value": 1}, AssetKindMismatch, "neurons"),
    ({"op": "affine", "affine": "v"}, AssetKindMismatch, "affine"),
    ({**ADD, "when": {"vector": "gone", "layer": 0, "above": 1}}, UnknownAsset, "when.vector"),
    ({"op": "heads", "heads": [[0, 0]], "vector": "gone"}, UnknownAsset, "vector"),
    ({"op": "add", "vector": "odd-tokens"}, InvalidRequest, "tokens"),
    # widths
    ({"op": "add", "vector": "wide", "site": "resid_post"}, WidthMismatch, "vector"),
    ({**ADD, "site": "mlp_post"}, WidthMismatch, "vector"),
    ({"op": "add", "vector": inline(noise(D + 1)), "layers": 1}, WidthMismatch, "vector"),
    ({"op": "rotate", "vector": "v", "toward": inline(noise(3)), "degrees": 1}, WidthMismatch, "toward"),
    ({"op": "heads", "heads": [[1, 0]], "vector": "v"}, WidthMismatch, "vector"),
    ({"op": "affine", "affine": "wide-map"}, WidthMismatch, "affine"),
    ({**ADD, "when": {"vector": "wide", "layer": 0, "site": "resid_pre", "above": 1}}, LayerMissing, "when.vector"),
    ({**ADD, "layers": 3, "when": {"vector": inline(noise(3)), "layer": 0, "above": 1}}, WidthMismatch, "when.vector"),
    # layers
    ({**ADD, "layers": 4}, LayerOutOfRange, "layers"),
    ({**ADD, "layers": [1, 99]}, LayerOutOfRange, "layers"),
    ({**ADD, "layers": "1-4"}, LayerOutOfRange, "layers"),
    ({**ADD, "layers": "500-600"}, LayerOutOfRange, "layers"),
    ({**ADD, "layers": "3-1"}, InvalidRequest, "layers"),
    ({**ADD, "layers": [1, 1]}, InvalidRequest, "layers"),
    ({**ADD, "layers": 2}, LayerMissing, "layers"),
    ({**ADD, "layers": "1-3"}, LayerMissing, "layers"),
    ({"op": "add", "vector": inline(noise(D))}, InvalidRequest, "layers"),
    ({"op": "add", "vector": inline(noise(D)), "layers": "0-999999"}, LayerOutOfRange, "layers"),
    ({"op": "add", "vector": inline(noise(1, D), [9])}, LayerOutOfRange, "vector"),
    ({"op": "neurons", "neurons": {"inline": [[9, 0]]}, "value": 1}, LayerOutOfRange, "neurons"),
    ({"op": "neurons", "neurons": "cluster", "value": 1, "layers": 0}, LayerMissing, "layers"),
    ({"op": "heads", "heads": [[9, 0]], "factor": 1}, LayerOutOfRange, "heads"),
    ({"op": "heads", "heads": [[0, 0]], "factor": 1, "layers": [1]}, LayerMissing, "layers"),
    ({"op": "affine", "affine": "map", "layers": 1}, LayerMissing, "layers"),
    ({**ADD, "from_layer": 1}, InvalidRequest, "layers"),
    ({**ADD, "from_layer": 2, "layers": 0}, LayerMissing, "from_layer"),
    ({"op": "rotate", "vector": "mid", "toward": "v", "degrees": 1, "layers": 2}, LayerMissing, "toward"),
    ({**ADD, "when": {"vector": "mid", "layer": 9, "above": 1}}, LayerOutOfRange, "when.layer"),
    # inline data
    ({"op": "add", "vector": inline(NAN, [1])}, NonFinite, "vector.inline.data"),
    ({"op": "add", "vector": inline(NAN.nan_to_num(float("inf")) / 0, [1])}, NonFinite, "vector.inline.data"),
    ({"op": "add", "vector": inline(torch.full((1, D), 1e30), [1])}, NonFinite, "vector.inline.data"),
    ({"op": "add", "vector": bad_inline(data="not base64!")}, InlineMalformed, "vector.inline.data"),
    ({"op": "add", "vector": bad_inline(data="é" * 4)}, InlineMalformed, "vector.inline.data"),
    ({"op": "add", "vector": bad_inline(data="AAAA")}, InlineMalformed, "vector.inline.data"),
    ({"op": "add", "vector": bad_inline(dtype="float16")}, InlineMalformed, "vector.inline.data"),
    ({"op": "add", "vector": bad_inline(shape=[1, 0])}, InlineMalformed, "vector.inline.shape"),
    ({"op": "add", "vector": bad_inline(shape=[2**31 - 1] * 3)}, InlineMalformed, "vector.inline.shape"),
    ({"op": "add", "vector": bad_inline(shape=[2**16, 2**16, 2**31 - 1])}, InlineMalformed, "vector.inline.shape"),
    ({"op": "add", "vector": bad_inline(layers=[1, 2])}, InlineMalformed, "vector.inline.layers"),
    ({"op": "add", "vector": bad_inline(layers=None)}, InlineMalformed, "vector.inline.layers"),
    ({"op": "add", "vector": inline(noise(2, D), [1, 1])}, InlineMalformed, "vector.inline.layers"),
    ({"op": "add", "vector": inline(noise(D), [1])}, InlineMalformed, "vector.inline.layers"),
    ({"op": "add", "vector": "huge", "scale": 100}, NonFinite, "vector"),
    # directions
    ({"op": "ablate", "vector": "zero"}, InvalidRequest, "vector"),
    ({"op": "add", "vector": "zero", "relative": "norm"}, InvalidRequest, "vector"),
    ({"op": "clamp", "vector": "zero", "value": 1}, InvalidRequest, "vector"),
    ({"op": "multiply", "vector": "zero", "factor": 1}, InvalidRequest, "vector"),
    ({"op": "rotate", "vector": "v", "toward": "zero", "degrees": 1}, InvalidRequest, "toward"),
    ({"op": "rotate", "vector": "zero", "toward": "v", "degrees": 1}, InvalidRequest, "toward"),
    ({"op": "rotate", "vector": "v", "toward": "v", "degrees": 1}, InvalidRequest, "toward"),
    ({"op": "rotate", "vector": "v", "toward": PARALLEL, "degrees": 1}, InvalidRequest, "toward"),
    ({"op": "add", "vector": "plane"}, InvalidRequest, "vector"),
    ({"op": "clamp", "vector": "plane", "value": 1}, InvalidRequest, "vector"),
    ({"op": "multiply", "vector": "plane", "factor": 1}, InvalidRequest, "vector"),
    ({"op": "rotate", "vector": "plane", "toward": "v", "degrees": 1}, InvalidRequest, "vector"),
    ({"op": "rotate", "vector": "v", "toward": "plane", "degrees": 1}, InvalidRequest, "toward"),
    ({**ADD, "layers": 3, "when": {"vector": "plane", "layer": 1, "above": 1}}, InvalidRequest, "when.vector"),
    ({**ADD, "layers": 3, "when": {"vector": "zero", "layer": 1, "above": 1}}, InvalidRequest, "when.vector"),
    # units
    ({"op": "neurons", "neurons": "far", "value": 1}, InvalidRequest, "neurons"),
    ({"op": "neurons", "neurons": {"inline": [[0, D_FF]]}, "value": 1}, InvalidRequest, "neurons"),
    ({"op": "heads", "heads": [[0, HEADS]], "factor": 1}, InvalidRequest, "heads"),
    ({"op": "heads", "heads": [[0, 0]], "factor": 1, "site": "resid_post"}, InvalidRequest, "site"),
    # gates
    ({**ADD, "when": {"vector": "v", "layer": 1, "above": 1}}, GateOrder, "when.layer"),
    ({**ADD, "when": {"vector": "v", "layer": 3, "above": 1}}, GateOrder, "when.layer"),
    ({**ADD, "when": {"vector": "v", "layer": 1, "site": "resid_post", "above": 1}}, GateOrder, "when.layer"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "kind", "param"), CASES)
def test_bad_input_is_refused_by_name(
    resolver: Resolver, fields: dict[str, Any], kind: type[SteeringError], param: str
) -> None:
    assert error_of(resolver, **fields) == (kind, param)


@pytest.mark.parametrize("over", ["prompt_mean", "last_prompt"])
def test_gates_that_decide_once_may_be_read_anywhere(resolver: Resolver, over: str) -> None:
    plan = solve(resolver, {**ADD, "when": {"vector": "v", "layer": 3, "above": 1, "over": over}})
    assert plan.gates[0].place == Place(3, Site.RESID_POST)


def test_a_token_gate_may_be_read_earlier_in_the_same_layer(resolver: Resolver) -> None:
    gate = {"vector": "v", "layer": 1, "site": "resid_mid", "above": 1}
    assert solve(resolver, {**ADD, "when": gate}).gates[0].place == Place(1, Site.RESID_MID)


def test_errors_of_probes_have_their_path(resolver: Resolver) -> None:
    for probe, param in (
        ({"vector": "gone"}, "vector"),
        ({"vector": "v", "layers": 2}, "layers"),
        ({"vector": "plane"}, "vector"),
        ({"vector": "zero"}, "vector"),
        ({"vector": "v", "site": "attn_z"}, "vector"),
    ):
        with pytest.raises(SteeringError) as raised:
            solve(resolver, probes=[{"vector": "v"}, probe])
        assert raised.value.param == f"steering.probes[1].{param}"


def test_sites_that_the_engine_does_not_have(store: Store) -> None:
    some = ModelInfo("tiny", "Some", LAYERS, D, HEADS, D_HEAD, {Site.RESID_POST: {1: D}})
    resolver = Resolver(Library(store, some))
    with pytest.raises(SiteUnsupported) as raised:
        solve(resolver, {"op": "add", "vector": "v"})
    assert raised.value.param == "steering.interventions[0].layers"
    with pytest.raises(SiteUnsupported) as raised:
        solve(resolver, {"op": "add", "vector": "v", "site": "mlp_out"})
    assert raised.value.param == "steering.interventions[0].site"
    with pytest.raises(SiteUnsupported) as raised:
        solve(resolver, {"op": "add", "vector": "v", "layers": 1, "when": {"vector": "mid", "layer": 1, "above": 0}})
    assert raised.value.param == "steering.interventions[0].when.site"


def test_fingerprints_and_names_of_models(store: Store) -> None:
    known = ModelInfo(**{**vars(MODEL), "fingerprint": "xyz"})
    with pytest.raises(ModelMismatch, match="other weights"):
        solve(Resolver(Library(store, known)), {"op": "add", "vector": "other-weights"})
    solve(Resolver(Library(store, MODEL)), {"op": "add", "vector": "other-weights"})
    solve(Resolver(Library(store, MODEL, aliases=("/models/Other/",))), {"op": "add", "vector": "other-model"})
    any_model = Resolver(Library(store, known, any_model=True))
    solve(any_model, {"op": "add", "vector": "other-model"})
    with pytest.raises(ModelMismatch):
        solve(any_model, {"op": "add", "vector": "other-depth"})
