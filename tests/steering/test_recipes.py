"""Recipes: what may be said, what is chosen where nothing is, and the plan that an `inject` makes of one."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.steering import spec
from steersman.steering.assets import Asset, RecipeMeta, dump_metadata, parse_metadata
from steersman.steering.errors import (
    AssetKindMismatch,
    GateOrder,
    InvalidRequest,
    LayerMissing,
    LayerOutOfRange,
    NonFinite,
    OutOfRange,
    SiteUnsupported,
    SteeringError,
    UnknownField,
)
from steersman.steering.formats import native
from steersman.steering.plan import Injection, Place, Plan
from steersman.steering.recipes import best
from steersman.steering.sites import ModelInfo, Site
from tests.steering.library import LAYERS, MODEL, REF, D, asset, inline, noise, plan_of, resolve, vector

ATTN, MLP = Site.ATTN_OUT, Site.MLP_OUT
RATES = [0.1, 0.9, 0.5, 0.2]
BODY: dict[str, Any] = {
    "rr_attn": RATES, "rr_mlp": [0.25, 0.5, 0.125, 0.0], "lambda_a": 0.5, "lambda_m": 2.0,
    "sources": {"attn": [1, 2], "mlp": [0]}, "targets": {"attn": [1, 2, 3], "mlp": [1, 2]},
}  # fmt: skip
SHORT = {**BODY, "rr_attn": RATES[:3], "rr_mlp": RATES[:3], "targets": {"attn": [2], "mlp": [1]}}
DEEP = {"id": "org/deep", "n_layers": 24, "d_model": D}


def meta(model: dict[str, Any] = REF, **fields: Any) -> RecipeMeta:
    body = {k: v for k, v in {**BODY, **fields}.items() if v is not ...}
    found = parse_metadata({"name": "r", "kind": "recipe", "model": model, **body})
    assert isinstance(found, RecipeMeta)
    return found


def inject(**fields: Any) -> dict[str, Any]:
    return {"op": "inject", "recipe": {"inline": BODY}, **fields}


def stored(**fields: Any) -> Asset:
    return asset("r", "recipe", **{**BODY, **fields})


# -- the asset ------------------------------------------------------------------------------------------


def test_layers_are_chosen_when_the_recipe_is_made_and_are_stored() -> None:
    attn, mlp = [math.sin(3 * k) for k in range(24)], [math.cos(5 * k) for k in range(24)]
    made = meta(DEEP, rr_attn=attn, rr_mlp=mlp, sources=..., targets=...)
    for rates, name in ((attn, "attn"), (mlp, "mlp")):
        order = sorted(range(24), key=lambda k: -rates[k])
        assert getattr(made.sources, name) == tuple(sorted(order[:3]))
        assert getattr(made.targets, name) == tuple(sorted(order[:10]))
    kept = dump_metadata(made)
    assert kept["sources"]["attn"] == list(made.sources.attn)
    assert parse_metadata(json.loads(json.dumps(kept))) == made


def test_a_component_without_sources_gets_no_targets() -> None:
    made = meta(sources={"attn": [1]}, targets=...)
    assert (made.targets.attn, made.targets.mlp) == ((0, 1, 2, 3), ())


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.integers(0, 10))
def test_best(rates: list[int], count: int) -> None:
    chosen = best(rates, count)
    assert len(chosen) == min(count, len(rates))
    assert list(chosen) == sorted(chosen)
    for layer in set(range(len(rates))) - set(chosen):
        assert all((-rates[c], c) < (-rates[layer], layer) for c in chosen)


WRONG: list[tuple[dict[str, Any], type[SteeringError], str]] = [
    ({"rr_attn": RATES[:3]}, InvalidRequest, "rr_attn"),
    ({"rr_mlp": [*RATES, 0.0]}, InvalidRequest, "rr_mlp"),
    ({"rr_attn": [0.1, math.inf, 0.5, 0.2]}, NonFinite, "rr_attn[1]"),
    ({"rr_attn": [0.1, "0.9", 0.5, 0.2]}, InvalidRequest, "rr_attn[1]"),
    ({"lambda_m": math.nan}, NonFinite, "lambda_m"),
    ({"lambda_a": ...}, InvalidRequest, "lambda_a"),
    ({"sources": {"attn": [LAYERS]}}, LayerOutOfRange, "sources"),
    ({"targets": {"attn": [2], "mlp": [9]}}, LayerOutOfRange, "targets"),
    ({"sources": {"attn": [2, 1]}}, InvalidRequest, "sources.attn"),
    ({"sources": {"attention": [1]}}, UnknownField, "sources.attention"),
    ({"sources": {}}, InvalidRequest, "targets"),
    ({"sources": {"attn": [1]}}, InvalidRequest, "targets"),  # while the MLP has targets
    ({"sources": {"attn": [2, 3], "mlp": [0]}, "targets": {"attn": [0, 2], "mlp": [1]}}, InvalidRequest, "targets"),
    ({"steps": 3}, UnknownField, "steps"),
]


@pytest.mark.parametrize(("fields", "error", "param"), WRONG)
def test_what_is_wrong_is_named(fields: dict[str, Any], error: type[SteeringError], param: str) -> None:
    with pytest.raises(SteeringError) as raised:
        meta(**fields)
    found = raised.value
    assert (type(found), found.param and found.param.split("[")[0]) == (error, param.split("[")[0])


def test_what_would_inject_nothing_is_told_why() -> None:
    with pytest.raises(InvalidRequest, match=r"attn: no target comes after layer 3, the first source"):
        meta(sources={"attn": [3]}, targets={"attn": [0, 3]})


def test_it_survives_its_files() -> None:
    made = stored(provenance={"traced": 500}, recommended={"scale": 0.5}, tokens="generated")
    assert native.from_json(json.dumps(native.to_json(made)).encode()).sha256 == made.sha256
    assert native.from_safetensors(native.to_safetensors(made)).meta == made.meta


# -- the plan -------------------------------------------------------------------------------------------


def test_the_plan_of_an_injection() -> None:
    plan = plan_of(inject(scale=2.0))
    assert plan.injections == (
        Injection(0, ATTN, ((1, 2.0 * 0.5 * 0.9), (2, 2.0 * 0.5 * 0.5)), (2, 3)),
        Injection(0, MLP, ((0, 2.0 * 2.0 * 0.25),), (1, 2)),
    )
    (step,) = plan.steps
    assert (step.layers, step.site, step.assets) == ((1, 2, 3), None, ("inline",))
    assert set(step.places) == plan.edited == {Place(2, ATTN), Place(3, ATTN), Place(1, MLP), Place(2, MLP)}
    assert plan.places == {*plan.edited, Place(1, ATTN), Place(0, MLP)}
    assert step.tokens == spec.TokenSet(generated=True, last=1)
    again = Plan.from_bytes(plan.to_bytes())
    assert (again, again.id) == (plan, plan.id)
    assert again.steps[0].tokens.model_fields_set == {"generated", "last"}  # type: ignore[union-attr]


def test_every_number_of_a_recipe_is_in_the_plans_id() -> None:
    def changed(**fields: Any) -> str:
        return plan_of({"op": "inject", "recipe": {"inline": {**BODY, **fields}}}).edits_id

    ids = [plan_of(inject()).edits_id, plan_of(inject(scale=2)).edits_id, plan_of(inject(layers=3)).edits_id]
    ids += [changed(rr_attn=[0.1, 0.9, 0.6, 0.2]), changed(lambda_a=0.6), changed(lambda_m=0.6)]
    ids += [changed(sources={"attn": [1], "mlp": [0]}), changed(targets={"attn": [2], "mlp": [1, 2]})]
    assert len(set(ids)) == len(ids)


def test_what_the_asset_recommends() -> None:
    made = stored(recommended={"scale": 0.5, "how": "by eye"}, tokens="last_prompt")
    plan = resolve({"interventions": [{"op": "inject", "recipe": "r"}]}, made)
    assert plan.injections == plan_of(inject(scale=0.5)).injections
    assert (plan.steps[0].tokens, plan.steps[0].assets) == ("last_prompt", (made.ref,))
    stated = resolve({"interventions": [{"op": "inject", "recipe": "r", "scale": 1, "tokens": "all"}]}, made)
    assert stated.injections == plan_of(inject()).injections
    assert stated.steps[0].tokens == "all"


def test_layers_are_some_of_the_targets() -> None:
    """A source with no target after it is not read."""
    plan = plan_of(inject(layers="1-2"))
    assert [(i.site, [k for k, _ in i.sources], i.targets) for i in plan.injections] == [
        (ATTN, [1], (2,)),
        (MLP, [0], (1, 2)),
    ]
    assert [i.site for i in plan_of(inject(layers=3)).injections] == [ATTN]
    assert plan_of(inject(layers="all")).injections == plan_of(inject()).injections


def test_a_gate_is_on_both_sites() -> None:
    when = {"vector": inline(noise(D)), "layer": 0, "above": 0.0}
    plan = plan_of({"op": "add", "vector": inline(noise(D)), "layers": 1}, inject(when=when))
    assert [(i.intervention, i.gate) for i in plan.injections] == [(1, 0), (1, 0)]
    assert plan.steps[1].gate == 0


REFUSED: list[tuple[dict[str, Any], type[SteeringError], str]] = [
    ({"site": "attn_out"}, UnknownField, "site"),
    ({"preserve_norm": True}, UnknownField, "preserve_norm"),
    ({"vector": "v"}, UnknownField, "vector"),
    ({"scale": math.inf}, NonFinite, "scale"),
    ({"scale": 1e7}, OutOfRange, "scale"),
    ({"layers": 0}, LayerMissing, "layers"),  # no source is before it
    ({"layers": 4}, LayerOutOfRange, "layers"),
    ({"recipe": "nobody"}, SteeringError, "recipe"),
    ({"recipe": "v"}, AssetKindMismatch, "recipe"),
    ({"recipe": {"inline": {**BODY, "rr_mlp": [1.0]}}}, InvalidRequest, "recipe.inline.rr_mlp"),
    ({"recipe": {"inline": {**BODY, "lambda_a": math.nan}}}, NonFinite, "recipe.inline.lambda_a"),
    ({"recipe": {"inline": {**BODY, "lambda_a": 1e9}}}, OutOfRange, "recipe"),
    ({"recipe": {"inline": {**BODY, "sources": {"mlp": [7]}}}}, LayerOutOfRange, "recipe.inline.sources"),
    ({"recipe": {"inline": SHORT}}, InvalidRequest, "recipe.inline.rr_attn"),
    ({"when": {"vector": inline(noise(D)), "layer": 1, "site": "mlp_out", "above": 0.0}}, GateOrder, "when.layer"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "param"), REFUSED)
def test_refused(fields: dict[str, Any], error: type[SteeringError], param: str) -> None:
    with pytest.raises(error) as raised:
        resolve({"interventions": [inject(**fields)]}, vector("v", noise(1, D), [1]))
    assert raised.value.param == f"steering.interventions[0].{param}"


def test_a_model_without_the_site() -> None:
    less = {site: widths for site, widths in MODEL.sites.items() if site is not MLP}
    model = ModelInfo(MODEL.name, MODEL.architecture, LAYERS, D, MODEL.n_heads, MODEL.d_head, less)
    with pytest.raises(SiteUnsupported) as raised:
        plan_of(inject(), model=model)
    assert raised.value.param == "steering.interventions[0].recipe"
    assert plan_of(inject(layers=3), model=model).edited == {Place(3, ATTN)}


def test_the_schema_tells_of_it() -> None:
    definitions = spec.Steering.model_json_schema()["$defs"]
    assert {"layers", "tokens", "when", "op", "recipe", "scale"} == set(definitions["Inject"]["properties"])
    assert {"rr_attn", "rr_mlp", "lambda_a", "lambda_m"} == set(definitions["Recipe"]["required"])
