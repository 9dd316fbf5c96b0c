"""The runtime by itself: which rows get which edits, whatever the batch looks like."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.kernels.cpu import Table
from steersman.server.engine import layout
from steersman.server.engine import runtime as module
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.server.engine.plans import KINDS, OPENS, SHUT, add, plan
from tests.server.engine.toy import POST, Piece, Toy, alone, args, report
from tests.steering.library import D, plan_of

PROMPT = [SHUT, 5, OPENS, 4, 1, 12, 2, 20]
LATE = 30  # opens the gate of "late-hold"
IDS = [*PROMPT, 6, 5, OPENS, 1, 2, LATE, 3, 11]
P = len(PROMPT)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


# -- isolation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_in_a_mixed_batch_every_row_has_the_bits_that_it_has_alone(dtype: torch.dtype, split: bool) -> None:
    plans: dict[str, Plan | None] = {name: plan(name) for name in KINDS}
    plans |= {"add again": plan("add"), "plain": None, "also plain": None}
    runtime = Runtime()
    toy = Toy(runtime, dtype, split)
    ids = {name: [*IDS[i % 5 :], *IDS[: i % 5]] for i, name in enumerate(plans)}
    cuts = {name: sorted({0, 1 + i % 6, P, *range(P, len(IDS) + 1)}) for i, name in enumerate(plans)}
    for name, its_plan in plans.items():
        toy.add(name, its_plan, ids[name][:P])
    out: dict[str, list[Tensor]] = {name: [] for name in plans}
    while any(len(c) > 1 for c in cuts.values()):
        pieces = [Piece(name, c[0], ids[name][c[0] : c[1]]) for name, c in cuts.items() if len(c) > 1]
        for name, x in toy.run(*pieces).items():
            out[name].append(x)
            cuts[name].pop(0)
    for i, (name, its_plan) in enumerate(plans.items()):
        want = alone(its_plan, ids[name], P, [1 + i % 6], dtype=dtype, split=split)
        assert torch.equal(bits(torch.cat(out[name])), bits(want)), name
    assert not any(report(runtime, name)["error"] for name, its_plan in plans.items() if its_plan)
    assert torch.equal(bits(torch.cat(out["plain"])), bits(alone(None, ids["plain"], P, dtype=dtype, split=split)))


def test_rows_that_no_intervention_selects_keep_their_bits() -> None:
    toy = Toy(Runtime(), torch.bfloat16, split=True)
    toy.add("r", plan_of(add(0, tokens={"positions": [2]}), add(1, tokens={"positions": [2]}, relative="norm")), PROMPT)
    steered, plain = toy.run(Piece("r", 0, PROMPT))["r"], alone(None, PROMPT, P, dtype=torch.bfloat16, split=True)
    same = (steered == plain).all(-1)
    assert same.tolist() == [p != 2 for p in range(P)]


def test_measuring_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    seldom = {kind: alone(plan(kind), IDS, P) for kind in KINDS}
    monkeypatch.setattr(module, "MEASURE_EVERY", 1)
    for kind, x in seldom.items():
        assert torch.equal(alone(plan(kind), IDS, P), x)


# -- what changes when a position is computed, and not what it is ----------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(chunks=st.lists(st.integers(1, P - 1), max_size=4))
def test_chunks_of_a_prompt_equal_one_pass(kind: str, chunks: list[int]) -> None:
    runtimes = []
    for cut in ([], chunks):
        toy = Toy(Runtime())
        toy.add("r", plan(kind), PROMPT)
        runtimes.append((toy.complete("r", IDS, P, cut), report(toy.runtime, "r")))
    (whole, one), (parts, other) = runtimes
    assert torch.equal(whole, parts)
    assert (one["edited"], one["gates"], one["error"]) == (other["edited"], other["gates"], None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 5, P, P + 3, len(IDS) - 1])
def test_a_preempted_request_begins_again(kind: str, stop: int) -> None:
    toy = Toy(Runtime())
    toy.add("r", plan(kind), PROMPT)
    want = alone(plan(kind), IDS, P)
    for a, b in pairwise([0, *range(4, stop, 2), stop]):
        toy.run(Piece("r", a, IDS[a:b]))
    again = [0, 3, stop, *range(stop + 1, len(IDS) + 1)]
    parts = [toy.run(Piece("r", a, IDS[a:b]))["r"] for a, b in pairwise(sorted(set(again)))]
    assert torch.equal(torch.cat(parts), want)
    straight = Toy(Runtime())
    straight.add("r", plan(kind), PROMPT)
    straight.complete("r", IDS, P)
    assert report(toy.runtime, "r")["edited"] == report(straight.runtime, "r")["edited"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(accepted=st.lists(st.integers(0, 3), min_size=8, max_size=8), wrong=st.sampled_from([OPENS, LATE, 1]))
def test_drafts_that_are_rejected_leave_no_trace(kind: str, accepted: list[int], wrong: int) -> None:
    toy = Toy(Runtime())
    toy.add("r", plan(kind), PROMPT)
    parts, at = [toy.run(Piece("r", 0, PROMPT))["r"]], P
    for good in accepted:
        if at >= len(IDS):
            break
        kept = IDS[at : at + 1 + good]
        fed = [*kept, *[wrong] * (4 - len(kept))]
        parts.append(toy.run(Piece("r", at, fed))["r"][: len(kept)])
        at += len(kept)
    parts += [toy.run(Piece("r", p, [IDS[p]]))["r"] for p in range(at, len(IDS))]
    straight = Toy(Runtime())
    straight.add("r", plan(kind), PROMPT)
    assert torch.equal(torch.cat(parts), straight.complete("r", IDS, P))
    if at < len(IDS):  # else the last pass ended in drafts that nothing says were rejected
        assert report(toy.runtime, "r")["edited"] == report(straight.runtime, "r")["edited"]


# -- errors ---------------------------------------------------------------------------------------------


def test_a_plan_that_is_not_there_is_the_requests_error() -> None:
    toy = Toy(Runtime())
    toy.runtime.add_request("r", args(plan("add"), PROMPT, "r"))
    assert torch.equal(toy.run(Piece("r", 0, PROMPT))["r"], alone(None, PROMPT, P))
    found = report(toy.runtime, "r")
    assert "not resident" in found["error"]
    assert found["edited"] == []
    toy.runtime.remove_request("r")


def test_what_goes_wrong_in_an_edit_is_the_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    elsewhere = plan_of(add(0, 0))
    toy = Toy(Runtime())
    for name, its_plan in (("one", plan("reads")), ("another", plan("reads")), ("elsewhere", elsewhere)):
        toy.add(name, its_plan, PROMPT)
    real = layout.Work.apply

    def breaks(work: layout.Work, *rest: Any) -> Any:
        return fail() if any(g.resident.plan.id != elsewhere.id for g in work.groups) else real(work, *rest)

    monkeypatch.setattr(layout.Work, "apply", breaks)
    out = toy.run(*(Piece(name, 0, PROMPT) for name in ("one", "elsewhere", "another", "plain")))
    assert torch.equal(out["plain"], alone(None, PROMPT, P))
    for name in ("one", "another"):
        assert "resid_post failed: out of luck" in report(toy.runtime, name)["error"]
    assert report(toy.runtime, "elsewhere")["error"] is None


def test_what_goes_wrong_in_a_pass_that_only_edits_is_the_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such passes, which measure and read nothing, run their tables at once."""
    toy = Toy(Runtime())
    toy.add("one", plan_of(add(0)), PROMPT)
    toy.add("elsewhere", plan_of(add(0, 0)), PROMPT)
    real, tables = Table.apply, list[int]()

    def breaks(table: Table, *rest: Any) -> None:
        tables.append(table.rows)
        if table.rows == 1:  # past layer 0
            raise RuntimeError("out of luck")
        real(table, *rest)

    for start in range(P, P + 3):
        if start == P + 2:
            assert not any(state.unmeasured for state in toy.runtime.requests.values())
            monkeypatch.setattr(Table, "apply", breaks)
            monkeypatch.setattr(layout.Work, "apply", None)
        toy.run(Piece("one", start, [5]), Piece("elsewhere", start, [6]))
    assert tables == [2, 1, 1, 1]
    assert report(toy.runtime, "one")["error"] == "editing layer 1 resid_post failed: out of luck"
    assert report(toy.runtime, "elsewhere")["error"] is None


