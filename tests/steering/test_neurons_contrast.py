"""Effect sizes against numpy's plain formula, chance by simulation, control sets by their definition."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from steersman.steering.errors import InvalidRequest, NonFinite
from steersman.steering.neurons_contrast import Contrast, chance, contrast, control_sets, strongest
from tests.steering.library import noise


def test_d_prime_is_its_formula() -> None:
    positive, negative = noise(7, 30) * 2 + 1, noise(4, 30, seed=1)
    p, n = positive.double().numpy(), negative.double().numpy()
    found = contrast(positive, negative)
    np.testing.assert_allclose(found.difference, p.mean(0) - n.mean(0), rtol=1e-5)
    pooled = np.sqrt((p.var(0, ddof=1) + n.var(0, ddof=1)) / 2)
    np.testing.assert_allclose(found.effect, (p.mean(0) - n.mean(0)) / pooled, rtol=1e-5)
    turned = contrast(negative, positive)
    assert torch.equal(turned.effect, -found.effect)
    scaled = contrast(positive * 1000, negative * 1000)
    torch.testing.assert_close(scaled.effect, found.effect)


def test_neurons_that_do_not_vary() -> None:
    """The first differs and does not vary: its effect is large but finite. The second is the same everywhere."""
    positive = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 1.0]])
    negative = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 2.0]])
    effect = contrast(positive, negative).effect
    assert torch.isfinite(effect).all()
    assert effect[0] > 1e4
    assert effect[1] == 0
    assert contrast(torch.zeros(2, 3), torch.zeros(2, 3)).effect.tolist() == [0, 0, 0]


def test_sides_that_cannot_be_compared() -> None:
    good = noise(3, 5)
    for positive, negative, side in (
        (good[:1], good, "positive"),
        (good, good[:1], "negative"),
        (good, noise(3, 6), "negative"),
        (good[0], good, "positive"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            contrast(positive, negative)
        assert raised.value.param == side
    with pytest.raises(NonFinite):
        contrast(good, good / 0)


def test_chance_is_what_the_largest_reaches_when_nothing_differs() -> None:
    """Data without a difference exceed it in about 5 % of trials, and a planted neuron does so surely."""
    exceeded = 0
    for trial in range(60):
        rows = {layer: noise(20, 40, seed=100 * trial + layer) for layer in (0, 1)}
        sides = {k: v[:10] for k, v in rows.items()}, {k: v[10:] for k, v in rows.items()}
        level = chance(*sides, rounds=60, seed=trial)
        largest = max(float(contrast(sides[0][k], sides[1][k]).effect.abs().max()) for k in rows)
        exceeded += largest > level
    assert exceeded <= 9  # 60 trials of 0.05 give more in less than one run in a thousand
    rows = {0: noise(20, 40)}
    rows[0][:10, 17] += 6
    level = chance({0: rows[0][:10]}, {0: rows[0][10:]})
    effect = contrast(rows[0][:10], rows[0][10:]).effect
    assert (effect.abs() > level).nonzero().flatten().tolist() == [17]


def test_chance_deals_whole_examples_to_sides_of_the_same_sizes() -> None:
    """Of two examples against three there are ten deals: the level is the largest effect of one of them, or between."""
    rows = noise(5, 8)
    level = chance({0: rows[:2]}, {0: rows[2:]}, rounds=2000)
    deals = [(list(a), [i for i in range(5) if i not in a]) for a in itertools.combinations(range(5), 2)]
    largest = sorted(float(contrast(rows[a], rows[b]).effect.abs().max()) for a, b in deals)
    assert level == pytest.approx(largest[-1], rel=1e-5)  # it has one case in ten, more than one in twenty


def test_chance_needs_the_same_layers() -> None:
    with pytest.raises(InvalidRequest, match="same layers"):
        chance({0: noise(3, 2)}, {1: noise(3, 2)})


def test_the_strongest_are_ordered_and_of_one_side() -> None:
    found = {
        2: Contrast(torch.zeros(3), torch.tensor([0.5, -3.0, 0.0])),
        5: Contrast(torch.zeros(1), torch.tensor([2.0])),
    }
    assert strongest(found, 9) == [(2, 1), (5, 0), (2, 0)]
    assert strongest(found, 9, sign=1) == [(5, 0), (2, 0)]
    assert strongest(found, 9, sign=-1) == [(2, 1)]
    assert strongest(found, 1) == [(2, 1)]
    assert strongest(found, 0) == []


def test_control_sets_match_in_all_but_the_neurons() -> None:
    chosen = [(0, 1), (0, 2), (0, 3), (3, 7)]
    widths = {0: 12, 1: 12, 3: 9}
    sets = control_sets(chosen, widths, 40)
    assert len(sets) == 40
    for one in sets:
        assert Counter(layer for layer, _ in one) == {0: 3, 3: 1}
        assert len(set(one)) == 4
        assert not set(one) & set(chosen)
        assert all(0 <= index < widths[layer] for layer, index in one)
    assert {index for one in sets for layer, index in one if layer == 3} == set(range(9)) - {7}  # any may be drawn
    assert sets == control_sets(chosen, widths, 40)
    assert sets != control_sets(chosen, widths, 40, seed=1)
    others = [(0, 9), (3, 0), (5, 1)]
    assert not {pair for one in control_sets(chosen, widths, 40, besides=others) for pair in one} & {*chosen, *others}
    with pytest.raises(InvalidRequest, match="layer 3 has too few"):
        control_sets([(3, 7)], widths, 1, besides=[(3, i) for i in range(9)])
    with pytest.raises(InvalidRequest, match="layer 3 has too few"):
        control_sets([(3, i) for i in range(5)], widths, 1)
