"""The low-rank recurrence does what the blocks do one after another on the whole vector."""

import math
from dataclasses import replace

import pytest
import torch

from steersman.kernels.program import Program, Rows
from steersman.kernels.reference import edit, project, row_sums
from steersman.steering import lower
from steersman.steering.plan import linear_block
from tests.kernels.programs import COLUMNAR, CONSTANT, draw, gates_of, naive, vector

EXACT = 1e-9  # float64, relative to the length of the row


def check(program: Program, n: int = 5, seed: int = 0) -> None:
    x = vector(torch.Generator().manual_seed(seed), n, program.width).double()
    gates = gates_of(n, seed)
    norms = torch.full((n, len(program.blocks)), -1.0, dtype=torch.float64)
    want, want_norms = naive(x, program, gates)
    kept = x.clone()
    delta = edit(x, program, gates, norms)
    scale = (x.norm(dim=-1) + want.norm(dim=-1))[:, None]
    assert torch.equal(x, kept)
    assert torch.equal(edit(x, program, gates), delta)
    assert ((x + delta - want).abs() <= EXACT * scale).all()
    # A length is a root: where nothing was moved, its error is the root of the squares' rounding.
    assert ((norms - want_norms).abs() <= 1e-6 * scale).all()
    assert ((norms.square() - want_norms.square()).abs() <= EXACT * scale.square()).all()


@pytest.mark.parametrize("d", [33, 576])
@pytest.mark.parametrize("seed", range(40))
def test_any_program(d: int, seed: int) -> None:
    check(draw(d, seed), seed=seed)


@pytest.mark.parametrize("kinds", [COLUMNAR, CONSTANT, ("neurons", "ablate", "heads_factor", "clamp")])
@pytest.mark.parametrize("seed", range(10))
def test_columns_and_constants(kinds: tuple[str, ...], seed: int) -> None:
    check(draw(40, seed, kinds), seed=seed)


@pytest.mark.parametrize("seed", range(10))
def test_constant_is_what_the_program_adds(seed: int) -> None:
    program = draw(40, seed, CONSTANT)
    assert program.constant is not None
    delta = edit(torch.zeros(1, 40, dtype=torch.float64), program)
    torch.testing.assert_close(program.constant.double()[None], delta, rtol=1e-5, atol=1e-5)


def test_constant_of_rows_with_a_bias_and_a_threshold() -> None:
    row = Rows(3, dense=torch.tensor([[1.0, 2.0, 0.0]]))
    block = linear_block(0, row, None, bias=2.0, gain=3.0, offset=1.0, high=5.0)
    for b in (block, replace(block, threshold=torch.tensor([4.0])),
              replace(block, threshold=torch.tensor([4.0]), only_if_active=True)):  # fmt: skip
        program = Program((b,), 3)
        assert program.constant is not None
        assert torch.equal(program.constant[None], edit(torch.zeros(1, 3), program))


def test_no_blocks_and_no_rows() -> None:
    x = torch.randn(3, 33)
    assert torch.equal(edit(x, Program((), 33)), torch.zeros(3, 33))
    check(Program((lower.neurons(0, torch.zeros(0), 33, "set", 1.0),), 33))
    check(Program((lower.neurons(0, torch.zeros(0), 33, "set", 1.0), lower.add(1, torch.ones(33), 1.0, True)), 33))
    assert edit(x[:0], draw(33, 1), gates_of(0, 0)).shape == (0, 33)


def test_gates() -> None:
    program = Program((lower.add(0, torch.ones(8), 1.0, False, gate=1),), 8)
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="gate"):
        edit(x, program)
    delta = edit(x, program, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(delta, torch.tensor([[0.0] * 8, [1.0] * 8]))


def test_preserve_norm() -> None:
    block = lower.add(0, vector(torch.Generator().manual_seed(1), 64), 5.0, False, preserve_norm=True)
    x = vector(torch.Generator().manual_seed(2), 4, 64).double()
    after = x + edit(x, Program((block,), 64))
    torch.testing.assert_close(after.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    zero = torch.zeros(1, 64, dtype=torch.float64)
    assert edit(zero, Program((block,), 64)).isfinite().all()


def test_two_rows_that_name_one_column_move_it_together() -> None:
    program = Program((lower.neurons(0, torch.tensor([3, 3, 5]), 8, "add", 2.0),), 8)
    norms = torch.zeros(1, 1)
    delta = edit(torch.zeros(1, 8), program, norms=norms)
    assert delta[0].tolist() == [0, 0, 0, 4, 0, 2, 0, 0]
    assert norms.item() == pytest.approx(math.sqrt(20))


@pytest.mark.parametrize("seed", range(10))
def test_bits_do_not_depend_on_neighbours(seed: int) -> None:
    program, x, gates = draw(576, seed), torch.randn(9, 576), gates_of(9, seed)
    together = edit(x, program, gates)
    for i in range(9):
        assert torch.equal(together[i : i + 1], edit(x[i : i + 1], program, gates[i : i + 1]))


def test_a_wide_row_alone_keeps_its_bits() -> None:
    """From 32768 numbers on PyTorch would split one row among its threads."""
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    x, rows = (torch.randn(4, 40_000, generator=generator).double() for _ in range(2))
    try:
        torch.set_num_threads(2)
        together = project(x, rows)
        for i in range(4):
            assert torch.equal(project(x[i : i + 1], rows)[0], together[i])
            assert torch.equal(row_sums(x[i : i + 1].float())[0], row_sums(x.float())[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kinds", [None, COLUMNAR, CONSTANT])
@pytest.mark.parametrize("seed", range(5))
def test_shards_make_up_the_whole(kinds: tuple[str, ...] | None, seed: int) -> None:
    """Two ranks that add up each other's partial sums, run in turn: the second run knows what the first one sent."""
    d, cut, n = 40, 24, 3
    program, gates = draw(d, seed, kinds), gates_of(n, seed)
    x = vector(torch.Generator().manual_seed(seed), n, d).double()
    parts = [(x[:, :cut], program.shard(0, cut)), (x[:, cut:], program.shard(cut, d))]

    def run(rank: int, others: list[torch.Tensor], sent: list[torch.Tensor]) -> torch.Tensor:
        def reduce(partial: torch.Tensor) -> torch.Tensor:
            sent.append(partial.clone())
            return partial + others[len(sent) - 1] if len(others) >= len(sent) else partial

        norms = x.new_zeros(n, len(program.blocks))
        return edit(*parts[rank], gates, norms, reduce)

    sent: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):
        run(rank, [], sent[rank])
    if not program.is_columnar:  # only sums over x alone are sent: what the ranks send does not depend on an answer
        again: list[list[torch.Tensor]] = [[], []]
        got = torch.cat([run(0, sent[1], again[0]), run(1, sent[0], again[1])], dim=1)
        assert all(torch.equal(a, b) for r in (0, 1) for a, b in zip(sent[r], again[r], strict=True))
    else:
        got = torch.cat([run(0, [], []), run(1, [], [])], dim=1)
    want = naive(x, program, gates)[0]
    assert ((x + got - want).abs() <= EXACT * (x.norm() + want.norm())).all()
