"""One request's gates and reports, pass by pass."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steersman.server.engine.requests import ATTEMPTS, GateState, RequestState, open_request
from steersman.server.engine.resident import Resident
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import KEY, args_of, make_args
from steersman.steering.plan import Activation, GateRead, Place
from steersman.steering.sites import Site
from tests.server.engine.plans import OPENS, SHUT, add, gate, plan, sideways
from tests.server.engine.toy import FACTORS, POST, PRE, SHIFTS, Piece, Toy, alone, args, report
from tests.steering.library import LAYERS, D, inline, noise, plan_of

PROMPT = [SHUT, 5, OPENS, 4, 1, 12, 2, 20]
P = len(PROMPT)


def moved(its_plan: Any, ids: list[int], chunks: list[int] | None = None) -> list[int]:
    """The positions whose final stream differs from that of nobody's steering."""
    steered, plain = (alone(p, ids, P, chunks or []) for p in (its_plan, None))
    return [p for p in range(len(ids)) if not torch.equal(steered[p], plain[p])]


# -- which tokens a gate lets through -------------------------------------------------------------------


def test_a_token_gate_opens_for_its_token_alone() -> None:
    ids = [*PROMPT, 1, OPENS, 1]
    assert moved(plan_of(add(0, [1, 3], when=gate())), ids) == [2, 5, 7, 9]
    assert moved(plan_of(add(0, [1, 3], when=gate(below=10.0))), ids) == [2, 9]


def test_a_held_gate_stays_open() -> None:
    ids = [*[1] * P, 1, 1, OPENS, 1, 1]
    held = plan_of(add(0, [1, 3], when=gate(hold=True)))
    assert moved(held, ids) == [10, 11, 12]
    assert moved(held, [*PROMPT, 1]) == [2, 3, 4, 5, 6, 7, 8]
    assert moved(held, [*[1] * P, 1]) == []


@pytest.mark.parametrize(("over", "layer"), [("prompt_mean", 1), ("last_prompt", 1)])
def test_a_gate_that_decides_once_opens_from_the_prompts_last_token_on(over: str, layer: int) -> None:
    ids = [*PROMPT, 1, 1]
    assert moved(plan_of(add(0, 3, when=gate(over, layer))), ids) == [7, 8, 9]
    assert moved(plan_of(add(0, 3, when=gate(over, layer, above=40.0))), ids) == []
    short = [*[1] * P, OPENS, 1]
    assert moved(plan_of(add(0, 3, when=gate(over, layer))), short) == []


@pytest.mark.parametrize("place", [(2, "resid_pre"), (2, "resid_post"), (1, "resid_post")])
def test_it_acts_on_that_token_only_at_later_places(place: tuple[int, str]) -> None:
    """An edit at the gate's own place, or before it, was due before the gate could be read."""
    its_plan = plan_of(add(0, place[0], site=place[1], when=gate("last_prompt", 2, site="resid_post")))
    assert moved(its_plan, [*PROMPT, 1, 1]) == [8, 9]
    toy = Toy(Runtime())
    toy.add("r", its_plan, PROMPT)
    toy.complete("r", [*PROMPT, 1, 1], P, [3])
    assert report(toy.runtime, "r")["edited"] == [2]


@pytest.mark.parametrize("over", ["last_prompt", "prompt_mean"])
def test_a_gate_is_read_before_its_places_own_edits(over: str) -> None:
    """Read afterwards, the edit would have closed it, or opened it."""
    away = {"op": "add", "vector": inline(torch.eye(D)[0]), "layers": 1}
    for scale, want in ((-100, [7, 8]), (100, [])):
        prompt = PROMPT if scale < 0 else [1] * P
        one = plan_of({**away, "scale": scale, "tokens": "prompt"}, add(0, 3, when=gate(over, 1)))
        other = plan_of({**away, "scale": scale, "tokens": "prompt"})
        a, b = (alone(p, [*prompt, 1], P) for p in (one, other))
        assert [p for p in range(P + 1) if not torch.equal(a[p], b[p])] == want


