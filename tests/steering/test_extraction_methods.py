from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.steering.extraction import difference_of_means
from steersman.steering.extraction_methods import METHODS, extract, held_out_auc


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
    scores = held_out_auc("linear_probe", positive, negative)
    assert scores is not None
    assert abs(sum(scores) / len(scores) - 0.5) < 0.15  # 40 layers of chance, 4 comparisons each
    assert held_out_auc("mean_difference", *planted(2, n=20, gap=8.0)) == [1.0, 1.0]
    assert held_out_auc("mean_difference", *planted(2, n=9)) is None
