"""Features that take a whole encoder, in a runtime: what they do, beside neighbours, and where they are refused."""

from __future__ import annotations

import gc

import pytest
import torch

from steersman.server.engine import runtime as module
from steersman.server.engine.dosage import CAP, Dosage
from steersman.server.engine.encoders import Encoders
from steersman.server.engine.runtime import Runtime
from steersman.steering import dictionaries
from steersman.steering.assets import Asset
from steersman.steering.errors import AssetCorrupt, CapacityExceeded, FeatureUnreadable, UnknownAsset
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.server.engine.plans import KINDS, plan
from tests.server.engine.toy import Piece, Toy, alone, report
from tests.steering.library import D, Shelf, asset, inline, noise, resolve

PROMPT = [3, 5, 9, 4, 1, 12, 2, 20]
IDS = [*PROMPT, 6, 5, 9, 1]
P, LAYER = len(PROMPT), 2
PLACE = Place(LAYER, Site.RESID_POST)


def before() -> torch.Tensor:
    """The stream that leaves the layer, unsteered."""
    seen = []

    class Looking(Toy):
        def _touch(self, place: Place, stream: torch.Tensor) -> torch.Tensor:
            if place == PLACE:
                seen.append(stream)
            return stream

    Looking(Runtime()).complete("r", IDS, P)
    return torch.cat(seen)


def topk(name: str = "sae", seed: int = 3) -> Asset:
    """One whose active features differ from token to token."""
    tensors = {"decoder": noise(7, D, seed=1), "b_dec": before().mean(0)}
    tensors |= {"encoder": noise(7, D, seed=seed), "b_enc": noise(7, seed=4) / 4}
    tensors["encoder"][:, 0] = 0  # the toy's tokens would be told by that coordinate alone
    about = {"layer": LAYER, "architecture": "topk", "k": 2, "apply_b_dec_to_input": True}
    return asset(name, "dictionary", tensors, **about)


CHOSEN = [4, 1]
SAE = topk()
FEATURE = {"op": "feature", "dictionary": "sae", "index": CHOSEN, "mode": "scale", "value": -2.0}
PLAN = resolve({"interventions": [FEATURE]}, SAE)


def get(ref: str) -> Asset:
    return Shelf(SAE).get(ref.removesuffix(f"@{SAE.version}"))


def runtime(capacity: int = 2**30) -> Runtime:
    made = Runtime(capacity=capacity)
    made.plans.on_load = Encoders(get, made.shards, on_cpu=True).load
    return made


def served(its_plan: Plan, split: bool = False) -> torch.Tensor:
    toy = Toy(runtime(), split=split)
    toy.add("r", its_plan, PROMPT)
    return toy.complete("r", IDS, P)