def test_a_token_gate_at_one_place_and_edits_at_several() -> None:
    """Between the sites of one layer the order is that of the pass."""
    its_plan = plan_of(add(0, 1, site="resid_post", when=gate(layer=1, site="resid_pre")))
    assert moved(its_plan, [*PROMPT, 1]) == [2, 5, 7]


def test_cosine_and_bounds() -> None:
    def state(**bounds: Any) -> GateState:
        base = {"measure": "cosine", "above": None, "below": None, "over": "token", "hold": False, **bounds}
        return GateState(GateRead(Place(0, POST), torch.eye(4)[0], **base))

    x = torch.tensor([[3.0, 4, 0, 0], [0.6, 0, 0, 0], [0, 0, 0, 0], [-1, 0, 0, 0]])  # cosines .6, 1, 0, -1
    for bounds, want in (
        ({"above": 0.5}, [1, 1, 0, 0]),
        ({"below": 0.7}, [1, 0, 1, 1]),
        ({"above": 0.5, "below": 0.7}, [1, 0, 0, 0]),
        ({"above": 2.0, "measure": "projection"}, [1, 0, 0, 0]),
    ):
        values = torch.full((4,), 9.0)
        state(**bounds).decide(x, 0, 4, values)
        assert values.tolist() == want


def test_a_gate_on_a_feature_reads_its_activation() -> None:
    """p = 2·x0 − 1, active above 3: inactive tokens count as 0, however close they came."""
    x = torch.tensor([[1.9, 0, 0, 0], [2.1, 0, 0, 0], [9.0, 0, 0, 0], [-9.0, 0, 0, 0]])
    direction, activation = 2 * torch.eye(4)[0], Activation(-1.0, 3.0)
    for bounds, want in (((0.0, None), [0, 1, 1, 0]), ((4.0, None), [0, 0, 1, 0]), ((None, 1.0), [1, 0, 0, 1])):
        read = GateRead(Place(0, POST), direction, "feature", *bounds, "token", False, activation)
        values = torch.full((4,), 9.0)
        GateState(read).decide(x, 0, 4, values)
        assert values.tolist() == want


def test_the_mean_of_a_prompt_is_that_of_its_tokens_however_it_is_cut() -> None:
    x = (noise(50, D) * 1000).round()
    x[:25] += 1e7  # float32 could not hold the sum of these
    x[25:] -= 1e7
    want = float(x[:, 0].double().mean())
    read = GateRead(Place(0, POST), torch.eye(D)[0], "projection", want - 0.01, want + 0.01, "prompt_mean", False)
    once = [(0, 50)], [(i, i + 1) for i in range(50)], [(0, 49), (49, 50)]
    again = [(0, 20), (0, 20), (20, 50)], [(0, 30), (10, 25), (25, 50)], [(0, 49), (0, 50)]
    for pieces in (*once, *again):
        state = GateState(read)
        for a, b in pieces:
            assert state.open is None
            state.decide(x[a:b], a, 50, torch.zeros(b - a))
        assert state.open is True


# -- gates that lack what they need ----------------------------------------------------------------------


def decided(over: str, start: int, hold: bool = False) -> str | None:
    toy = Toy(Runtime())
    toy.add("r", plan_of(add(0, 3, when=gate(over, hold=hold))), PROMPT)
    toy.run(Piece("r", start, [*PROMPT, 1, 1][start:]))
    error: str | None = report(toy.runtime, "r")["error"]
    return error


def test_a_gate_says_so_when_positions_it_needs_were_not_computed() -> None:
    assert "needs positions 0 to 3" in (decided("prompt_mean", 4) or "")
    assert "needs positions 0 to 3" in (decided("token", 4, hold=True) or "")
    assert "last token" in (decided("last_prompt", P) or "")
    assert decided("last_prompt", P - 1) is None
    assert decided("token", 4) is None


