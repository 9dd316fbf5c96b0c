"""Features in requests: edits, gates and probes on dictionaries, and what is refused with the field that is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from steersman.kernels.program import NEVER
from steersman.steering import dictionaries
from steersman.steering.assets import Asset
from steersman.steering.errors import (
    AssetKindMismatch,
    FeatureUnreadable,
    GateOrder,
    InvalidRequest,
    LayerMissing,
    NonFinite,
    OutOfRange,
    SteeringError,
    UnknownAsset,
    UnknownField,
    WidthMismatch,
)
from steersman.steering.plan import Activation, Place, Plan
from steersman.steering.sites import Site
from tests.steering.library import D_FF, D, asset, noise, resolve, vector

M = 7
POST = Site.RESID_POST
CHECK = {"layer": 2, "architecture": "jumprelu", "apply_b_dec_to_input": True}


def sae(name: str = "sae", width: int = D, **fields: Any) -> Asset:
    about = {**CHECK, **fields}
    tensors = {"decoder": noise(M, width, seed=1), "b_dec": noise(width, seed=2)}
    if about["architecture"] in ("standard", "jumprelu", "topk"):
        tensors |= {"encoder": noise(M, width, seed=3), "b_enc": noise(M, seed=4)}
    if about["architecture"] == "jumprelu":
        tensors["threshold"] = noise(M, seed=5).abs()
    return asset(name, "dictionary", tensors, **about)


SAE = sae()
TOPK = sae("topk", architecture="topk", k=2)
SNMF = sae("snmf", D_FF, architecture="basis", site="mlp_post", apply_b_dec_to_input=False)
CODER = sae("coder", architecture="standard", site="mlp_out", read_site="mlp_in", apply_b_dec_to_input=False)
NORMED = sae("normed", normalize="constant_norm_rescale")
LAYERED = sae("layered", normalize="layer_norm")
FLAT = vector("flat", noise(1, D), [1])
EVERYTHING = (SAE, TOPK, SNMF, CODER, NORMED, LAYERED, FLAT)
FEATURE = {"op": "feature", "dictionary": "sae", "index": 4, "value": 3.0}


def solve(*interventions: dict[str, Any], **fields: Any) -> Plan:
    return resolve({"interventions": list(interventions), **fields}, *EVERYTHING)


def test_it_is_one_row_with_the_dictionarys_own_threshold() -> None:
    plan = solve(FEATURE)
    [(place, [block])] = plan.blocks.items()
    assert place == Place(2, POST)
    assert block.read is not None
    encoder, b_dec = (SAE.tensors[name] for name in ("encoder", "b_dec"))
    torch.testing.assert_close(block.read.to_dense(), encoder[4:5])
    torch.testing.assert_close(block.write.to_dense(), SAE.tensors["decoder"][4:5])
    torch.testing.assert_close(block.bias[0], SAE.tensors["b_enc"][4] - encoder[4] @ b_dec)
    assert float(block.threshold) == float(SAE.tensors["threshold"][4])
    assert plan.steps[0].assets == (SAE.ref,)


def test_a_list_is_one_block_and_interventions_are_one_each() -> None:
    together = solve({**FEATURE, "index": [4, 1, 6], "value": [1.0, 2.0, 3.0]})
    [block] = together.blocks[Place(2, POST)]
    assert block.count == 3
    assert block.offset.tolist() == [1.0, 2.0, 3.0]
    apart = solve(FEATURE, {**FEATURE, "index": 1})
    assert [b.intervention for b in apart.blocks[Place(2, POST)]] == [0, 1]


@pytest.mark.parametrize("name", ["sae", "topk", "snmf", "coder"])
def test_adding_is_a_constant_for_every_encoder(name: str) -> None:
    plan = solve({**FEATURE, "dictionary": name, "mode": "add"})
    [[block]] = plan.blocks.values()
    found = {a.name: a for a in EVERYTHING}[name]
    assert block.is_constant
    torch.testing.assert_close(block.constant, 3.0 * found.tensors["decoder"][4])


def test_a_rescaled_dictionary_adds_in_units_of_the_norm() -> None:
    [[block]] = solve({**FEATURE, "dictionary": "normed", "mode": "add"}).blocks.values()
    assert block.relative
    torch.testing.assert_close(block.write.to_dense(), NORMED.tensors["decoder"][4:5] / D**0.5)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_a_transcoder_normalises_what_it_reads_and_not_what_it_writes(normalize: str) -> None:
    about = {"architecture": "standard", "site": "mlp_out", "read_site": "mlp_in", "apply_b_dec_to_input": False}
    coder = sae("coder", normalize=normalize, **about)
    feature = {**FEATURE, "dictionary": "coder", "mode": "add"}
    [[block]] = resolve({"interventions": [feature]}, coder).blocks.values()
    assert block.is_constant
    torch.testing.assert_close(block.constant, 3.0 * coder.tensors["decoder"][4])
    acts, x = noise(5, M, seed=8), noise(5, D, seed=9)
    torch.testing.assert_close(
        dictionaries.decode(coder, acts, x), acts @ coder.tensors["decoder"] + coder.tensors["b_dec"]
    )


@pytest.mark.parametrize(
    "change", [{"r_mag": 100.0}, {"r_mag": 800.0}, {"b_gate": 3e38, "r_mag": 5.0}, {"input_scale": 1e300}]
)
def test_an_encoder_beyond_float32_is_refused(change: dict[str, float]) -> None:
    """An infinite row would turn the whole stream into NaN."""
    numbers = {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0} | {k: v for k, v in change.items() if k != "input_scale"}
    tensors = {n: torch.full((M,), -v if n == "b_gate" else v) for n, v in numbers.items()}
    tensors |= {"decoder": noise(M, D), "b_dec": torch.zeros(D), "encoder": noise(M, D)}
    fields = {"input_scale": change["input_scale"]} if "input_scale" in change else {}
    gated = asset("gated", "dictionary", tensors, layer=2, architecture="gated", **fields)
    with pytest.raises(NonFinite):
        resolve({"probes": [{"dictionary": "gated", "index": 0}]}, gated)
    with pytest.raises(NonFinite):
        resolve({"interventions": [{**FEATURE, "dictionary": "gated"}]}, gated)


def test_the_dictionarys_place_and_tokens_are_the_default() -> None:
    [place] = solve({**FEATURE, "dictionary": "snmf", "mode": "add"}).blocks
    assert place == Place(2, Site.MLP_POST)
    named = resolve({"interventions": [FEATURE]}, sae(tokens="generated"))
    assert named.steps[0].tokens == "generated"


def test_probes_and_gates_read_activations() -> None:
    when = {"dictionary": "sae", "index": 2, "above": 0.5}
    late = {"op": "add", "vector": "flat", "from_layer": 1, "layers": 3, "when": when}
    plan = solve(late, probes=[{"dictionary": "sae", "index": 2}, {"vector": "flat"}])
    [gate], [probe, other] = plan.gates, plan.probes
    encoder, threshold = SAE.tensors["encoder"][2], float(SAE.tensors["threshold"][2])
    bias = float(SAE.tensors["b_enc"][2] - encoder @ SAE.tensors["b_dec"])
    for read in (gate, probe):
        assert read.place == Place(2, POST)
        torch.testing.assert_close(read.direction, encoder)
        assert read.activation is not None
        assert read.activation.bias == pytest.approx(bias, abs=1e-6)
        assert read.activation.threshold == threshold
    assert gate.measure == "feature"
    assert other.activation is None
    assert plan.probe_names == (f"{SAE.ref}#2", FLAT.ref)
    again = Plan.from_bytes(plan.to_bytes())
    assert [r.activation for r in (*again.gates, *again.probes)] == [r.activation for r in (*plan.gates, *plan.probes)]
    assert again.id == plan.id
    dots = torch.tensor([[threshold - bias - 0.01, 5.0], [threshold - bias + 0.01, 5.0]])
    assert plan.activated([0, 1], dots)[:, 0].tolist() == pytest.approx([0, threshold + 0.01], abs=1e-5)


@pytest.mark.parametrize("name", ["topk", "normed", "layered"])
def test_probes_and_gates_may_encode(name: str) -> None:
    """A plan tells the encodes of its gates and probes; probes of one dictionary share one."""
    when = {"dictionary": name, "index": 2, "above": 0.5}
    late = {"op": "add", "vector": "flat", "from_layer": 1, "layers": 3, "when": when}
    plan = solve(late, probes=[{"dictionary": name, "index": i} for i in (5, 1)] + [{"vector": "flat"}])
    [gate], [*probes, other] = plan.gates, plan.probes
    assert (gate.measure, gate.place, gate.direction) == ("feature", Place(2, POST), None)
    assert gate.encode is not None
    assert gate.encode.indices == (2,)
    assert [p.encode and p.encode.indices for p in probes] == [(5,), (1,)]
    assert (other.encode, other.direction is None) == (None, False)
    [by_gate, by_probes] = plan.encodes
    assert (by_gate.use, by_probes.use, by_probes.encode.indices) == ("gate", "probe", (5, 1))
    assert by_probes.encode.cost()["features"] == (M if name == "topk" else 2)
    assert plan.probe_encodes == {Place(2, POST): [([0, 1], by_probes.encode)]}
    again = Plan.from_bytes(plan.to_bytes())
    assert (again.gates, again.encodes, again.id) == (plan.gates, plan.encodes, plan.id)
    assert plan.edits_id != solve({**late, "when": {**when, "index": 3}}).edits_id


def test_coordinates_have_no_threshold() -> None:
    linear = asset("axes", "dictionary", {n: noise(M, D, seed=6) for n in ("encoder", "decoder")}
                   | {"b_dec": torch.zeros(D), "b_enc": torch.zeros(M)}, layer=1, architecture="linear")  # fmt: skip
    plan = resolve({"interventions": [{**FEATURE, "dictionary": "axes"}],
                    "probes": [{"dictionary": "axes", "index": 0}]}, linear)  # fmt: skip
    assert float(plan.blocks[Place(1, POST)][0].threshold) == NEVER
    assert plan.probes[0].activation == Activation(0.0, None)
    assert plan.probes[0].activation(torch.tensor([-2.0])).item() == -2.0


GATE = {"dictionary": "sae", "index": 2, "above": 0.5}
BAD: list[tuple[dict[str, Any], type[SteeringError], str]] = [
    ({"dictionary": "nope"}, UnknownAsset, "dictionary"),
    ({"dictionary": "flat"}, AssetKindMismatch, "dictionary"),
    ({"index": M}, OutOfRange, "index"),
    ({"index": -1}, SteeringError, "index"),
    ({"index": [1, 1]}, InvalidRequest, ""),
    ({"index": []}, InvalidRequest, "index"),
    ({"index": [1, 2], "value": [1.0]}, InvalidRequest, ""),
    ({"value": None}, InvalidRequest, ""),
    ({"mode": "ablate"}, InvalidRequest, ""),
    ({"mode": "double"}, InvalidRequest, "mode"),
    ({"scale": 1.0}, UnknownField, "scale"),
    ({"layers": 1}, LayerMissing, "layers"),
    ({"site": "resid_pre"}, InvalidRequest, "site"),
    ({"dictionary": "snmf"}, FeatureUnreadable, "mode"),
    ({"dictionary": "coder"}, FeatureUnreadable, "mode"),
    ({"dictionary": "coder", "mode": "add", "only_if_active": True}, FeatureUnreadable, "only_if_active"),
    ({"dictionary": "layered"}, FeatureUnreadable, "dictionary"),
    ({"dictionary": "layered", "mode": "add"}, FeatureUnreadable, "dictionary"),
    ({"when": {**GATE, "index": M}}, OutOfRange, "when.index"),
    ({"when": {**GATE, "dictionary": "coder"}}, FeatureUnreadable, "when.dictionary"),
    ({"when": {**GATE, "layer": 1}}, LayerMissing, "when.layer"),
    ({"when": {**GATE, "measure": "cosine"}}, InvalidRequest, "when"),
    ({"when": {"vector": "flat", "layer": 1, "above": 0, "measure": "feature"}}, InvalidRequest, "when"),
    ({"when": {"vector": "flat", "above": 0}}, InvalidRequest, "when"),
    ({"when": {"dictionary": "sae", "above": 0}}, InvalidRequest, "when"),
    ({"when": GATE}, GateOrder, "when"),
]


@pytest.mark.parametrize(("change", "error", "field"), BAD)
def test_what_is_wrong_is_named(change: dict[str, Any], error: type[SteeringError], field: str) -> None:
    asked = {name: value for name, value in {**FEATURE, **change}.items() if value is not None}
    with pytest.raises(error) as raised:
        solve(asked)
    start = "steering.interventions[0]"
    wanted = re.escape(f"{start}.{field}" if field else start)
    assert re.match(rf"{wanted}(\W|$)", raised.value.param or ""), raised.value.param
    assert 400 <= raised.value.status < 500


@pytest.mark.parametrize(
    ("probe", "field"),
    [
        ({"dictionary": "coder", "index": 0}, ".dictionary"),
        ({"dictionary": "sae", "index": M}, ".index"),
        ({"dictionary": "sae"}, ""),
        ({"index": 1}, ""),
        ({"vector": "flat", "dictionary": "sae", "index": 1}, ""),
        ({}, ""),
    ],
)
def test_bad_probes(probe: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        solve(probes=[probe])
    assert raised.value.param == f"steering.probes[0]{field}"


def test_a_dictionary_of_another_width_at_a_site() -> None:
    other = sae("narrow", D_FF - 1, site="mlp_post")
    encoded = sae("encoded", D_FF - 1, site="mlp_post", architecture="topk", k=2)
    for asked in (
        {"interventions": [{**FEATURE, "dictionary": "narrow"}]},
        {"probes": [{"dictionary": "narrow", "index": 0}]},
        {"probes": [{"dictionary": "encoded", "index": 0}]},
    ):
        with pytest.raises(WidthMismatch):
            resolve(asked, other, encoded)