@pytest.mark.parametrize("split", [False, True])
def test_the_runtime_does_what_the_formula_says(split: bool) -> None:
    """x + Σ (a′ − a)·W_dec, a of the whole encode of the stream that leaves the layer, worked out beside it."""
    seen = {}

    class Looking(Toy):
        def _touch(self, place: Place, stream: torch.Tensor) -> torch.Tensor:
            out = super()._touch(place, stream)
            if place == PLACE:
                seen["before"], seen["after"] = stream, out
            return out

    toy = Looking(runtime(), split=split)
    toy.add("r", PLAN, PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    x, acts = seen["before"], dictionaries.encode(SAE, seen["before"])[:, CHOSEN]
    want = x + (-3 * acts) @ SAE.tensors["decoder"][CHOSEN]
    assert 0 < int((acts > 0).sum()) < acts.numel()
    torch.testing.assert_close(seen["after"], want, rtol=0, atol=1e-4)
    found = report(toy.runtime, "r")
    assert (found["error"], found["edited"]) == (None, [P])
    change = (want - x).norm(dim=-1) / x.norm(dim=-1)
    [[_, layer, total, count]] = found["relative"]
    assert (layer, count) == (LAYER, P)
    assert total == pytest.approx(float(change.sum()), rel=1e-4)


@pytest.mark.parametrize("measured", [False, True])
def test_neighbours_at_the_same_place_keep_their_bits(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURE_EVERY", 1 if measured else 1000)
    toy = Toy(runtime())
    names = [*KINDS, "plain"]
    for name in ("sae before", *names, "sae after"):
        its_plan = PLAN if name.startswith("sae") else None if name == "plain" else plan(name)
        toy.add(name, its_plan, PROMPT)
    out: dict[str, list[torch.Tensor]] = {}
    for a, b in ((0, P), *((i, i + 1) for i in range(P, len(IDS)))):
        for name, x in toy.run(*(Piece(n, a, IDS[a:b]) for n in ("sae before", *names, "sae after"))).items():
            out.setdefault(name, []).append(x)
    for name in names:
        assert torch.equal(torch.cat(out[name]), alone(None if name == "plain" else plan(name), IDS, P)), name
    for name in ("sae before", "sae after"):
        torch.testing.assert_close(torch.cat(out[name]), served(PLAN), rtol=0, atol=1e-4)
    assert not any(report(toy.runtime, name)["error"] for name in (*KINDS, "sae before"))
    assert float((served(PLAN) - alone(None, IDS, P)).abs().max()) > 0.1


def test_a_limit_on_the_size_of_edits_holds_for_it_too() -> None:
    free, limit = runtime(), 0.05
    sizes = {}
    for name, made in (("free", free), ("capped", runtime())):
        made.dosage = None if name == "free" else Dosage(limit, CAP)
        toy = Toy(made)
        toy.add("r", PLAN, PROMPT)
        toy.run(Piece("r", 0, PROMPT))
        found = report(made, "r")
        assert found["error"] is None
        [[_, _, total, count]] = found["relative"]
        sizes[name] = total / count
    assert sizes["free"] > 2 * limit
    assert 0 < sizes["capped"] <= limit * 1.001


def test_a_gate_decides_where_it_works() -> None:
    when = {"vector": inline(torch.eye(D)[0]), "layer": 0, "measure": "projection", "above": 3.5}
    gated = resolve({"interventions": [{**FEATURE, "when": when}]}, SAE)
    changed = (served(gated) != alone(None, IDS, P)).any(-1).tolist()
    acts = dictionaries.encode(SAE, before())[:, CHOSEN]
    opened = [token > 3.5 for token in IDS]
    assert changed == [o and bool(a.any()) for o, a in zip(opened, acts, strict=True)]
    assert 0 < sum(changed) < sum(opened) + 1


# -- loading ------------------------------------------------------------------------------------------


def test_plans_share_an_encoder_and_let_go_of_it() -> None:
    opened = []

    def counted(ref: str) -> Asset:
        opened.append(ref)
        return SAE

    encoders = Encoders(counted, (), on_cpu=True)
    plans = [Plan.from_bytes(PLAN.to_bytes()) for _ in range(2)]
    for each in plans:
        encoders.load(each)
    assert opened == [SAE.ref]
    assert plans[0].encodes[0][1].encoder is plans[1].encodes[0][1].encoder
    plans.clear()
    del each
    gc.collect()
    assert not encoders._held


def test_it_counts_towards_the_plans_memory() -> None:
    size = len(PLAN.to_bytes()) + PLAN.encodes[0][1].nbytes
    made = runtime(capacity=size)
    made.plans.add(PLAN.to_bytes(), "http")
    assert made.plans.size == size
    with pytest.raises(CapacityExceeded):
        runtime(capacity=size - 1).plans.add(PLAN.to_bytes(), "http")


def test_where_it_cannot_be_done_it_is_refused() -> None:
    def load(encoders: Encoders) -> None:
        encoders.load(Plan.from_bytes(PLAN.to_bytes()))

    with pytest.raises(FeatureUnreadable, match="only the CPU engine"):
        load(Encoders(get, (), on_cpu=False))
    with pytest.raises(FeatureUnreadable, match="tensor-parallel rank"):
        load(Encoders(get, {PLACE}, on_cpu=True))
    with pytest.raises(UnknownAsset):
        load(Encoders(Shelf().get, (), on_cpu=True))
    with pytest.raises(AssetCorrupt, match="another dictionary"):
        load(Encoders(lambda ref: topk(seed=9), (), on_cpu=True))
    toy = Runtime()
    toy.plans.on_load = Encoders(Shelf().get, (), on_cpu=True).load
    with pytest.raises(UnknownAsset):
        toy.plans.add(PLAN.to_bytes(), "http")
    assert (len(toy.plans), toy.plans.size) == (0, 0)