def test_an_activation_of_an_impossible_shape() -> None:
    runtime = Runtime()
    Toy(runtime).add("r", plan("add"), PROMPT)
    runtime.begin([Scheduled("r", 0, 0, P)], lambda *_: torch.zeros(P).numpy())
    runtime.apply(Place(1, POST), torch.zeros(P, D + 1))
    runtime.apply(Place(1, POST), torch.zeros(D, P).T)
    runtime.end()
    assert "layer 1 resid_post failed" in report(runtime, "r")["error"]


def test_what_goes_wrong_before_the_pass_is_the_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(Runtime())
    toy.add("ids", plan("ids"), PROMPT)
    toy.add("r", plan("add"), PROMPT)

    def no_ids(row: int, count: int) -> Any:
        raise RuntimeError("no ids")

    toy.runtime.begin([Scheduled("ids", P, 0, 2), Scheduled("r", 0, 2, P)], no_ids)
    toy.runtime.end()
    assert "no ids" in report(toy.runtime, "ids")["error"]
    assert report(toy.runtime, "r")["error"] is None

    resident = toy.runtime.requests["r"].resident
    assert resident is not None
    monkeypatch.setattr(type(resident), "_compile", lambda *_: 1 / 0)
    resident._programs.clear()
    for _ in range(2):
        toy.run(Piece("new", 0, PROMPT), Piece("r", 0, PROMPT))
    assert "compiling its plan failed" in report(toy.runtime, "r")["error"]
    monkeypatch.undo()
    toy.add("later", plan("add"), PROMPT)
    out = toy.run(Piece("new", 0, PROMPT), Piece("later", 0, PROMPT))["later"]
    assert torch.equal(out, alone(plan("add"), PROMPT, P))
    assert report(toy.runtime, "later")["error"] is None