def test_a_resumed_request_may_find_its_own_positions_in_the_cache() -> None:
    for over, more in (("prompt_mean", {}), ("token", {"hold": True}), ("last_prompt", {})):
        toy = Toy(Runtime())
        its_plan = plan_of(add(0, 3, when=gate(over, **more)))
        toy.add("r", its_plan, PROMPT)
        ids = [*PROMPT, 1, 1]
        toy.run(Piece("r", 0, ids[:6]))
        parts = [toy.run(Piece("r", a, ids[a:b]))["r"] for a, b in ((4, 7), (7, 9), (5, 10))]
        assert torch.equal(parts[-1], alone(its_plan, ids, P)[5:])
        assert report(toy.runtime, "r")["error"] is None


# -- reports --------------------------------------------------------------------------------------------


def test_edited_positions_are_counted_once() -> None:
    toy = Toy(Runtime())
    toy.add("r", plan("words"), PROMPT)
    ids = [*PROMPT, 1, 2, 3]
    toy.run(Piece("r", 0, ids[:5]))
    toy.run(Piece("r", 0, ids[:5]))  # computed again
    toy.run(Piece("r", 5, ids[5:P]))
    toy.run(Piece("r", P, [9, 9, 9]))  # three drafts, one accepted
    toy.run(Piece("r", P + 1, ids[P + 1 :]))
    assert report(toy.runtime, "r")["edited"] == [8, 3, 1, 5, 10]
    assert report(toy.runtime, "r")["cached"] == [0] * 5


