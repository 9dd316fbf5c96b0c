"""Conditions: the search against trying every bound, planted layers, and scores that no prompt has had a part in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.server.engine.requests import GateState
from steersman.steering.conditions import best_bound, cross_scores, directions, f1, fit, holds, scores
from steersman.steering.errors import InvalidRequest
from steersman.steering.plan import GateRead, Place
from steersman.steering.sites import Site
from tests.steering.library import noise

Values = st.lists(st.integers(-6, 6).map(lambda i: i / 4), min_size=2, max_size=9)


@settings(max_examples=150, deadline=None)
@given(positive=Values, negative=Values)
def test_no_bound_is_better(positive: list[float], negative: list[float]) -> None:
    if len({*positive, *negative}) == 1:
        with pytest.raises(InvalidRequest, match="same score"):
            best_bound(torch.tensor(positive), torch.tensor(negative))
        return
    found = best_bound(torch.tensor(positive), torch.tensor(negative))
    labels = [True] * len(positive) + [False] * len(negative)
    values = torch.tensor(positive + negative)
    assert f1(holds(found, values).tolist(), labels) == pytest.approx(found.f1)
    distinct = sorted({*positive, *negative})
    cuts = [(a + b) / 2 for a, b in pairwise(distinct)]
    best = max(
        f1([v > cut if above else v < cut for v in positive + negative], labels) for cut in cuts for above in (0, 1)
    )
    assert found.f1 == pytest.approx(best)
    assert min(abs(float(v) - found.threshold) for v in values) / float(values.double().std()) == pytest.approx(
        found.margin
    )


def test_the_side_and_the_widest_gap() -> None:
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 6.0])
    assert (best_bound(high, low).side, best_bound(high, low).threshold) == ("above", 3.5)
    assert (best_bound(low, high).side, best_bound(low, high).threshold) == ("below", 3.5)


def planted(n: int, layer: int, gap: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States [n, 4, 16] of two classes that differ by ``gap`` at one layer, around a common mean."""
    base = noise(4, 16, seed=90)
    positive, negative = noise(n, 4, 16, seed=seed) + base, noise(n, 4, 16, seed=seed + 1) + base
    positive[:, layer, 3] += gap
    return positive, negative


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_planted_condition_is_found_and_holds_on_others(layer: int) -> None:
    condition, bounds = fit(*planted(40, layer, 8.0))
    assert condition.layer == layer
    assert condition.bound is bounds[layer]
    assert float(condition.direction[3]) > 0.9
    assert float(condition.direction.norm()) == pytest.approx(1)
    unseen = planted(200, layer, 8.0, seed=5)
    decided = [holds(condition.bound, scores(s, condition.direction.expand(4, 16))[:, layer]) for s in unseen]
    assert f1(torch.cat(decided).tolist(), [True] * 200 + [False] * 200) > 0.95
    assert max(b.f1 for i, b in enumerate(bounds) if i != layer) < 0.8


def test_prompts_have_no_part_in_their_own_scores() -> None:
    """Where there is nothing to find, a direction of the same prompts finds it by noise, cross-scores do not."""
    positive, negative = noise(20, 1, 400, seed=1), noise(20, 1, 400, seed=2)
    made = directions(positive, negative)
    assert best_bound(scores(positive, made)[:, 0], scores(negative, made)[:, 0]).f1 == 1.0
    p, n = cross_scores(positive, negative)
    assert best_bound(p[:, 0], n[:, 0]).f1 < 0.8
    changed = positive.clone()
    changed[7] *= -1  # fold 2: the scores of the others in it stay, for their direction was made without it
    again, _ = cross_scores(changed, negative)
    assert torch.equal(again[2::5][:1], p[2::5][:1])
    assert not torch.equal(again[::5], p[::5])


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(InvalidRequest, match="needs 10 on either side"):
        fit(noise(9, 2, 8), noise(30, 2, 8))
    with pytest.raises(InvalidRequest, match="wanted"):
        fit(noise(30, 2, 8), noise(30, 3, 8))
    with pytest.raises(InvalidRequest, match="same mean"):
        fit(noise(30, 2, 8), noise(30, 2, 8))


@pytest.mark.parametrize("over", ["last_prompt", "prompt_mean"])
def test_the_gate_of_a_request_decides_as_the_fit_does(over: str) -> None:
    """A gate in the engine, given prompts token by token, against the bound on what a capture would have read."""
    prompts = [[noise(5 + i % 3, 16, seed=100 + 2 * i + side) for i in range(25)] for side in (0, 1)]
    for tokens in prompts[0]:
        tokens[:, 3] += 4.0

    def read(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.mean(0) if over == "prompt_mean" else tokens[-1]

    states = [torch.stack([read(t) for t in side])[:, None] for side in prompts]
    condition, _ = fit(*states)
    gate = condition.gate("v", 2, over)
    assert (gate["vector"], gate["layer"], gate["measure"], gate["over"]) == ("v", 2, "cosine", over)
    bounds = gate.get("above"), gate.get("below")
    for side, wanted in zip(prompts, states, strict=True):
        decided = holds(condition.bound, scores(wanted, condition.direction[None])[:, 0]).tolist()
        for tokens, expected in zip(side, decided, strict=True):
            place = Place(2, Site.RESID_POST)
            state = GateState(GateRead(place, condition.direction, "cosine", *bounds, over, False))
            for start in range(0, len(tokens), 2):
                part = tokens[start : start + 2]
                state.decide(part, start, len(tokens), torch.zeros(len(part)))
            assert state.open is expected
