"""The optimum: its gradient is zero, and for one coordinate it is where a plain search finds it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.steering.logistic import fit
from tests.steering.library import noise


def gradient(x: Tensor, labels: Tensor, w: Tensor, b: Tensor, l2: float) -> Tensor:
    """Of the loss as written in the docstring, by autograd, at every problem's own optimum."""
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    margin = (2 * labels - 1) * ((x @ w[:, :, None])[:, :, 0] + b[:, None])
    (torch.nn.functional.softplus(-margin).sum() + l2 / 2 * (w * w).sum()).backward()
    assert w.grad is not None
    assert b.grad is not None
    return torch.cat([w.grad, b.grad[:, None]], 1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 12),
    p=st.integers(1, 15),
    l2=st.sampled_from([1e-3, 1.0, 100.0]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    gap=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_the_gradient_is_zero_at_the_optimum(n: int, p: int, l2: float, size: float, gap: float, seed: int) -> None:
    """Also where the classes are apart, examples few, coordinates many or badly scaled."""
    labels = (torch.arange(n) % 2).double()
    x = size * (noise(3, n, p, seed=seed).double() + gap * labels[:, None])
    w, b = fit(x, labels, l2)
    assert gradient(x, labels, w, b, l2).abs().max() <= 1e-6 * n


def test_one_coordinate_against_a_search() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [1.5]]).double()
    labels = torch.tensor([0.0, 0, 1, 1]).double()
    w, b = fit(x[None], labels, 1.0)
    grid = torch.linspace(-4, 4, 801).double()
    margins = (2 * labels - 1)[:, None, None] * (x[:, :, None] * grid[:, None] + grid[None, :])
    loss = torch.nn.functional.softplus(-margins).sum(0) + grid[:, None] ** 2 / 2
    best = divmod(int(loss.argmin()), 801)
    assert abs(float(w[0, 0]) - float(grid[best[0]])) <= 0.01
    assert abs(float(b[0]) - float(grid[best[1]])) <= 0.01


def test_problems_do_not_touch_each_other() -> None:
    labels = (torch.arange(9) % 2).double()
    x = noise(4, 9, 5).double() * torch.tensor([0.01, 1, 10, 100]).double()[:, None, None]
    together, _ = fit(x, labels)
    for i in range(4):
        torch.testing.assert_close(together[i], fit(x[i : i + 1], labels)[0][0], rtol=1e-6, atol=1e-9)


def test_the_intercept_is_free() -> None:
    """Shifting every example changes the intercept alone."""
    labels = (torch.arange(8) % 2).double()
    x = noise(1, 8, 3).double()
    w, b = fit(x, labels)
    moved, c = fit(x + 50, labels)
    torch.testing.assert_close(moved, w, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(c, b - 50 * w.sum(1), rtol=1e-4, atol=1e-6)


def test_what_has_no_optimum_is_refused() -> None:
    with pytest.raises(ValueError, match="l2"):
        fit(noise(1, 4, 2).double(), torch.tensor([0.0, 1, 0, 1]), 0)
    for labels in ([0.0, 0], [1.0, 1]):
        with pytest.raises(ValueError, match="both classes"):
            fit(noise(1, 2, 2).double(), torch.tensor(labels))