# -- the host's work ------------------------------------------------------------------------------------


def test_a_batch_that_has_not_changed_is_not_laid_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, calls = Toy(Runtime()), []
    real = Runtime._lay_out

    def counted(self: Runtime, key: Any) -> Any:
        calls.append(len(key))
        return real(self, key)

    monkeypatch.setattr(Runtime, "_lay_out", counted)
    for name in ("add", "norm", "hold"):
        toy.add(name, plan(name), PROMPT)
    toy.run(*(Piece(name, 0, PROMPT) for name in ("add", "plain", "norm", "hold")))
    for p in range(P, P + 40):
        toy.run(*(Piece(name, p, [5]) for name in ("add", "plain", "norm", "hold")))
    assert len(calls) == 2
    toy.runtime.remove_request("norm")
    toy.run(*(Piece(name, 60, [5]) for name in ("add", "plain", "hold")))
    assert len(calls) == 3


def test_an_old_layout_is_not_used_for_a_plan_that_was_loaded_again() -> None:
    gated = plan("token-gate")
    toy = Toy(Runtime(limit=1))
    toy.add("a", gated, PROMPT)
    toy.run(Piece("a", 0, PROMPT))
    toy.runtime.remove_request("a")
    toy.runtime.plans.release([gated.id], "http")
    toy.runtime.plans.add(plan("add").to_bytes(), "other")
    toy.runtime.plans.release([plan("add").id], "other")
    toy.add("b", gated, PROMPT)
    assert torch.equal(toy.run(Piece("b", 0, PROMPT))["b"], alone(gated, PROMPT, P))
    assert report(toy.runtime, "b")["edited"] == [3]
    toy.runtime.remove_request("b")
    toy.run(Piece("plain", 0, PROMPT))
    assert not toy.runtime._layouts  # nothing keeps a dropped plan in memory


def test_sizes_are_measured_first_and_then_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = layout.Work.apply
    monkeypatch.setattr(layout.Work, "apply", lambda *a: (calls.append(1) if a[4] else None, real(*a))[1])
    toy = Toy(Runtime())
    # One token for one intervention, none for another, a gate that never opens: none of them wants it for ever.
    toy.add("r", plan_of(add(0, 1), add(1, 2, tokens="last_prompt"), add(2, 2, tokens={"token_ids": [60]})), PROMPT)
    toy.complete("r", [*PROMPT, *[5] * 64], P)
    assert 2 <= len(calls) <= 8
    assert [i for i, *_ in report(toy.runtime, "r")["relative"]] == [0, 1]


def test_nothing_is_live_outside_of_a_pass_or_without_steering() -> None:
    toy = Toy(Runtime())
    toy.add("r", plan("hold"), PROMPT)
    runtime = toy.runtime
    runtime.begin([Scheduled("other", 0, 0, 4)], lambda *_: torch.zeros(4).numpy())
    assert not runtime.live
    runtime.begin([Scheduled("r", 0, 0, P)], lambda *_: torch.tensor(PROMPT).numpy())
    assert runtime.live
    assert Place(0, POST) in runtime.wanted
    assert Place(0, Site.RESID_MID) not in runtime.wanted
    runtime.end()
    assert not runtime.live
    x = torch.randn(P, D)
    kept = x.clone()
    runtime.apply(Place(1, POST), x)
    assert torch.equal(x, kept)


def test_a_piece_of_no_rows_is_left_out() -> None:
    toy = Toy(Runtime())
    toy.add("r", plan("add"), PROMPT)
    toy.run(Piece("r", 0, []), Piece("plain", 0, PROMPT))
    assert report(toy.runtime, "r")["error"] is None


# -- layouts that are kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_requests_like_the_last_ones_are_laid_out_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A robot's observations come as the same rows of the same plan, a prompt and then token by token."""
    runtime = Runtime()
    toy, laid_out, lay_out = Toy(runtime), [], runtime._lay_out
    monkeypatch.setattr(runtime, "_lay_out", lambda key: laid_out.append(key) or lay_out(key))
    for i, its_ids in enumerate((IDS, IDS, [*PROMPT, 1, 2, 3, 4, 5, 6, 7, 8])):
        toy.add(f"r{i}", plan(kind), PROMPT)
        out = toy.complete(f"r{i}", its_ids, P)
        assert torch.equal(bits(out), bits(alone(plan(kind), its_ids, P)))
        assert not report(runtime, f"r{i}")["error"]
        runtime.remove_request(f"r{i}")
        if i == 0:
            first = len(laid_out)
    assert 0 < first <= len(IDS)
    assert len(laid_out) == first


def test_nothing_is_kept_of_a_plan_that_is_given_up() -> None:
    runtime = Runtime(limit=1)
    toy = Toy(runtime)
    toy.add("r", plan("add"), PROMPT)
    toy.run(Piece("r", 0, PROMPT))
    gone = weakref.ref(runtime.requests["r"].resident)
    runtime.plans.release([plan("add").id], "http")
    runtime.remove_request("r")
    toy.add("next", plan("reads"), PROMPT)
    toy.run(Piece("next", 0, PROMPT))
    gc.collect()
    assert gone() is None
