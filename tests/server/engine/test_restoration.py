"""Restorations: stored rows at positions of their own, in a batch's chunks and on two ranks, by plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.server.engine.dosage import CAP, Dosage
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import make_args
from steersman.steering.plan import Place, Plan, Restoration, Step
from steersman.steering.spec import TokenSet
from steersman.steering.tokens import Prompt, Selection
from tests.server.engine.test_tensor_parallel import POST, PROMPT, N, Z, activations, in_two, passes, start
from tests.server.engine.toy import Piece, Toy, report
from tests.steering.library import WIDTHS, D, inline, noise, plan_of


def restoring(positions: list[int], place: Place = POST, among: Plan | None = None, **more: Any) -> Plan:
    """A plan that puts noise at ``positions``, after what ``among`` does."""
    base = among or plan_of()
    rows = noise(len(positions), WIDTHS[place.site], seed=30)
    step = Step("patch", (place.layer,), place.site, TokenSet(positions=positions), path="x")
    one = Restoration(len(base.steps), place, tuple(positions), rows, **more)
    return replace(base, steps=(*base.steps, step), restorations=(one,))


def rows_of(plan: Plan) -> Tensor:
    return plan.restorations[0].rows


def test_a_plan_travels_whole() -> None:
    plan = restoring([3, -1], basis=noise(2, D, seed=3), preserve_norm=True, gate=-1)
    again = Plan.from_bytes(plan.to_bytes())
    assert again.id == plan.id != restoring([3, -1]).id
    (a,), (b,) = plan.restorations, again.restorations
    assert (a.intervention, a.place, a.positions, a.preserve_norm, a.gate) == (
        b.intervention, b.place, b.positions, b.preserve_norm, b.gate,
    )  # fmt: skip
    assert a.basis is not None
    assert b.basis is not None
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.basis, b.basis)
    assert plan.nbytes >= rows_of(plan).nbytes + a.basis.nbytes
    assert POST in plan.edited


@pytest.mark.parametrize(("positions", "decides"), [([0, 3], False), ([0, -1], True)])
def test_where_the_prompt_ends_matters_to_the_cache_where_it_matters_to_the_rows(
    positions: list[int], decides: bool
) -> None:
    plan = restoring(positions)
    args = make_args(plan, Selection.build(plan.selectors, Prompt([1, 2, 3, 4]), ["x"]), "k")
    assert args["decides"] == decides


@pytest.mark.parametrize("place", [POST, Z])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("with_basis", [False, True])
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_rows_at_their_positions(place: Place, ranks: int, with_basis: bool, preserve_norm: bool) -> None:
    """In a prompt of four in two chunks; a position beyond it is one that is generated."""
    basis = torch.linalg.qr(noise(2, WIDTHS[place.site], seed=31).T).Q.T.contiguous() if with_basis else None
    positions = [2, 5, 0, -1]
    plan = restoring(positions, place, basis=basis, preserve_norm=preserve_norm)
    x = activations(place, seed=4)
    wanted = x.clone().double()
    for row, at in zip(rows_of(plan).double(), [2, 5, 0, PROMPT - 1], strict=True):
        old = x[at].double()
        new = row if basis is None else old + (row - old) @ basis.double().T @ basis.double()
        wanted[at] = new * (old.norm() / new.norm()) if preserve_norm else new
    if ranks == 1:
        runtime = start(Runtime(), plan)
        found = passes(runtime, plan, {place: x})[place]
        told = report(runtime, "r")
    else:
        parts, reports, sums = in_two(plan, {place: x})
        found = torch.cat([part[place] for part in parts], 1) if place == Z else parts[0][place]
        told = reports[0]
        assert sums.sums[0] == sums.sums[1]
    assert told["error"] is None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[[1, 4]], x[[1, 4]])
    assert told["edited"] == [4]


def test_the_same_rows_of_the_batch_at_other_positions_in_the_next_pass() -> None:
    """The layout of two passes is one and the same; what is put there is not."""
    plan = restoring([0, 1, 2, 3])
    x = activations(POST, seed=5)
    runtime = start(Runtime(), plan)
    for at in range(PROMPT):
        runtime.begin([Scheduled("r", at, 0, 1)], lambda row, count: torch.zeros(count).numpy())
        one = x[at : at + 1].clone()
        runtime.apply(POST, one)
        runtime.end()
        torch.testing.assert_close(one[0], rows_of(plan)[at])


def test_prompts_of_other_lengths_beside_each_other() -> None:
    """Two requests of one plan, whose last tokens get the same row, and one that is not steered."""
    plan = restoring([-1, 0])
    toy = Toy(Runtime())
    ids = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8], "none": [9, 10]}
    toy.add("a", plan, ids["a"])
    toy.add("b", plan, ids["b"], key="b")
    place, seen = POST, {}
    apply = toy.runtime.apply

    def noting(at: Place, x: Tensor, residual: Tensor | None = None) -> None:
        apply(at, x, residual)
        if at == place:
            seen["x"] = x.clone()

    toy.runtime.apply = noting  # type: ignore[method-assign]
    out = toy.run(*(Piece(name, 0, ids[name]) for name in ids))
    last, first = rows_of(plan)
    for at, row in ((0, first), (2, last), (3, first), (7, last)):
        torch.testing.assert_close(seen["x"][at], row)
    alone = Toy(Runtime()).run(Piece("none", 0, ids["none"]))["none"]
    assert torch.equal(out["none"], alone)


def test_a_cap_holds_for_it_too() -> None:
    plan = restoring([0, 1, 2, 3])
    runtime = Runtime()
    runtime.dosage = Dosage(0.1, CAP)
    x = activations(POST, seed=6)
    found = passes(start(runtime, plan), plan, {POST: x})[POST]
    sizes = (found - x).norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(sizes[:PROMPT], torch.full((PROMPT,), 0.1))
    assert torch.equal(found[PROMPT:], x[PROMPT:])
    assert len(x) == N


def test_with_what_stands_before_it() -> None:
    edit = {"op": "add", "vector": inline(torch.ones(D)), "layers": [POST.layer], "site": POST.site.value}
    plan = restoring([1], among=plan_of(edit), basis=torch.eye(D)[:1])
    x = activations(POST, seed=7)
    found = passes(start(Runtime(), plan), plan, {POST: x})[POST]
    wanted = x + 1
    wanted[1, 0] = rows_of(plan)[0, 0]
    torch.testing.assert_close(found, wanted)
