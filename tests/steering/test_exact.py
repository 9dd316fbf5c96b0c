"""Sums that no order changes, and the bound on plain products."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from steersman.steering import exact
from steersman.steering.exact import Products


def uneven(n: int, d: int, seed: int) -> Tensor:
    """Numbers of very different sizes, as a stream's are, one of them huge."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * torch.exp(2 * torch.randn(n, d, generator=generator))
    x[:, 3] *= 1000
    return x


@pytest.mark.parametrize("d", [5, 576, 4097])
def test_no_order_of_addition_changes_a_bit(d: int) -> None:
    x, rows = uneven(7, d, 1), uneven(9, d, 2)
    found = exact.dots(x, rows)
    for seed in range(4):
        order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(exact.dots(x[:, order], rows[:, order]), found)
        assert torch.equal(exact.pairs(x[:, order], rows[:7, order]), exact.pairs(x, rows[:7]))
    assert torch.equal(exact.dots(x[2:3], rows[4:5]), found[2:3, 4:5])
    assert torch.equal(exact.pairs(x, rows[:7]), found.diagonal())
    plain = x @ rows.T
    assert any(not torch.equal(x[:, p] @ rows[:, p].T, plain) for p in map(torch.randperm, [d] * 4)) or d == 5


@pytest.mark.parametrize("d", [1, 33, 2048])
def test_they_are_the_true_sums_to_far_below_float32(d: int) -> None:
    x, rows = uneven(2, max(d, 4), 3)[:, :d], uneven(3, max(d, 4), 4)[:, :d]
    found = exact.dots(x, rows)
    for i in range(2):
        for j in range(3):
            pairs = zip(x[i].tolist(), rows[j].tolist(), strict=True)
            true = float(sum(Fraction(a) * Fraction(b) for a, b in pairs))
            size = float(x[i].double().norm() * rows[j].double().norm())
            assert abs(float(found[i, j]) - true) <= 1e-10 * size


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.zeros(2, 6)
    assert torch.equal(exact.dots(x, x), torch.zeros(2, 2, dtype=torch.float64))
    x[0, 1] = torch.inf
    assert not torch.isfinite(exact.dots(x, torch.ones(1, 6)))[0]
    assert float(exact.dots(x, torch.ones(1, 6))[1, 0]) == 0, "a row's own numbers alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_product_is_within_its_bound(dtype: torch.dtype) -> None:
    rows, bias = uneven(5000, 64, 5).to(dtype), uneven(1, 5000, 6)[0]
    products, x = Products(rows), uneven(11, 64, 7)
    found, bound = products.fast(x, bias)
    true = exact.dots(x, rows) + bias.double()
    off = (found.double() - true).abs()
    assert (off <= bound[:, None]).all()
    assert (bound < 1e-4 * products.largest * x.norm(dim=1) + 1e-4 * float(bias.abs().max())).all()
    assert products.largest == pytest.approx(float(rows.double().norm(dim=1).max()))
    assert torch.equal(products.dots(x, [4999, 3]), exact.dots(x, rows[[4999, 3]]))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_bound_holds_where_torch_may_round_the_factors(precision: str) -> None:
    rows, x, before = uneven(3000, 257, 8), uneven(64, 257, 9), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found, bound = Products(rows).fast(x)
    finally:
        torch.set_float32_matmul_precision(before)
    coarse = (x.bfloat16().double() @ rows.bfloat16().double().T) if precision == "medium" else found.double()
    for product in (found.double(), coarse):
        assert ((product - exact.dots(x, rows)).abs() <= bound[:, None]).all()
