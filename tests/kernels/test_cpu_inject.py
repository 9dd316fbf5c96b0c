"""The CPU's injection against its formula in float64, and the promises about bits."""

import pytest
import torch
from torch import Tensor

from steersman.kernels import cpu_library
from steersman.kernels.cpu_inject import inject
from tests.kernels.programs import vector
from tests.kernels.test_cpu import DTYPES, HALF_STEP, bits, strided

pytestmark = pytest.mark.skipif(cpu_library.library("auto") is None, reason="there is no C++ compiler")
ROWS = torch.tensor([7, 2, 5])


def case(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [9, d] with gaps between its rows, and what the three rows carry."""
    g = torch.Generator().manual_seed(d)
    return strided(9, d, dtype, g, 5), vector(g, 3, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 15, 16, 576, 1003])
def test_the_formula(d: int, dtype: torch.dtype) -> None:
    x, carried = case(d, dtype)
    before = x.clone()
    norms, squares = torch.full((3, 2), -1.0), torch.full((3,), -1.0)
    assert inject(x, ROWS, carried, None, norms[:, :1], squares)
    own = before[ROWS].double()
    y = own + carried.double()
    want = y * own.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
    length = own.norm(dim=-1, keepdim=True)
    assert ((x[ROWS].double() - want).abs() <= 1.01 * HALF_STEP[dtype] * want.abs() + 1e-6 * length + 1e-7).all()
    torch.testing.assert_close(norms[:, 0].double(), (want - own).norm(dim=-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares.double(), own.square().sum(-1), rtol=1e-5, atol=0)
    assert (norms[:, 1] == -1).all()
    left = [row for row in range(9) if row not in ROWS.tolist()]
    assert torch.equal(bits(x[left]), bits(before[left]))


def test_a_rows_bits_depend_on_nothing_else() -> None:
    x, carried = case(576, torch.bfloat16)
    alone = [x.clone() for _ in range(3)]
    together = x.clone()
    assert inject(together, ROWS, carried, None, torch.zeros(3, 1), torch.zeros(3))
    for i, each in enumerate(alone):
        assert inject(each, ROWS[i : i + 1], carried[i : i + 1])
        assert torch.equal(bits(each[ROWS[i]]), bits(together[ROWS[i]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_carries_nothing_or_is_shut_keeps_its_bits(dtype: torch.dtype) -> None:
    x, carried = case(40, dtype)
    x[2, 3] = -0.0
    carried[1] = 0
    before, norms = x.clone(), torch.full((3, 1), -1.0)
    assert inject(x, ROWS, carried, torch.tensor([[1.0], [1.0], [0.0]]), norms)
    assert torch.equal(bits(x[[2, 5]]), bits(before[[2, 5]]))
    assert not torch.equal(x[7], before[7])
    assert norms[1:, 0].tolist() == [0, 0]


def test_a_row_that_the_injection_cancels_becomes_nothing() -> None:
    x, _ = case(40, torch.float32)
    carried = -x[ROWS]
    assert inject(x, ROWS, carried)
    assert not x[ROWS].any()


def test_bad_calls_edit_nothing() -> None:
    x, carried = case(40, torch.float32)
    before = x.clone()
    with pytest.raises(IndexError, match="past the 9"):
        inject(x, torch.tensor([0, 9, 1]), carried)
    with pytest.raises(ValueError, match=r"carried must be float32 \[3, 40\]"):
        inject(x, ROWS, carried[:2])
    with pytest.raises(ValueError, match="rows must be"):
        inject(x, ROWS.int(), carried)
    assert not inject(x.double(), ROWS, carried)
    assert not inject(x, ROWS, carried, asked="torch")
    assert not inject(x.T, ROWS, torch.zeros(3, 9))
    assert torch.equal(x, before)
