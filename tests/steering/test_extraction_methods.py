from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.steering.extraction import difference_of_means
from steersman.steering.extraction_methods import METHODS, extract, held_out


def planted(seed: int, n: int = 12, layers: int = 2, d: int = 6, gap: float = 3.0) -> tuple[Tensor, Tensor]:
    """Two sides that differ along one axis at each layer, with noise."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, n, layers, d, generator=generator)
    axis = torch.nn.functional.one_hot(torch.arange(layers), d).float()
    return positive + gap * axis, negative


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), method=st.sampled_from(sorted(METHODS)))
def test_scale_one_closes_the_gap(seed: int, method: str) -> None:
    """v̂·(μ⁻ + v) = v̂·μ⁺ at every layer, whatever the method, and v points to the positives."""
    positive, negative = planted(seed)
    v = extract(method, positive, negative)
    unit = v / v.norm(dim=-1, keepdim=True)
    reached = ((negative.mean(0) + v) * unit).sum(-1)
    torch.testing.assert_close(reached, (positive.mean(0) * unit).sum(-1), rtol=1e-4, atol=1e-4)
    assert (((positive.mean(0) - negative.mean(0)) * v).sum(-1) > 0).all()


def test_the_gap_of_the_mean_difference_is_the_difference() -> None:
    positive, negative = planted(0)
    torch.testing.assert_close(extract("mean_difference", positive, negative), difference_of_means(positive, negative))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_units(method: str) -> None:
    v = extract(method, *planted(1), length="unit")
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(2))


def test_sides_that_do_not_differ_have_no_direction() -> None:
    same = torch.ones(4, 1, 3)
    with pytest.raises(ValueError, match="do not differ"):
        extract("mean_difference", same, same)


def test_held_out_examples_are_not_seen() -> None:
    """Were the held-out fifth seen, labels of pure noise would be told apart: 40 dimensions fit 20 examples."""
    positive, negative = torch.randn(2, 10, 40, 64, generator=torch.Generator().manual_seed(3))
    found = held_out("linear_probe", positive, negative)
    assert found is not None
    for scores in (found.separation.auc, found.accuracy):
        assert abs(float(scores.mean()) - 0.5) < 0.15  # 40 layers of chance, 4 comparisons each
    far = held_out("mean_difference", *planted(2, n=20, gap=8.0))
    assert far is not None
    assert (far.positive, far.negative) == (4, 4)
    told = far.to_json()
    assert told["auc"] == told["accuracy"] == [1.0, 1.0]
    assert held_out("mean_difference", *planted(2, n=9)) is None


def test_accuracy_is_by_the_middle_of_what_was_seen() -> None:
    """Of ten examples each, at 0 and 1, the fifth and the tenth are held out."""
    positive, negative = torch.ones(10, 1, 1), torch.zeros(10, 1, 1)
    positive[4], positive[9] = 0.6, 0.4
    found = held_out("mean_difference", positive, negative)
    assert found is not None
    assert found.to_json() == {
        "positive": 2, "negative": 2, "accuracy": [0.75], "auc": [1.0], "d_prime": [pytest.approx(5.0)]
    }  # fmt: skip
    positive[4] = positive[9] = 0.6
    found = held_out("mean_difference", positive, negative)
    assert found is not None
    assert found.to_json()["d_prime"] == [None]  # nothing varies
