"""Plans in tables on a device do what the host does between the layers. The kernel here is plain torch."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from steersman.server.engine import device as device_module
from steersman.server.engine import runtime as module
from steersman.server.engine.device import PROBES, SLOTS, DevicePlans
from steersman.server.engine.monitor import Monitor
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.resident import Resident, Shard
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.worker import _widest
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.kernels import table_reader
from tests.server.engine.plans import KINDS, add, plan
from tests.server.engine.toy import BRANCHES, POST, PRE, Piece, Toy, alone, report
from tests.steering.library import LAYERS, WIDTHS, D, inline, noise, plan_of

PLACES = [Place(layer, site) for layer in range(LAYERS) for site in (PRE, *BRANCHES, POST)]
PROMPT = [3, 5, 9, 4, 1, 12, 2, 20]
IDS = [*PROMPT, 6, 5, 9, 1, 2, 30, 3, 11]
P = len(PROMPT)
CARRY = 120 * 4 * SLOTS * D  # bytes, of 120 rows
ON_HOST = {
    "hold",
    "late-hold",
}


def on_device(plans: int = 64, nbytes: int = 2**20, **kwargs: Any) -> Runtime:
    runtime = Runtime(**kwargs)
    cpu = torch.device("cpu")
    runtime.use_device(
        DevicePlans(
            table_reader.edit, PLACES, runtime.shards, cpu, rows=128, plans=plans, nbytes=nbytes,
            d_model=D, carry_nbytes=CARRY, probe_nbytes=120 * 4 * PROBES,
        )
    )  # fmt: skip
    return runtime


def device_of(runtime: Runtime) -> DevicePlans:
    assert runtime.device is not None
    return runtime.device


def sites_of_passes(device: DevicePlans) -> list[frozenset[Site]]:
    """A list to which each later pass adds the sites that it edits."""
    seen: list[frozenset[Site]] = []
    plain = device.lay_out
    device.lay_out = lambda *given: (plain(*given), seen.append(device.sites))[0]  # type: ignore[method-assign,func-returns-value]
    return seen


def drop(runtime: Runtime, name: str) -> None:
    """Ends a request and gives its plan back."""
    resident = runtime.requests[name].resident
    assert resident is not None
    runtime.remove_request(name)
    runtime.plans.release([resident.plan.id], "http")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "MEASURE_EVERY", 1)
    return


@pytest.mark.parametrize("split", [False, True])
def test_a_mixed_batch_is_edited_as_on_the_host(split: bool) -> None:
    plans: dict[str, Plan | None] = {**{name: plan(name) for name in KINDS}, "plain": None}
    runtime = on_device()
    toy = Toy(runtime, split=split)
    for name, its_plan in plans.items():
        toy.add(name, its_plan, PROMPT)
    out = [toy.run(*(Piece(name, a, IDS[a:b]) for name in plans)) for a, b in ((0, 3), (3, P), (P, P + 1), (P + 1, 13))]
    for name, its_plan in plans.items():
        want = alone(its_plan, IDS[:13], P, [3], split=split)
        torch.testing.assert_close(torch.cat([o[name] for o in out]), want, atol=2e-5, rtol=1e-5)
    found = {s.request_id: s.resident.on_device for s in runtime.requests.values() if s.resident}
    assert {name for name, device in found.items() if not device} == ON_HOST


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - ON_HOST))
def test_edits_are_measured_as_on_the_host(kind: str) -> None:
    reports = []
    for runtime in (on_device(), Runtime()):
        toy = Toy(runtime)
        toy.add("r", plan(kind), PROMPT)
        toy.complete("r", IDS, P)
        reports.append(report(runtime, "r"))
    device, host = reports
    assert host["relative"]
    assert (device["edited"], device["gates"]) == (host["edited"], host["gates"])
    assert [[*r[:-2]] for r in device["relative"]] == [[*r[:-2]] for r in host["relative"]]
    for mine, theirs in zip(device["relative"], host["relative"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_where_graphs_are_replayed_results_and_reports_are_the_hosts() -> None:
    """Gates are decided, held for later places and told of by what is in the device's buffers alone."""
    runtime = on_device()
    toy = Toy(runtime, replays=True)
    for name in KINDS:
        toy.add(name, plan(name), PROMPT)
    replayed = set[str]()
    cuts = [0, 3, P, *range(P + 1, len(IDS) + 1)]
    out: dict[str, list[torch.Tensor]] = {name: [] for name in KINDS}
    for a, b in pairwise(cuts):
        for needs_host in (False, True):
            names = [name for name in KINDS if runtime.needs_host({name: a}, 100) is needs_host]
            if names:
                for name, x in toy.run(*(Piece(name, a, IDS[a:b]) for name in names)).items():
                    out[name].append(x)
            if not needs_host:
                replayed.update(names)
    assert replayed == KINDS.keys() - ON_HOST
    for name in KINDS:
        other = Toy(host := Runtime())
        other.add(name, plan(name), PROMPT)
        want = other.complete(name, IDS, P, [3])
        torch.testing.assert_close(torch.cat(out[name]), want, atol=2e-5, rtol=1e-5)
        mine, theirs = report(runtime, name), report(host, name)
        assert mine["error"] is None
        assert (mine["edited"], mine["gates"]) == (theirs["edited"], theirs["gates"]), name


