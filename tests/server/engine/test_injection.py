"""Same-pass injection in the runtime, against its formula written a second time over the toy model in float64."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.server.engine import runtime as module
from steersman.server.engine.carry import Carried
from steersman.server.engine.device import SLOTS, DevicePlans
from steersman.server.engine.dosage import CAP, WARN, Dosage
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.worker import WorkerSteering
from steersman.steering.errors import SiteUnsupported
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from tests.kernels import table_reader
from tests.server.engine.plans import OPENS, SHUT, add, gate, inject, sideways
from tests.server.engine.toy import FACTORS, POSITIONS, SHIFTS, TABLE, Piece, Toy, alone, args, report
from tests.steering.library import LAYERS, D, noise, plan_of

ATTN, MLP = Site.ATTN_OUT, Site.MLP_OUT
PROMPT = [SHUT, 5, OPENS, 4, 1, 12, 2, 20]
P = len(PROMPT)
IDS = [*PROMPT, 6, 5, OPENS, 1]
LAST = [i >= P - 1 for i in range(len(IDS))]  # what is injected by default: the prompt's last token, and what follows
RECIPE: dict[str, Any] = inject()["recipe"]["inline"]
RECEIVING = {ATTN: (1, 2, 3), MLP: (3,)}


def formula(
    chosen: Sequence[bool],
    recipe: dict[str, Any] = RECIPE,
    scale: float = 1.0,
    before: dict[Place, Tensor] | None = None,
    after: dict[Place, Tensor] | None = None,
) -> tuple[Tensor, dict[Place, Tensor]]:
    """The stream [n, d] float64 after the last layer, and by place ‖Δx‖/‖x‖ [n] of the injection.

    before, after: vectors that are added at a place before and after the injection, to every token.
    """
    stream = (TABLE[IDS] + POSITIONS[: len(IDS)]).double()
    raw: dict[Place, Tensor] = {}
    sizes: dict[Place, Tensor] = {}
    picked = torch.tensor(chosen)[:, None]
    for layer in range(LAYERS):
        for i, (site, part, strength) in enumerate(((ATTN, "attn", "lambda_a"), (MLP, "mlp", "lambda_m"))):
            place = Place(layer, site)
            x = raw[place] = stream * FACTORS[layer][i].double()
            x = x + (before or {}).get(place, torch.zeros(D)).double()
            sources = [k for k in recipe["sources"].get(part, ()) if k < layer]
            if sources and layer in recipe["targets"].get(part, ()):
                y = x.clone()
                for k in sources:
                    y += scale * recipe[strength] * recipe[f"rr_{part}"][k] * raw[Place(k, site)]
                y *= x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
                sizes[place] = (y - x).norm(dim=-1) / raw[place].norm(dim=-1)
                x = torch.where(picked, y, x)
            stream = stream + x + (after or {}).get(place, torch.zeros(D)).double()
        stream = stream * 0.75 + SHIFTS[layer].double()
        stream[:, 0] /= 0.75
    return stream, sizes


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


# -- what is done ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[], [3], [1, P - 1]])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_prompt_and_decode_follow_the_formula(chunks: list[int], scale: float) -> None:
    found = alone(plan_of(inject(scale=scale)), IDS, P, chunks)
    close(found, formula(LAST, scale=scale)[0])
    moved = (found != alone(None, IDS, P, chunks)).any(-1)
    assert moved.tolist() == LAST


def test_what_a_source_is_read_before_any_edit_of_its_place() -> None:
    """Edits of other places reach the sources as they reach anything later; those of the same place do not."""
    v, w = noise(D, seed=30), noise(D, seed=31)
    v[0] = w[0] = 0
    everywhere = [Place(layer, ATTN) for layer in range(LAYERS)]
    first = {"op": "add", "vector": sideways(30), "layers": "all", "site": "attn_out"}
    last = {**first, "vector": sideways(31)}
    both = dict.fromkeys(everywhere, v), dict.fromkeys(everywhere, w)
    found = alone(plan_of(first, inject(tokens="all"), last), IDS, P)
    close(found, formula([True] * len(IDS), before=both[0], after=both[1])[0])
    swapped = alone(plan_of(last, inject(tokens="all"), first), IDS, P)
    assert float((found - swapped).abs().max()) > 1e-2


def test_two_injections_take_the_same_sources() -> None:
    """The second is done to what the first has made, and both add what the model itself put out."""
    one = alone(plan_of(inject(scale=0.5), inject(scale=0.5, tokens="prompt")), IDS, P, [2])
    other = alone(plan_of(inject(scale=0.5), inject(scale=0.5, tokens="prompt")), IDS, P)
    assert torch.equal(one, other)
    close(one[P:], formula(LAST, scale=0.5)[0][P:])  # only the first is for these


@pytest.mark.parametrize("over", ["token", "last_prompt"])
def test_a_gate_decides_and_does_not_stop_the_carry(over: str) -> None:
    """The gate is read after the first source: a token whose gate opens receives what was put out before."""
    opens = [(over == "last_prompt" and p >= P - 1) or (over == "token" and IDS[p] > 6) for p in range(len(IDS))]
    its = plan_of(inject(tokens="all", layers=[2, 3], when=gate(over, 1)))
    toy = Toy(Runtime())
    toy.add("r", its, PROMPT)
    narrowed = {**RECIPE, "targets": {"attn": [2, 3], "mlp": [3]}}
    close(toy.complete("r", IDS, P, [3]), formula(opens, narrowed)[0])
    assert report(toy.runtime, "r")["edited"] == [sum(opens)]


LAYER_SETS = st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted)
NUMBERS = st.floats(-3, 3).map(lambda x: round(x, 2))


@settings(max_examples=40, deadline=None)
@given(
    sources=LAYER_SETS, targets=LAYER_SETS, rates=st.lists(NUMBERS, min_size=LAYERS, max_size=LAYERS),
    strength=NUMBERS, scale=NUMBERS, positions=st.sets(st.integers(0, P - 1), min_size=1), seed=st.integers(0, 99),
)  # fmt: skip
def test_norms_stay_and_nothing_moves_before_a_source(
    sources: list[int], targets: list[int], rates: list[float], strength: float, scale: float,
    positions: set[int], seed: int,
) -> None:  # fmt: skip
    """Of any recipe, at activations of any size: the runtime is called by hand, place by place."""
    if targets[-1] <= sources[0]:
        return  # refused
    inline = {
        "rr_attn": rates, "rr_mlp": rates[::-1], "lambda_a": strength, "lambda_m": 0.0,
        "sources": {"attn": sources}, "targets": {"attn": targets},
    }  # fmt: skip
    asked = {"op": "inject", "recipe": {"inline": inline}, "scale": scale, "tokens": {"positions": sorted(positions)}}
    runtime = Runtime()
    its = plan_of(asked)
    runtime.plans.add(its.to_bytes(), "http")
    runtime.add_request("r", args(its, PROMPT, "r"))
    runtime.begin([module.Scheduled("r", 0, 0, P)], lambda *_: torch.tensor(PROMPT).numpy())
    rows = torch.tensor([p in positions for p in range(P)])
    carried = torch.zeros(P, D)
    for layer in range(LAYERS):
        x = noise(P, D, seed=100 * seed + layer) * 10.0 ** (layer - 2)
        y = x.clone()
        runtime.apply(Place(layer, ATTN), y)
        assert torch.equal(y[~rows], x[~rows])
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
        wanted = x + carried
        wanted = wanted * (x.norm(dim=-1) / wanted.norm(dim=-1))[:, None]
        if layer in targets and layer > sources[0]:
            assert torch.allclose(y[rows], wanted[rows], rtol=1e-3, atol=1e-4 * float(x.norm()))
        else:
            assert torch.equal(y, x)
        if layer in sources:
            carried += scale * strength * rates[layer] * x
    runtime.end()
    assert report(runtime, "r")["error"] is None
    assert not runtime._carried._sums  # nothing stays in memory


# -- what is not done -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_strength_is_no_change_in_any_bit(dtype: torch.dtype) -> None:
    weak = {**RECIPE, "lambda_a": 0.0, "lambda_m": 0.0}
    for asked in (inject(scale=0.0, tokens="all"), {"op": "inject", "recipe": {"inline": weak}, "tokens": "all"}):
        assert torch.equal(alone(plan_of(asked), IDS, P, dtype=dtype), alone(None, IDS, P, dtype=dtype))
    runtime = Runtime()
    its = plan_of(inject(scale=0.0, tokens="all"))
    runtime.plans.add(its.to_bytes(), "http")
    runtime.add_request("r", args(its, PROMPT, "r"))
    runtime.begin([module.Scheduled("r", 0, 0, P)], lambda *_: torch.tensor(PROMPT).numpy())
    for layer in range(LAYERS):
        x = noise(P, D, seed=layer).to(dtype)
        x[:, ::3] = -0.0
        x[2] = 0
        y = x.clone()
        runtime.apply(Place(layer, ATTN), y)
        assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    runtime.end()


def test_a_neighbour_keeps_its_bits_when_a_source_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails: it is not answered as if it had been steered."""
    toy = Toy(Runtime())
    toy.add("r", plan_of(inject()), PROMPT)
    toy.add("other", plan_of(add(0, 1)), PROMPT)
    monkeypatch.setattr(Carried, "read", lambda *_: 1 / 0)
    out = toy.run(Piece("plain", 0, PROMPT), Piece("r", 0, PROMPT), Piece("other", 0, PROMPT))
    assert torch.equal(out["plain"], alone(None, PROMPT, P))
    monkeypatch.undo()
    assert torch.equal(out["other"], alone(plan_of(add(0, 1)), PROMPT, P))
    assert "for an injection failed: division by zero" in report(toy.runtime, "r")["error"]
    assert report(toy.runtime, "other")["error"] is None


