import pytest
import torch

from steersman.steering import spec
from steersman.steering.directions import Library
from steersman.steering.errors import (
    AssetKindMismatch,
    InvalidRequest,
    SiteUnsupported,
    SteeringError,
    TooManyInterventions,
    UnknownAsset,
)
from steersman.steering.plan import Place, Plan
from steersman.steering.resolve import Resolver
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.store import Store
from tests.steering.library import D_HEAD, HEADS, LAYERS, MODEL, REF, D, inline, noise, plan_of
from tests.steering.stock import solve, stock

POST = Site.RESID_POST


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stock(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def resolver(store: Store) -> Resolver:
    return Resolver(Library(store, MODEL))


def places(plan: Plan) -> list[tuple[int, str]]:
    return [(p.layer, p.site.value) for p in sorted(plan.blocks, key=lambda p: p.order)]


def test_the_assets_layers_site_scale_and_tokens_are_the_defaults(resolver: Resolver, store: Store) -> None:
    plan = solve(resolver, {"op": "add", "vector": "v"})
    assert places(plan) == [(1, "resid_post"), (3, "resid_post")]
    (step,) = plan.steps
    assert (step.op, step.layers, step.site, step.gate) == ("add", (1, 3), POST, -1)
    assert step.assets == (store.info("v").ref,)
    assert step.path == "steering.interventions[0]"
    assert step.tokens == spec.TokenSet(generated=True, last=1)
    for row, layer in enumerate((1, 3)):
        (block,) = plan.blocks[Place(layer, POST)]
        assert torch.equal(block.write.to_dense()[0], noise(2, D)[row] * 6)


def test_what_a_request_states_comes_first(resolver: Resolver) -> None:
    plan = solve(resolver, {"op": "add", "vector": "v", "scale": 0, "layers": 3, "site": "mlp_out", "tokens": "all"})
    assert places(plan) == [(3, "mlp_out")]
    assert plan.steps[0].tokens == "all"
    assert not plan.blocks[Place(3, Site.MLP_OUT)][0].write.to_dense().any()


@pytest.mark.parametrize(
    ("layers", "want"),
    [("all", (0, 1, 2, 3)), ("1-2", (1, 2)), ("2-2", (2,)), (2, (2,)), ([3, 0], (3, 0)), (None, (0, 1, 2, 3))],
)
def test_layers_in_all_their_forms(resolver: Resolver, layers: object, want: tuple[int, ...]) -> None:
    plan = solve(resolver, {"op": "add", "vector": "mid", "layers": layers})
    assert plan.steps[0].layers == want
    assert {p.layer for p in plan.blocks} == set(want)
    assert {p.site for p in plan.blocks} == {Site.RESID_MID}


def test_all_layers_means_all_that_the_asset_has(resolver: Resolver) -> None:
    assert solve(resolver, {"op": "add", "vector": "v", "layers": "all"}).steps[0].layers == (1, 3)
    anywhere = inline(noise(D))
    assert solve(resolver, {"op": "add", "vector": anywhere, "layers": "all"}).steps[0].layers == (0, 1, 2, 3)


def test_from_layer_uses_one_direction_everywhere(resolver: Resolver) -> None:
    plan = solve(resolver, {"op": "add", "vector": "v", "scale": 1, "from_layer": 3, "layers": [0, 2]})
    for layer in (0, 2):
        assert torch.equal(plan.blocks[Place(layer, POST)][0].write.to_dense()[0], noise(2, D)[1])
    assert solve(resolver, {"op": "ablate", "vector": "plane", "from_layer": 1, "layers": "all"}).steps[0].layers == (
        0, 1, 2, 3,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_inline_vectors_of_every_shape_and_type(resolver: Resolver, dtype: str) -> None:
    stacked = noise(2, D).to(getattr(torch, dtype)).float()
    plan = solve(resolver, {"op": "add", "vector": inline(stacked, [2, 0], dtype, site="resid_pre")})
    assert places(plan) == [(0, "resid_pre"), (2, "resid_pre")]
    assert torch.equal(plan.blocks[Place(2, Site.RESID_PRE)][0].write.to_dense()[0], stacked[0])
    assert torch.equal(plan.blocks[Place(0, Site.RESID_PRE)][0].write.to_dense()[0], stacked[1])
    assert plan.steps[0].assets == ("inline",)
    flat = solve(resolver, {"op": "add", "vector": inline(stacked[0], dtype=dtype), "layers": 1})
    assert torch.equal(flat.blocks[Place(1, POST)][0].write.to_dense()[0], stacked[0])
    plane = solve(resolver, {"op": "ablate", "vector": inline(noise(1, 2, D), [1], dtype)})
    assert plane.blocks[Place(1, POST)][0].count == 2


def test_neurons_by_layer_each_once(resolver: Resolver) -> None:
    plan = solve(resolver, {"op": "neurons", "neurons": "cluster", "value": 4})
    assert places(plan) == [(1, "mlp_post"), (2, "mlp_post")]
    columns = plan.blocks[Place(1, Site.MLP_POST)][0].write.columns
    assert columns is not None
    assert columns.tolist() == [3, 19]
    assert plan.steps[0].tokens == "generated"
    twice = solve(
        resolver, {"op": "neurons", "neurons": {"inline": [[0, 5], [0, 5], [0, 5]]}, "value": 1, "mode": "add"}
    )
    assert twice.blocks[Place(0, Site.MLP_POST)][0].count == 1
    assert solve(resolver, {"op": "neurons", "neurons": "cluster", "value": 4, "layers": 2}).steps[0].layers == (2,)


def test_heads_at_their_layers(resolver: Resolver) -> None:
    plan = solve(resolver, {"op": "heads", "heads": [[1, 1], [0, 0], [1, 1]], "factor": 0})
    assert places(plan) == [(0, "attn_z"), (1, "attn_z")]
    columns = plan.blocks[Place(1, Site.ATTN_Z)][0].write.columns
    assert columns is not None
    assert columns.tolist() == list(range(D_HEAD, 2 * D_HEAD))


def test_heads_of_layers_with_different_widths(store: Store) -> None:
    sites = {**MODEL.sites, Site.ATTN_Z: {0: 12, 1: 12, 2: 20, 3: 13}}
    odd = ModelInfo("org/Tiny", "Odd", LAYERS, D, HEADS, 0, sites)
    resolver = Resolver(Library(store, odd))
    columns = (
        solve(resolver, {"op": "heads", "heads": [[2, 1]], "factor": 0}).blocks[Place(2, Site.ATTN_Z)][0].write.columns
    )
    assert columns is not None
    assert columns.tolist() == list(range(10, 20))
    with pytest.raises(SiteUnsupported) as raised:
        solve(resolver, {"op": "heads", "heads": [[3, 1]], "factor": 0})
    assert raised.value.param == "steering.interventions[0].heads"


def test_affine_at_its_layers_and_site(resolver: Resolver) -> None:
    plan = solve(resolver, {"op": "affine", "affine": "map"})
    assert places(plan) == [(0, "resid_post"), (2, "resid_post")]
    assert plan.steps[0].tokens == "prompt"


def test_gates_and_probes(resolver: Resolver, store: Store) -> None:
    gate = {"vector": "v", "layer": 1, "above": 0.1, "over": "last_prompt"}
    plan = solve(
        resolver,
        {"op": "add", "vector": "mid"},
        {"op": "add", "vector": "v", "when": gate},
        probes=[{"vector": "v"}, {"vector": "mid", "layers": 2, "site": "attn_out"}],
    )
    assert [s.gate for s in plan.steps] == [-1, 0]
    assert plan.gates[0].place == Place(1, POST)
    assert float(plan.gates[0].direction.norm()) == pytest.approx(1)
    assert [(p.probe, *p.place) for p in plan.probes] == [(0, 1, POST), (0, 3, POST), (1, 2, Site.ATTN_OUT)]
    assert plan.probe_names == (store.info("v").ref, store.info("mid").ref)
    assert {b.gate for b in plan.blocks[Place(3, POST)]} == {0}
    assert Place(2, Site.ATTN_OUT) in plan.places


def test_interventions_at_one_place_keep_their_order(resolver: Resolver) -> None:
    plan = solve(resolver, *({"op": op, "vector": "v", **more} for op, more in [
        ("ablate", {}), ("add", {}), ("multiply", {"factor": 2}), ("add", {"relative": "norm"}),
    ]))  # fmt: skip
    assert [b.intervention for b in plan.blocks[Place(1, POST)]] == [0, 1, 2, 3]
    assert [s.path for s in plan.steps] == [f"steering.interventions[{i}]" for i in range(4)]


# -- profiles -------------------------------------------------------------------------------------------


def test_the_default_comes_first_then_the_profile_then_the_request(resolver: Resolver) -> None:
    default = spec.parse({"interventions": [{"op": "ablate", "vector": "v"}]}, "default")
    asked = {"interventions": [{"op": "multiply", "vector": "v", "factor": 2}], "profile": "calm"}
    plan = resolver.resolve(spec.parse(asked), default)
    assert [s.path for s in plan.steps] == [
        "default.interventions[0]",
        "steering.profile.interventions[0]",
        "steering.interventions[0]",
    ]
    assert [s.op for s in plan.steps] == ["ablate", "add", "multiply"]
    without = resolver.resolve(spec.parse({**asked, "default": False}), default)
    assert [s.op for s in without.steps] == ["add", "multiply"]
    named = resolver.resolve(spec.parse({}), spec.parse({"profile": "calm"}))
    assert [s.path for s in named.steps] == ["default.profile.interventions[0]"]


@pytest.mark.parametrize(
    ("profile", "kind", "param"),
    [
        ("nested", InvalidRequest, "steering.profile"),
        ("gone", UnknownAsset, "steering.profile"),
        ("", UnknownAsset, "steering.profile"),
        ("v", AssetKindMismatch, "steering.profile"),
        ("broken", InvalidRequest, "steering.profile.interventions[0].scale"),
        ("stale", UnknownAsset, "steering.profile.interventions[0].vector"),
    ],
)
def test_profiles_that_cannot_be_used(resolver: Resolver, profile: str, kind: type[SteeringError], param: str) -> None:
    with pytest.raises(SteeringError) as raised:
        solve(resolver, profile=profile)
    assert (type(raised.value), raised.value.param) == (kind, param)


def test_a_profiles_interventions_count(resolver: Resolver) -> None:
    with pytest.raises(TooManyInterventions) as raised:
        solve(resolver, *[{"op": "add", "vector": "v"}] * 5, profile="many")
    assert raised.value.param == "steering.interventions"
    assert len(solve(resolver, *[{"op": "add", "vector": "v"}] * 4, profile="many").steps) == 64


def test_the_model_that_the_assets_are_for() -> None:
    assert REF["id"] == MODEL.name.lower()
    assert plan_of({"op": "add", "vector": inline(noise(D)), "layers": 0}).steps
    again = ModelInfo.from_json(MODEL.to_json())
    assert again == MODEL