READS = [
    {"vector": inline(noise(D, seed=40)), "layers": "all"},
    {"vector": inline(noise(D, seed=41)), "layers": [1, 3], "site": "resid_pre"},
]


@pytest.mark.parametrize("kind", ["words", "token-gate", "inject", "last-prompt", "nothing"])
def test_probes_are_read_where_graphs_are_replayed(kind: str) -> None:
    """Of every row, also of those that nothing edits; reports are whole when they are asked for."""
    told = []
    for runtime, replays in ((on_device(), True), (Runtime(), False)):
        toy = Toy(runtime, replays=replays)
        toy.add("r", plan_of(*KINDS.get(kind, ()), probes=READS), PROMPT)
        toy.add("beside", plan_of(add(1, 2), probes=READS[:1]), PROMPT)
        for a, b in pairwise([0, 3, P, *range(P + 1, len(IDS) + 1)]):
            toy.run(Piece("beside", a, IDS[a:b]), Piece("r", a, IDS[a:b]))
            assert not replays or runtime.needs_host({"r": b}, 2) is (kind == "last-prompt" and b < P)
        news = runtime.probe_rows({"r": {"r": [P, None]}})["r"]["r"]
        told.append((news, report(runtime, "r"), report(runtime, "beside")))
    (news, *mine), (wanted, *theirs) = told
    assert (news["positions"], news["columns"]) == (wanted["positions"], wanted["columns"])
    torch.testing.assert_close(torch.tensor(news["values"]), torch.tensor(wanted["values"]), atol=2e-5, rtol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        assert a["error"] is None
        assert a["edited"] == b["edited"]
        assert [row[:3] for row in a["probes"]] == [row[:3] for row in b["probes"]]
        for one, other in zip(a["probes"], b["probes"], strict=True):
            assert one[3:] == pytest.approx(other[3:], rel=1e-4, abs=1e-4)


def test_an_error_where_numbers_come_back_is_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes up in a later pass, which has nothing to do with it."""
    runtime = on_device()
    toy = Toy(runtime, replays=True)
    for name in ("token-gate", "add"):
        toy.add(name, plan(name), PROMPT)
    toy.add("probed", plan_of(probes=READS), PROMPT)
    for method in ("note_edits", "see_probes"):
        monkeypatch.setattr(runtime.requests["probed" if "probes" in method else "token-gate"], method, None)
    toy.run(*(Piece(name, 0, PROMPT) for name in ("token-gate", "add", "probed")))
    toy.run(Piece("add", P, IDS[P : P + 1]))
    assert "what its gates decided" in report(runtime, "token-gate")["error"]
    assert "what its probes read" in report(runtime, "probed")["error"]
    assert report(runtime, "add")["error"] is None


def test_probes_of_a_sampled_pass_are_in_the_statistics() -> None:
    counted = []
    for runtime in (on_device(), Runtime()):
        monitor = runtime.monitor = Monitor(LAYERS, every=2)
        toy = Toy(runtime, replays=runtime.device is not None)
        toy.add("r", plan_of(probes=READS), PROMPT)
        monitor.enter("r", P)
        toy.complete("r", IDS, P)
        report(runtime, "r")
        counted.append(monitor.drain("http", {})["probe_value"])
    assert [row[:3] for row in counted[0]] == [row[:3] for row in counted[1]]
    assert counted[0]


def test_what_probes_read_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = on_device()
    toy = Toy(runtime)
    toy.add("r", plan_of(probes=READS), PROMPT)
    assert [runtime.needs_host({"r": 0}, rows) for rows in (120, 121)] == [False, True]
    monkeypatch.setattr(device_module, "PROBES", LAYERS + 1)
    toy.add("many", plan_of(add(0, 1), probes=READS), PROMPT)
    assert runtime.needs_host({"many": 0}, 1)
    toy.add("whole", plan_of(add(0, 1)), PROMPT)
    runtime.requests["whole"].whole = True
    assert runtime.needs_host({"whole": 0}, 1), "its report tells how large every edit was"


def test_a_gate_lets_other_rows_be() -> None:
    """Whatever is decided for one row, others' bits are those of a batch without it."""
    runtime = on_device()
    toy = Toy(runtime, replays=True)
    others = ("gated-reads", "add", "reads")
    for name in ("token-gate", *others):
        toy.add(name, plan(name), PROMPT)
    beside = toy.run(*(Piece(name, 0, PROMPT) for name in ("token-gate", *others)))
    without = toy.run(*(Piece(name, 0, PROMPT) for name in others))
    for name in others:
        assert torch.equal(beside[name], without[name])


def test_token_gates_are_counted_when_the_device_has_told_of_them() -> None:
    counted = []
    for runtime, replays in ((on_device(), True), (Runtime(), False)):
        monitor = runtime.monitor = Monitor(LAYERS, every=1000)
        toy = Toy(runtime, replays=replays)
        toy.add("r", plan("token-gate"), PROMPT)
        monitor.enter("r", P)
        toy.complete("r", IDS, P)
        report(runtime, "r")
        counted.append(monitor.drain("http", {})["gates"])
    assert counted[0] == counted[1] == [["inline", len(IDS), sum(i > 6 for i in IDS)]]


def test_a_gate_that_was_not_decided_here_fails_its_request() -> None:
    runtime = on_device()
    toy = Toy(runtime)
    toy.add("r", plan("last-prompt"), PROMPT)
    toy.run(Piece("r", P, IDS[P : P + 1]))
    assert "which was not computed here" in report(runtime, "r")["error"]


def test_a_prompt_that_is_computed_again_is_the_hosts() -> None:
    """After a preemption: the gate has been decided, and holds where it did."""
    runtime = on_device()
    toy = Toy(runtime, replays=True)
    toy.add("r", plan("last-prompt"), PROMPT)
    first = toy.complete("r", IDS, P)
    again = toy.complete("r", IDS, len(IDS) - 1, [P - 2, P + 2])
    torch.testing.assert_close(again[: P - 1], first[: P - 1], atol=2e-5, rtol=1e-5)
    want = Toy(host := Runtime())
    want.add("r", plan("last-prompt"), PROMPT)
    want.complete("r", IDS, P)
    torch.testing.assert_close(again, want.complete("r", IDS, len(IDS) - 1, [P - 2, P + 2]), atol=2e-5, rtol=1e-5)
    assert report(runtime, "r")["edited"] == report(host, "r")["edited"]


def test_what_a_graph_replays_is_laid_out_before_and_not_touched_by_the_host() -> None:
    """A pass that replays graphs runs no Python of ours: all it reads are the entries."""
    runtime = on_device()
    toy = Toy(runtime)
    toy.add("a", plan_of(add(0, 1)), PROMPT)
    toy.add("b", plan_of(add(1, 2)), PROMPT)
    toy.run(Piece("a", 0, PROMPT[:2]), Piece("b", 0, PROMPT[:3]))
    device = device_of(runtime)
    first = device.entries[:6].tolist()
    assert first[0] == first[1] != first[2] == first[3] == first[4]
    assert first[5] == -1
    toy.run(Piece("b", 3, PROMPT[3:4]))
    assert device.entries[:5].tolist() == [first[2], -1, -1, -1, -1]  # what the last pass left is gone
    assert device.places == frozenset()


def test_while_a_graph_is_captured_every_place_of_its_sites_is_launched() -> None:
    runtime = on_device()
    launched: list[Place] = []
    device_of(runtime).edit = lambda place, x, residual, norm: launched.append(place)  # type: ignore[method-assign]
    x = torch.zeros(4, 8)
    posts = [place for place in PLACES if place.site is POST]
    for sites, want in ((set(), []), ({POST}, posts), ({PRE, POST, *BRANCHES}, PLACES)):
        launched.clear()
        with runtime.capturing(sites):
            for place in PLACES:
                if runtime.live and place in runtime.wanted:
                    runtime.apply(place, x)
        assert launched == want
    assert not runtime.live


def test_an_error_while_a_graph_is_captured_is_not_swallowed() -> None:
    runtime = on_device()

    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    device_of(runtime).edit = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no such kernel"), runtime.capturing({POST}):
        runtime.apply(Place(0, POST), torch.zeros(4, 8))


def test_only_plans_that_need_no_host_can_be_replayed() -> None:
    runtime = on_device()
    toy = Toy(runtime)
    for name in ("add", "hold", "token-gate", "last-prompt"):
        toy.add(name, plan(name), PROMPT)
    assert not runtime.needs_host({"add": 0, "token-gate": 3, "unknown": 0}, 9)
    assert runtime.needs_host({"add": 0, "hold": 3}, 9)
    assert runtime.needs_host({"last-prompt": P - 1}, 9), "its prompt decides"
    assert not runtime.needs_host({"last-prompt": P}, 9)
    assert Runtime().needs_host({}, 0) is False
    runtime.monitor = Monitor(LAYERS, every=3)
    for due in (False, False, True):
        assert runtime.needs_host({"add": 0}, 1) is due
        toy.run(Piece("add", 0, PROMPT[:1]))


def test_plans_make_room_for_each_other_least_recently_used_first() -> None:
    runtime = on_device(plans=2)  # entries for 4 plans of one set of interventions each
    toy = Toy(runtime)
    want = {f"r{i}": alone(plan_of(add(i, 1)), PROMPT, P) for i in range(7)}
    for i, (name, x) in enumerate(want.items()):
        toy.add(name, plan_of(add(i, 1)), PROMPT)
        torch.testing.assert_close(toy.run(Piece(name, 0, PROMPT))[name], x)
    assert len(device_of(runtime).tables) == 4
    together = toy.run(*(Piece(f"r{i}", 0, PROMPT) for i in (0, 3, 6)))
    for name, x in together.items():
        torch.testing.assert_close(x, want[name])


def test_plans_that_do_not_fit_beside_the_others_are_left_to_the_host() -> None:
    runtime = on_device(plans=1)  # entries for 2
    toy = Toy(runtime)
    plans = {f"r{i}": plan_of(add(i, 1)) for i in range(4)} | {"gated": plan("token-gate")}
    for name, its_plan in plans.items():
        toy.add(name, its_plan, PROMPT)
    for _ in range(2):
        out = toy.run(*(Piece(name, 0, PROMPT) for name in plans))
        assert len(device_of(runtime).tables) == 2
        for name, its_plan in plans.items():
            assert report(runtime, name)["error"] is None
            torch.testing.assert_close(out[name], alone(its_plan, PROMPT, P))


def test_in_a_graph_only_the_plans_that_do_not_fit_fail() -> None:
    runtime = on_device(plans=1)
    toy = Toy(runtime)
    for i in range(4):
        toy.add(f"r{i}", plan_of(add(i, 1)), PROMPT)
    batch = [Scheduled(f"r{i}", 0, 2 * i, 2) for i in range(4)]
    runtime.begin(batch, lambda row, n: np.array(PROMPT[:n]), replayed=True)
    entries = device_of(runtime).entries[:8].tolist()
    runtime.end()
    assert entries[0] == entries[1] != entries[2] == entries[3]
    assert entries[4:] == [-1] * 4
    assert [report(runtime, f"r{i}")["error"] is None for i in range(4)] == [True, True, False, False]
    assert "do not fit" in report(runtime, "r2")["error"]


def test_a_plan_that_is_dropped_gives_back_its_entries() -> None:
    runtime = on_device(limit=1)
    toy = Toy(runtime)
    for i in range(5):
        toy.add(f"r{i}", plan_of(add(i, 1)), PROMPT)
        toy.run(Piece(f"r{i}", 0, PROMPT))
        drop(runtime, f"r{i}")
    assert len(runtime.plans) == len(device_of(runtime).tables) == 1


def test_sites_of_a_pass_name_its_level() -> None:
    runtime = on_device()
    toy = Toy(runtime)
    seen = sites_of_passes(device_of(runtime))
    toy.add("post", plan_of(add(0, 1)), PROMPT)
    toy.add("pre", plan_of(add(0, 1, site="resid_pre")), PROMPT)
    toy.run(Piece("post", 0, PROMPT))
    toy.run(Piece("post", 0, PROMPT), Piece("pre", 0, PROMPT))
    assert seen == [{POST}, {PRE, POST}]


def test_entries_of_a_plan_that_is_gone_are_not_named_again() -> None:
    """Also by a pass in which nothing is edited on the device, which looks like the very first one."""
    runtime = on_device(limit=1)
    toy, device = Toy(runtime), device_of(runtime)
    toy.add("gone", plan_of(add(0, 1)), PROMPT)
    toy.run(Piece("gone", 0, PROMPT))
    drop(runtime, "gone")
    toy.add("later", plan_of(add(1, 1, tokens="generated")), PROMPT)
    sites = sites_of_passes(device)
    toy.run(Piece("later", 0, PROMPT))
    assert sites == [frozenset()]
    assert set(device.entries.tolist()) == {-1}


def test_what_a_batch_that_did_not_fit_left_is_not_edited() -> None:
    runtime = on_device(plans=1)
    toy = Toy(runtime)
    for i in range(3):
        toy.add(f"r{i}", plan_of(add(i, 1)), PROMPT)
    toy.add("gated", plan("token-gate"), PROMPT)
    toy.run(Piece("r0", 0, PROMPT))
    toy.run(*(Piece(f"r{i}", 0, PROMPT) for i in range(3)))
    out = toy.run(Piece("gated", 0, PROMPT))["gated"]
    torch.testing.assert_close(out, alone(plan("token-gate"), PROMPT, P))


def test_layers_of_other_pipeline_stages_are_left_to_them() -> None:
    its_plan = plan_of(add(0, "all"))
    runtime = Runtime()
    mine = [place for place in PLACES if place.layer < 2]
    cpu = torch.device("cpu")
    runtime.use_device(DevicePlans(table_reader.edit, mine, {}, cpu, rows=64, plans=4, nbytes=2**20))
    toy, other = Toy(runtime), Toy(Runtime())
    toy.add("r", its_plan, PROMPT)
    other.add("r", plan_of(add(0, [0, 1])), PROMPT)
    torch.testing.assert_close(toy.run(Piece("r", 0, PROMPT)), other.run(Piece("r", 0, PROMPT)))
    assert report(runtime, "r")["error"] is None


def test_pipeline_stages_agree_on_what_needs_the_host() -> None:
    """One has the layer that the plan reads a shard of, the other has another layer of that kind."""
    ablated = {"op": "ablate", "vector": inline(noise(WIDTHS[Site.MLP_POST])), "layers": 1, "site": "mlp_post"}
    its_plan = plan_of(ablated)
    taken = []
    for layer in (1, 2):
        place = Place(layer, Site.MLP_POST)
        shards = {place: Shard(0, WIDTHS[Site.MLP_POST] // 2, WIDTHS[Site.MLP_POST])}
        cpu = torch.device("cpu")
        device = DevicePlans(table_reader.edit, [place], shards, cpu, rows=8, plans=2, nbytes=2**16)
        taken.append(device.takes(Resident(its_plan, 1, shards)))
    assert taken == [False, False]


@pytest.mark.usefixtures("eager")
def test_graphs_can_be_captured_after_a_pass_that_was_measured() -> None:
    runtime = on_device()
    toy = Toy(runtime)
    toy.add("r", plan_of(add(0, 1)), PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    with runtime.capturing({POST}):
        runtime.apply(Place(0, POST), torch.zeros(4, 8))


def test_a_pass_that_needs_the_host_and_replays_a_graph_fails_its_requests() -> None:
    runtime = on_device()
    toy = Toy(runtime)
    names = ("add", "hold", "last-prompt")
    for name in names:
        toy.add(name, plan(name), PROMPT)
    batch = [Scheduled(name, 0, i * P, P) for i, name in enumerate(names)]
    runtime.begin(batch, lambda row, count: np.asarray(PROMPT[:count]), replayed=True)
    runtime.end()
    assert report(runtime, "add")["error"] is None
    for name in names[1:]:
        assert "needs the host" in report(runtime, name)["error"]


def test_a_rank_s_widest_rows_are_those_of_its_part() -> None:
    wide, stream = Place(0, Site.MLP_POST), Place(0, POST)
    widths = {place.site: {place.layer: width} for place, width in ((wide, 20), (stream, 8))}
    assert _widest(widths, {}) == 20
    assert _widest(widths, {wide: Shard(5, 10, 20)}) == 8