@pytest.mark.parametrize("every", [1, 10**6])
def test_plans_at_the_same_places_keep_their_bits(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order their rows come in: a table edits some groups of a place, and the others are done in turn."""
    monkeypatch.setattr(module, "MEASURE_EVERY", every)
    plans = {
        "in turn": plan_of(inject(tokens="all")),
        "table": plan_of(add(1, "all", site="attn_out"), add(2, [1, 3], site="mlp_out", relative="norm", scale=0.3)),
        "both": plan_of(add(3, "all", site="attn_out"), inject(scale=0.5), add(4, 3, site="mlp_out")),
    }
    for names in (list(plans), list(plans)[::-1]):
        toy = Toy(Runtime())
        for name in names:
            toy.add(name, plans[name], PROMPT)
        out = [toy.run(*(Piece(name, a, IDS[a:b]) for name in names)) for a, b in ((0, 3), (3, P), (P, P + 1))]
        for name in names:
            want = alone(plans[name], IDS[: P + 1], P, [3])
            assert torch.equal(torch.cat([o[name] for o in out]), want), name
            assert report(toy.runtime, name)["error"] is None


def on_device(rows: int) -> Runtime:
    """What ``rows`` rows carry has room there."""
    places = [Place(layer, site) for layer in range(LAYERS) for site in Site]
    runtime, cpu, carried = Runtime(), torch.device("cpu"), rows * 4 * SLOTS * D
    runtime.use_device(
        DevicePlans(table_reader.edit, places, {}, cpu, rows=64, plans=4, nbytes=2**16, d_model=D, carry_nbytes=carried)
    )
    return runtime


def test_a_device_injects_as_many_rows_as_it_has_room_for() -> None:
    runtime = on_device(10)
    toy = Toy(runtime, replays=True)
    toy.add("r", plan_of(inject()), PROMPT)
    toy.add("other", plan_of(add(0, 1)), PROMPT)
    assert [runtime.needs_host({"r": 0}, rows) for rows in (1, 10, 11)] == [False, False, True]
    assert not runtime.needs_host({"other": 0}, 11)
    for pieces in ([Piece("r", 0, PROMPT)], [Piece("other", 0, PROMPT), Piece("r", 0, PROMPT)]):
        close(toy.run(*pieces)["r"], formula(LAST)[0][:P])
    assert report(runtime, "r")["error"] is None


@pytest.mark.parametrize("rows", [0, 64])
def test_a_plan_of_more_injections_than_there_is_room_for_is_the_hosts(rows: int) -> None:
    its = [inject(scale=0.1 * i) for i in range(1 if not rows else 3)]
    runtime = on_device(rows)
    toy = Toy(runtime, replays=True)
    toy.add("r", plan_of(*its), PROMPT)
    assert runtime.needs_host({"r": 0}, 1)
    torch.testing.assert_close(toy.run(Piece("r", 0, PROMPT))["r"], alone(plan_of(*its), PROMPT, P))


def test_a_device_adds_nothing_to_what_the_last_pass_has_left() -> None:
    runtime = on_device(64)
    toy = Toy(runtime, replays=True)
    toy.add("r", plan_of(inject()), PROMPT)
    device = runtime.device
    assert device is not None
    assert device.tables.buffers is not None
    device.tables.buffers.carry.fill_(float("nan"))
    for _ in range(2):
        close(toy.run(Piece("r", 0, PROMPT))["r"], formula(LAST)[0][:P])


def test_no_strength_is_no_change_on_a_device_either() -> None:
    for its in (inject(scale=0), inject(scale=0, tokens="all")):
        toy = Toy(on_device(64), torch.bfloat16, replays=True)
        toy.add("r", plan_of(its), PROMPT)
        assert torch.equal(toy.run(Piece("r", 0, PROMPT))["r"], alone(None, PROMPT, P, dtype=torch.bfloat16))


def test_a_pipeline_stage_refuses_sources_that_it_does_not_have() -> None:
    plan = plan_of(inject())
    for mine, bad in (
        ({0, 1, 2, 3}, False),
        ({0}, False),
        ({0, 1}, False),
        ({2, 3}, True),
        ({3}, True),
        ({1, 2}, True),
    ):
        stage: Any = SimpleNamespace(layers=frozenset(mine))
        if not bad:
            WorkerSteering._refuse_far_reads(stage, plan)
            continue
        with pytest.raises(SiteUnsupported, match="layer 0 is on another pipeline stage"):
            WorkerSteering._refuse_far_reads(stage, plan)


# -- what is told ---------------------------------------------------------------------------------------


def test_sizes_and_counts_are_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Site by site for each token, and by layer for both sites together."""
    monkeypatch.setattr(module, "MEASURE_EVERY", 1)
    its, sizes = plan_of(inject()), formula(LAST)[1]
    toy = Toy(Runtime())
    toy.runtime.plans.add(its.to_bytes(), "http")
    toy.runtime.add_request("r", {**args(its, PROMPT, "r"), "whole": True})
    toy.complete("r", IDS, P)
    found = report(toy.runtime, "r")
    assert found["edited"] == [sum(LAST)]
    (told,) = found["tokens"]
    columns = [tuple(c) for c in told["edits"]["columns"]]
    assert set(columns) == {(0, layer, site.value) for site, layers in RECEIVING.items() for layer in layers}
    for column, (_, layer, site) in enumerate(columns):
        own = [row[column] for row in told["edits"]["values"]]
        assert [size is not None for size in own] == LAST
        assert own[P - 1 :] == pytest.approx(sizes[Place(layer, Site(site))][P - 1 :].tolist(), rel=1e-4)
    by_layer: dict[int, list[float]] = {}
    for place, values in sizes.items():
        by_layer.setdefault(place.layer, []).extend(values[P - 1 :].tolist())
    relative = {layer: (total, count) for _, layer, total, count in found["relative"]}
    assert {layer: count for layer, (_, count) in relative.items()} == {k: len(v) for k, v in by_layer.items()}
    for layer, (total, _) in relative.items():
        assert total == pytest.approx(sum(by_layer[layer]), rel=1e-4)


@pytest.mark.parametrize("action", [WARN, CAP])
def test_the_limit_on_sizes_holds_for_it(action: str) -> None:
    sizes = formula(LAST)[1]
    every = torch.cat([values[P - 1 :] for values in sizes.values()])
    limit = float(every.median())
    toy = Toy(Runtime())
    toy.runtime.dosage = Dosage(limit, action)
    toy.add("r", plan_of(inject()), PROMPT)
    found = toy.complete("r", IDS, P)
    told = report(toy.runtime, "r")
    assert told["over"]
    mean = [total / count for _, _, total, count in told["relative"]]
    if action == WARN:
        close(found, formula(LAST)[0])
        assert max(worst for *_, worst in told["over"]) == pytest.approx(float(every.max()), rel=1e-4)
    else:
        assert max(mean) <= limit * (1 + 1e-5)
        assert float((found[P - 1 :] - formula(LAST)[0][P - 1 :]).abs().max()) > 1e-3
