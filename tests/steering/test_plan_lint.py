"""What is warned of in a plan: planted overlaps and sizes are found with their number, and sound plans pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.steering import plan_lint
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from tests.steering.library import LAYERS, D, inline, plan_of

E = torch.eye(D)
NORMS = {layer: 10.0 * (layer + 1) for layer in range(LAYERS)}


def add(v: Tensor, layers: Any = 1, **more: Any) -> dict[str, Any]:
    return {"op": "add", "vector": inline(v), "layers": layers, **more}


def at(cosine: float) -> Tensor:
    """A direction at this cosine to the first axis."""
    return cosine * E[0] + (1 - cosine**2) ** 0.5 * E[1]


def found(*interventions: dict[str, Any], norms: dict[int, float] | None = NORMS) -> list[tuple[str, float]]:
    return [(f.code, f.value) for f in plan_lint.lint(plan_of(*interventions), norms).findings]


@pytest.mark.parametrize("cosine", [0.9, -0.5, 0.31])
def test_an_overlap_is_told_with_its_cosine(cosine: float) -> None:
    [(code, value)] = found(add(3 * E[0]), add(at(cosine)))
    assert code == "overlap"
    assert value == pytest.approx(cosine, abs=1e-5)
    [finding] = plan_lint.lint(plan_of(add(3 * E[0]), add(at(cosine)))).findings
    assert "interventions[0] and steering.interventions[1]" in finding.message
    assert ("strengthen" if cosine > 0 else "weaken") in finding.message
    assert "layer 1 resid_post" in finding.message


def test_a_negative_scale_turns_an_add_around() -> None:
    for relative in ({}, {"relative": "norm"}):
        [(_, value)] = found(add(E[0], scale=-0.1, **relative), add(at(0.8), scale=0.1, **relative))
        assert value == pytest.approx(-0.8, abs=1e-5)


@pytest.mark.parametrize(
    "pair",
    [
        (add(E[0]), add(at(0.29))),
        (add(E[0]), add(E[0], layers=2)),
        (add(E[0]), add(E[0], site="resid_pre")),
        (add(E[0]),),
        ({"op": "neurons", "neurons": {"inline": [[1, 3]]}, "value": 1.0},
         {"op": "neurons", "neurons": {"inline": [[1, 4]]}, "value": 1.0}),
    ],
)  # fmt: skip
def test_what_does_not_overlap_is_not_told(pair: tuple[dict[str, Any], ...]) -> None:
    assert found(*pair) == []


def test_a_pair_is_told_once_where_it_is_worst() -> None:
    vectors = torch.stack([at(0.4), at(0.9), at(0.5)])
    many = {"op": "add", "vector": inline(vectors, [0, 1, 2]), "scale": 0.1}
    [finding] = plan_lint.lint(plan_of(add(E[0], [0, 1, 2]), many)).findings
    assert finding.value == pytest.approx(0.9, abs=1e-5)
    assert "layer 1" in finding.message


def test_subspaces_and_shared_units() -> None:
    """Of a subspace its nearest direction counts; the same neuron named twice is a cosine of 1."""
    plane = {"op": "ablate", "vector": inline(torch.stack([E[2], E[0]])[None], [1]), "layers": 1}
    [finding] = plan_lint.lint(plan_of(plane, add(at(0.6)))).findings
    assert abs(finding.value) == pytest.approx(0.6, abs=1e-5)
    assert "each changes what the other does" in finding.message
    same = [{"op": "neurons", "neurons": {"inline": [[1, 3], [1, n]]}, "value": 1.0} for n in (5, 6)]
    assert found(*same) == [("overlap", 1.0)]


def test_parts_of_one_intervention_are_for_different_tokens() -> None:
    plan = plan_of(add(E[0]), add(E[0]))
    assert len(plan_lint.lint(plan).findings) == 1
    one = replace(plan, steps=tuple(replace(step, path="steering.interventions[0]") for step in plan.steps))
    assert plan_lint.lint(one).findings == ()


# -- sizes --------------------------------------------------------------------------------------------


def test_an_add_is_judged_by_the_stream_there() -> None:
    assert found(add(E[0], scale=19.0)) == []
    [(code, value)] = found(add(E[0], scale=50.0))
    assert (code, value) == ("large_edit", pytest.approx(2.5))
    [(_, entering)] = found(add(E[0], scale=50.0, site="resid_pre"))  # it left layer 0
    assert entering == pytest.approx(5.0)
    [finding] = plan_lint.lint(plan_of(add(E[0], [1, 2], scale=50.0)), NORMS).findings
    assert "interventions[0] is 2.50 times as large as the stream at layer 1" in finding.message


def test_a_relative_edit_needs_no_norm() -> None:
    assert found(add(7 * E[0], scale=0.5, relative="norm"), norms=None) == []
    [(code, value)] = found(add(7 * E[0], scale=-2.0, relative="norm"), norms=None)
    assert (code, value) == ("large_edit", pytest.approx(2.0))


def test_what_cannot_be_judged_is_said() -> None:
    plan = plan_of(add(E[0], scale=1e5), add(E[1], scale=0.1, relative="norm"), {**add(E[2]), "op": "ablate"})
    assert plan_lint.lint(plan).unsized == (0,)
    assert plan_lint.lint(plan, {0: 10.0}).unsized == (0,)
    assert plan_lint.lint(plan, NORMS).unsized == ()
    assert plan_lint.lint(plan_of(add(E[0], 0, site="resid_pre")), NORMS).unsized == (0,)  # nothing left before it
    assert plan_lint.lint(plan_of(add(E[0], scale=1e5, preserve_norm=True))).unsized == ()
    assert found(add(E[0], scale=1e5, preserve_norm=True)) == []


def test_too_many_directions_are_not_compared_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_lint, "MAX_DIRECTIONS", 1)
    lint = plan_lint.lint(plan_of(add(E[0]), add(E[0])))
    assert (lint.findings, lint.crowded) == ((), (Place(1, Site.RESID_POST),))
