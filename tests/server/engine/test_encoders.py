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
from steersman.steering.encoders import FeatureEncode
from steersman.steering.errors import AssetCorrupt, CapacityExceeded, UnknownAsset
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


CPU = torch.device("cpu")
CHOSEN = [4, 1]
SAE = topk()
FEATURE = {"op": "feature", "dictionary": "sae", "index": CHOSEN, "mode": "scale", "value": -2.0}
PLAN = resolve({"interventions": [FEATURE]}, SAE)


def get(ref: str) -> Asset:
    return Shelf(SAE).get(ref.removesuffix(f"@{SAE.version}"))


def runtime(capacity: int = 2**30) -> Runtime:
    made = Runtime(capacity=capacity)
    made.plans.on_load = Encoders(get, CPU).load
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
    for name in ("sae before", "sae after"):  # beside another that shares its plan
        assert torch.equal(torch.cat(out[name]), served(PLAN)), name
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

    encoders = Encoders(counted, CPU)
    plans = [Plan.from_bytes(PLAN.to_bytes()) for _ in range(2)]
    for each in plans:
        encoders.load(each)
    assert opened == [SAE.ref]
    assert plans[0].encodes[0].encode.encoder is plans[1].encodes[0].encode.encoder is not None
    plans.clear()
    del each
    gc.collect()
    assert not encoders._held


def test_it_counts_towards_the_plans_memory() -> None:
    size = len(PLAN.to_bytes()) + PLAN.encodes[0].encode.nbytes
    made = runtime(capacity=size)
    made.plans.add(PLAN.to_bytes(), "http")
    assert made.plans.size == size
    with pytest.raises(CapacityExceeded):
        runtime(capacity=size - 1).plans.add(PLAN.to_bytes(), "http")


def test_what_is_not_in_the_workers_store_is_refused() -> None:
    def load(encoders: Encoders) -> None:
        encoders.load(Plan.from_bytes(PLAN.to_bytes()))

    with pytest.raises(UnknownAsset):
        load(Encoders(Shelf().get, CPU))
    with pytest.raises(AssetCorrupt, match="another dictionary"):
        load(Encoders(lambda ref: topk(seed=9), CPU))
    broken = topk()
    broken.tensors["encoder"][3, 1] = torch.nan
    with pytest.raises(AssetCorrupt, match="encoder holds NaN"):
        FeatureEncode.of(broken, [0]).load(broken, CPU)
    toy = Runtime()
    toy.plans.on_load = Encoders(Shelf().get, CPU).load
    with pytest.raises(UnknownAsset):
        toy.plans.add(PLAN.to_bytes(), "http")
    assert (len(toy.plans), toy.plans.size) == (0, 0)


# -- probes and gates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(), (3, 5)])
def test_probes_tell_what_the_dictionary_says(chunks: tuple[int, ...]) -> None:
    """After the edits at the place, of every token; two requests that share the plan are told what one is."""
    probes = [{"dictionary": "sae", "index": i} for i in (6, 2)] + [{"vector": inline(torch.eye(D)[0]), "layers": 0}]
    add = {"op": "add", "vector": inline(noise(D, seed=5)), "layers": LAYER}
    asked = resolve({"interventions": [add], "probes": probes, "report": "tokens"}, SAE)
    toy = Toy(runtime())
    for name in ("r", "s"):
        toy.add(name, asked, PROMPT)
        toy.complete(name, IDS, P, chunks)
    want = dictionaries.encode(SAE, before() + noise(D, seed=5))[:, [6, 2]]
    assert 0 < int((want > 0).sum()) < want.numel()
    found = [report(toy.runtime, name) for name in ("r", "s")]
    assert found[0]["probes"] == found[1]["probes"]
    assert found[0]["error"] is None
    sae_1, sae_2, ids = found[0]["probes"]
    for (probe, layer, count, total, low, high, last), acts in zip((sae_1, sae_2), want.T, strict=True):
        assert (layer, count) == (LAYER, len(IDS)), probe
        assert (total, low, high, last) == pytest.approx(
            (float(acts.sum()), float(acts.min()), float(acts.max()), float(acts[-1])), abs=1e-4
        )
    assert ids[3] == sum(IDS)


@pytest.mark.parametrize("over", ["token", "last_prompt", "prompt_mean"])
def test_gates_open_where_the_dictionary_says(over: str) -> None:
    acts = dictionaries.encode(SAE, before())
    mean = dictionaries.encode(SAE, before()[:P].mean(0, keepdim=True))[0]
    seen = set()
    for index in range(7):
        when = {"dictionary": "sae", "index": index, "above": 0.0, "over": over}
        add = {"op": "add", "vector": inline(noise(D, seed=5)), "layers": LAYER + 1, "when": when}
        gated = resolve({"interventions": [add]}, SAE)
        changed = (served(gated) != alone(None, IDS, P)).any(-1).tolist()
        opened = float(acts[P - 1, index] if over == "last_prompt" else mean[index]) > 0
        once = [opened and i >= P - 1 for i in range(len(IDS))]
        assert changed == ((acts[:, index] > 0).tolist() if over == "token" else once), index
        seen.add(any(changed))
    assert seen == {True, False} or over == "token"


def test_a_probe_that_cannot_be_read_is_its_requests_own_error() -> None:
    probing = resolve({"probes": [{"dictionary": "sae", "index": 6}]}, SAE)
    toy = Toy(Runtime())  # whose plans get no encoder
    toy.add("r", probing, PROMPT)
    toy.add("s", plan("add"), PROMPT)
    toy.run(Piece("r", 0, PROMPT), Piece("s", 0, PROMPT))
    assert "a probe's encode at layer 2 resid_post failed" in report(toy.runtime, "r")["error"]
    assert report(toy.runtime, "s")["error"] is None