def test_a_draft_that_was_rejected_is_not_counted() -> None:
    toy = Toy(Runtime())
    toy.add("r", plan_of(add(0, 1, tokens={"token_ids": [OPENS]}), add(1, 1, when=gate())), PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    toy.run(Piece("r", P, [1, OPENS, OPENS]))
    assert report(toy.runtime, "r")["edited"] == [3, 5]
    toy.run(Piece("r", P + 1, [1]))
    assert report(toy.runtime, "r")["edited"] == [1, 3]


def test_positions_from_the_cache_are_counted_apart() -> None:
    toy = Toy(Runtime())
    toy.add("r", plan("words"), PROMPT)
    toy.run(Piece("r", 4, PROMPT[4:]))
    toy.run(Piece("r", P, [1]))
    found = report(toy.runtime, "r")
    assert found["cached"] == [4, 0, 0, 0, 4]
    assert found["edited"] == [4, 1, 1, 3, 4]
    toy.run(Piece("r", 0, [*PROMPT, 1]))  # preempted, and the cache was lost
    again = report(toy.runtime, "r")
    assert (again["cached"], again["edited"]) == (found["cached"], found["edited"])


def test_relative_sizes_are_those_that_numpy_finds() -> None:
    scale = 3.0
    v = noise(D, seed=50).numpy()
    its_plan = plan_of(
        {"op": "add", "vector": inline(torch.from_numpy(v)), "layers": 1, "scale": scale, "site": "resid_pre"},
        {"op": "ablate", "vector": sideways(51), "layers": 0, "site": "resid_pre", "when": gate("last_prompt", 0)},
    )
    toy = Toy(Runtime())
    toy.add("r", its_plan, PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    stream = alone(None, PROMPT, P)
    for layer in range(LAYERS - 1, 0, -1):  # the toy's layers backwards
        stream = stream.clone()
        stream[:, 0] *= 0.75
        stream = (stream - SHIFTS[layer]) / 0.75 / (1 + FACTORS[layer]).prod(0)
    size = np.linalg.norm(stream.numpy(), axis=1)
    want = (scale * np.linalg.norm(v) / size).sum()
    (entry,) = [r for r in report(toy.runtime, "r")["relative"] if r[0] == 0]
    assert entry[1:] == [1, pytest.approx(want, rel=1e-4), P]
    assert not [r for r in report(toy.runtime, "r")["relative"] if r[0] == 1]  # the gate comes after the edit


def test_probes_read_after_the_edits_of_their_place() -> None:
    axis = inline(torch.eye(D)[0])
    its_plan = plan_of(
        {"op": "clamp", "vector": axis, "value": 5, "layers": 1, "tokens": "prompt"},
        probes=[{"vector": axis, "layers": [0, 1]}, {"vector": axis, "layers": 2, "site": "resid_pre"}],
    )
    toy = Toy(Runtime())
    toy.add("r", its_plan, PROMPT)
    toy.run(Piece("r", 0, PROMPT[:3]))
    toy.run(Piece("r", 0, PROMPT))
    toy.run(Piece("r", P, [30]))
    found = {(p, layer): rest for p, layer, *rest in report(toy.runtime, "r")["probes"]}
    assert set(found) == {(0, 0), (0, 1), (1, 2)}
    assert found[0, 0] == pytest.approx([9, sum(PROMPT) + 30, 1, 30, 30], rel=1e-5)
    assert found[0, 1] == pytest.approx([9, 5 * P + 30, 5, 30, 30], rel=1e-5)
    assert found[1, 2] == pytest.approx(found[0, 1], rel=1e-5)


def test_a_probe_alone_edits_nothing() -> None:
    its_plan = plan_of(probes=[{"vector": sideways(0), "layers": "all"}])
    assert moved(its_plan, [*PROMPT, 1]) == []


@pytest.mark.parametrize("ends", [True, False])
def test_what_was_run_past_the_responses_end_is_not_reported(ends: bool) -> None:
    toy, axis = Toy(Runtime()), inline(torch.eye(D)[0])
    toy.add("r", plan_of(add(0, 1, tokens="generated"), probes=[{"vector": axis, "layers": [0]}]), PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    for i, token in enumerate((10, 20, 30)):
        toy.run(Piece("r", P + i, [token]))
    if ends:
        toy.runtime.remove_request("r")
    (found,) = toy.runtime.reports({"r": {"r": P + 1}})["r"]
    assert found["edited"] == [1]
    assert found["probes"][0][2:] == pytest.approx([P + 1, sum(PROMPT) + 10, 1, max(PROMPT), 10], rel=1e-5)


def test_every_token_is_told_of_where_that_was_asked() -> None:
    axis = inline(torch.eye(D)[0])
    its_plan = plan_of(
        {"op": "add", "vector": axis, "layers": [1, 2], "tokens": {"positions": [1]}, "relative": "norm", "scale": 0.5},
        {"op": "clamp", "vector": axis, "value": 5, "layers": 1, "tokens": "generated", "when": gate("last_prompt")},
        probes=[{"vector": axis, "layers": [0, 1]}],
    )
    toy = Toy(Runtime())
    toy.runtime.plans.add(its_plan.to_bytes(), "http")
    toy.runtime.add_request("r", {**args(its_plan, PROMPT, "r"), "whole": True})
    toy.run(Piece("r", 3, PROMPT[3:]))  # what comes before was in the prefix cache
    toy.run(Piece("r", P, [6, 6]))  # the second is a draft, and rejected
    toy.run(Piece("r", P + 1, [OPENS]))
    (told,) = report(toy.runtime, "r")["tokens"]
    assert told["probes"]["positions"] == told["edits"]["positions"] == [*range(3, P + 2)]
    assert told["probes"]["columns"] == [[0, 0], [0, 1]]
    read = np.array(told["probes"]["values"])
    assert read[:, 0] == pytest.approx([*PROMPT[3:], 6, OPENS], rel=1e-5)
    assert read[:, 1] == pytest.approx([*PROMPT[3:], 5, 5], rel=1e-5)
    assert told["edits"]["columns"] == [[0, 1, "resid_post"], [0, 2, "resid_post"], [1, 1, "resid_post"]]
    done = told["edits"]["values"]
    assert [row[:2] for row in done] == [[None, None]] * (P - 1)  # position 1 was edited by whoever cached it
    assert [row[2] is None for row in done] == [True] * (P - 3) + [False] * 2
    (again,) = toy.runtime.reports({"r": {"r": P}})["r"][0]["tokens"]
    assert again["edits"]["positions"] == [*range(3, P)]


def test_sizes_token_by_token_are_those_of_the_formula() -> None:
    its_plan = plan_of(add(0, [1, 2], relative="norm", scale=0.25), add(1, 2, relative="norm", scale=0.5))
    toy = Toy(Runtime())
    toy.runtime.plans.add(its_plan.to_bytes(), "http")
    for name in "ab":
        toy.runtime.add_request(name, {**args(its_plan, PROMPT, name), "whole": name == "b"})
    toy.run(Piece("a", 0, PROMPT), Piece("plain", 0, PROMPT), Piece("b", 0, PROMPT))
    toy.complete("b", [*PROMPT, *[1] * 40], P)
    (told,) = report(toy.runtime, "b")["tokens"]
    assert told["edits"]["positions"] == [*range(P + 40)]
    assert [row[:2] for row in told["edits"]["values"]] == [pytest.approx([0.25, 0.25], rel=1e-4)] * (P + 40)
    assert report(toy.runtime, "a")["tokens"] == []


def test_reports_go_by_key_and_finished_ones_are_given_once() -> None:
    toy = Toy(Runtime())
    for name in ("a-0", "a-1"):
        toy.add(name, plan("add"), PROMPT, key="a")
    toy.add("b", plan("add"), PROMPT)
    toy.run(*(Piece(name, 0, PROMPT) for name in ("a-0", "a-1", "b")))
    toy.runtime.remove_request("a-1")
    assert [r["request"] for r in toy.runtime.reports(["a", "c"])["a"]] == ["a-1", "a-0"]
    assert [r["request"] for r in toy.runtime.reports(["a"])["a"]] == ["a-0"]
    assert toy.runtime.reports(["c"]) == {"c": []}
    toy.runtime.remove_request("nobody")


def test_reports_that_nobody_asks_for_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.server.engine.runtime.KEPT_REPORTS", 2)
    runtime = Runtime()
    for name in "abc":
        Toy(runtime).add(name, plan("add"), PROMPT)
        runtime.remove_request(name)
    assert [bool(v) for v in runtime.reports("abc").values()] == [False, True, True]


def test_a_request_is_added_once_and_holds_its_plan() -> None:
    toy, its_plan = Toy(Runtime()), plan("add")
    toy.add("r", its_plan, PROMPT)
    state = toy.runtime.requests["r"]
    toy.runtime.add_request("r", args(its_plan, PROMPT, "other"))
    assert toy.runtime.requests["r"] is state
    resident = state.resident
    assert resident is not None
    assert resident.users == 1
    toy.runtime.remove_request("r")
    toy.runtime.remove_request("r")
    assert resident.users == 0


def test_a_state_of_64_interventions() -> None:
    its_plan = plan_of(*[add(i, 1, tokens="last_prompt" if i == 63 else "all") for i in range(64)])
    toy = Toy(Runtime())
    toy.add("r", its_plan, PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    assert report(toy.runtime, "r")["edited"] == [8] * 63 + [1]
    state = toy.runtime.requests["r"]
    for _ in range(ATTEMPTS):
        state.attempted(np.array([2**64 - 1], dtype=np.uint64))
    assert state.unmeasured == 0


def test_what_travels_with_a_request() -> None:
    class Params:
        extra_args: Any = None

    assert args_of(Params()) is None
    assert args_of(object()) is None
    its_plan = plan("prompt-mean", probes=[{"vector": sideways(0), "layers": 0}])
    sent = args(its_plan, PROMPT, "key")
    Params.extra_args = {KEY: sent, "other": 1}
    assert args_of(Params()) is sent
    assert (sent["plan"], sent["edits"], sent["decides"]) == (its_plan.id, its_plan.edits_id, True)
    assert sent["plan"] != sent["edits"]
    assert not args(plan("hold"), PROMPT, "key")["decides"]
    state = open_request("r", sent, Resident(its_plan, 1, {}))
    assert (state.key, state.request_id, state.selection.to_json()) == ("key", "r", sent["selection"])
    assert isinstance(state, RequestState)
    assert make_args(its_plan, state.selection, "key") == sent


def test_sites_have_an_order() -> None:
    assert Place(1, PRE).order < Place(1, Site.ATTN_Z).order < Place(1, POST).order < Place(2, PRE).order
    assert isinstance(noise(1), Tensor)
