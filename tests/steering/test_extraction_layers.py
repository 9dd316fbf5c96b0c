import math
from dataclasses import replace

import pytest
import torch

from steersman.steering.extraction_layers import Candidate, select_by_effect, separation
from tests.steering.library import noise

D = 5


def test_separation_on_numbers_that_can_be_checked_by_hand() -> None:
    directions = torch.tensor([[2.0, 0], [0, 1], [1, 0]])
    positive = torch.tensor([[1.0, 7], [3, 7]])[:, None].expand(2, 3, 2)
    negative = torch.tensor([[0.0, 7], [2, 7]])[:, None].expand(2, 3, 2)
    found = separation(directions, positive, negative)
    # Along x: means 2 and 1, both variances 2; of the pairs (1,0) (1,2) (3,0) (3,2) three are the right way round.
    torch.testing.assert_close(found.d_prime, torch.tensor([2**-0.5, 0, 2**-0.5]))
    torch.testing.assert_close(found.auc, torch.tensor([0.75, 0.5, 0.75]))
    assert found.best == 0


def test_the_layer_at_which_the_classes_come_apart_is_best() -> None:
    v = torch.nn.functional.normalize(noise(4, D, seed=3), dim=-1)
    gaps = torch.tensor([0.0, 0.5, 3.0, 1.0])[:, None]
    positive, negative = noise(400, 4, D) + gaps * v, noise(300, 4, D, seed=1)
    found = separation(v, positive, negative)
    assert found.best == 2
    assert (found.d_prime - gaps[:, 0]).abs().max() < 0.3
    usual = 0.5 * (1 + torch.erf(gaps[:, 0] / 2))  # two unit normals that far apart
    assert (found.auc - usual).abs().max() < 0.06
    turned = separation(-v, positive, negative)
    torch.testing.assert_close(turned.auc, 1 - found.auc)
    torch.testing.assert_close(turned.d_prime, -found.d_prime)


def test_classes_without_spread_are_infinitely_apart_or_not_at_all() -> None:
    found = separation(torch.ones(1, 1), torch.ones(2, 1, 1), torch.zeros(2, 1, 1))
    assert math.isinf(float(found.d_prime[0]))
    assert found.auc[0] == 1
    assert separation(torch.ones(1, 1), torch.ones(2, 1, 1), torch.ones(2, 1, 1)).d_prime[0] == 0


@pytest.mark.parametrize(("n", "d"), [(1, D), (4, D + 1)])
def test_separation_refuses_what_it_cannot_measure(n: int, d: int) -> None:
    with pytest.raises(ValueError):
        separation(noise(2, D), noise(n, 2, d), noise(4, 2, D))


GOOD = Candidate(layer=3, position=-1, bypass=-2.0, induce=1.0, kl=0.05)
N_LAYERS = 10


@pytest.mark.parametrize(
    "out",
    [
        {"kl": 0.11},
        {"induce": -0.01},
        {"layer": 8},
        {"layer": 9},
        {"bypass": math.nan},
        {"induce": math.nan},
        {"kl": math.nan},
    ],
)
def test_a_candidate_that_fails_one_condition_is_left_out_however_well_it_bypasses(out: dict[str, float]) -> None:
    better = replace(GOOD, **{"bypass": -9.0, **out})
    assert select_by_effect([better, GOOD], N_LAYERS) is GOOD
    with pytest.raises(ValueError, match="no direction is left of 1"):
        select_by_effect([better], N_LAYERS)


def test_bounds_are_still_inside_and_the_lowest_bypass_wins() -> None:
    edge = Candidate(layer=7, position=-4, bypass=-2.5, induce=0.0, kl=0.1)
    assert select_by_effect([GOOD, edge], N_LAYERS) is edge
    assert select_by_effect([GOOD, replace(GOOD, layer=4)], N_LAYERS) is GOOD
    assert select_by_effect([edge], N_LAYERS, last_share=0.2).layer == 7
    assert select_by_effect([replace(edge, layer=9)], N_LAYERS, last_share=0).layer == 9


def test_the_error_says_why_none_is_left() -> None:
    bad = [replace(GOOD, kl=1), replace(GOOD, kl=2), replace(GOOD, induce=-1)]
    with pytest.raises(ValueError, match=r"2 kl above 0.1, 1 induce below 0.0"):
        select_by_effect(bad, N_LAYERS)
    with pytest.raises(ValueError, match="there were none"):
        select_by_effect([], N_LAYERS)
    with pytest.raises(ValueError, match="layer 10"):
        select_by_effect([replace(GOOD, layer=10)], N_LAYERS)
