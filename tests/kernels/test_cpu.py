"""The CPU tables against the reference in float64, and the promises about bits."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steersman.kernels import cpu, cpu_library
from steersman.kernels.cpu import Table
from steersman.kernels.program import Program
from steersman.kernels.reference import edit
from steersman.steering import lower
from tests.kernels.programs import COLUMNAR, CONSTANT, D_HEAD, N_GATES, draw, gates_of, ops, vector

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a rounding, relative
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # of a rounding among subnormals
SUMS = 1e-5  # float32 sums, relative to the lengths of the rows that they are made of
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SOME = [Program((), 576), *(draw(576, seed) for seed in range(6)), draw(576, 6, COLUMNAR), draw(576, 7, CONSTANT)]

Groups = list[tuple[Program, Tensor]]


@pytest.fixture(params=["cpp", "torch"])
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGER[x.dtype])


def strided(n: int, d: int, dtype: torch.dtype, g: torch.Generator, gap: int) -> Tensor:
    return vector(g, n, d + gap).to(dtype)[:, gap // 2 : gap // 2 + d]


def spread(programs: list[Program], total: int, seed: int) -> Groups:
    """Every row of ``total`` but some, in no order, dealt out to the programs."""
    rng = random.Random(seed)
    order = list(range(total))
    rng.shuffle(order)
    hands: list[list[int]] = [[] for _ in [*programs, None]]  # the last one's rows stay unedited
    for row in order:
        rng.choice(hands).append(row)
    return [(p, torch.tensor(hand, dtype=torch.int64)) for p, hand in zip(programs, hands, strict=False)]


def check(
    groups: Groups,
    x: Tensor,
    residual: Tensor | None,
    kernel: str,
    table: Table | None = None,
) -> None:
    """Applies a table to x and holds every row of it against the reference."""
    table = table or Table.build(groups, x.shape[1], kernel)
    rows = torch.cat([rows for _, rows in groups])
    gates = gates_of(len(rows), 1)
    norms, squares = torch.full((len(rows), table.max_blocks), -1.0), torch.full((len(rows),), -1.0)
    before, plain = x.clone(), x.clone()
    table.apply(plain, residual, gates)
    table.apply(x, residual, gates, norms, squares)
    assert torch.equal(bits(x), bits(plain))  # measuring changes nothing
    left = torch.ones(len(x), dtype=torch.bool)
    left[rows] = False
    assert torch.equal(bits(x[left]), bits(before[left]))
    start = 0
    for program, mine in groups:
        span = slice(start, start := start + len(mine))
        own = before[mine].double()
        stream = own if residual is None else own + residual[mine].double()
        sizes = stream.new_zeros(len(mine), len(program.blocks))
        delta = edit(stream, program, gates[span], sizes)
        want = own + delta
        length = (stream.norm(dim=-1) + (stream + delta).norm(dim=-1) + own.norm(dim=-1))[:, None]
        rounding = HALF_STEP[x.dtype] * want.abs() + SMALLEST[x.dtype]
        assert ((x[mine].double() - want).abs() <= 1.01 * rounding + SUMS * length).all()
        assert ((norms[span, : len(program.blocks)] - sizes).abs() <= 1e-4 * sizes + SUMS * length).all()
        assert (norms[span, len(program.blocks) :] == -1).all()
        torch.testing.assert_close(squares[span].double(), stream.square().sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", list(ops(40, random.Random(0), torch.Generator())))
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_op(op: str, dtype: torch.dtype, kernel: str) -> None:
    for d in (33, 576, 1000):
        g = torch.Generator().manual_seed(d)
        program = Program((ops(d, random.Random(d), g)[op](0),), d)
        check([(program, torch.arange(3))], vector(g, 3, d).to(dtype), vector(g, 3, d).to(dtype), kernel)


@pytest.mark.parametrize("d", [1, 33, 576, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_mixed_batch(d: int, dtype: torch.dtype, with_residual: bool, kernel: str) -> None:
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        n = 24
        kinds: list[tuple[str, ...] | None] = [None, None, None, COLUMNAR, CONSTANT, ("neurons", "ablate", "add")]
        if d == 1:  # no plane to turn in
            kinds = [("add", "ablate", "clamp", "neurons"), CONSTANT]
        groups = spread([draw(d, 10 * seed + i, k) for i, k in enumerate(kinds)], n, seed)
        residual = strided(n, d, dtype, g, 16) * 3 if with_residual else None
        check(groups, strided(n, d, dtype, g, 10 * seed), residual, kernel)


@pytest.mark.parametrize("k", [0, 1, 7, 64])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_row_counts(k: int, columns: bool, n: int, kernel: str) -> None:
    d, g = 576, torch.Generator().manual_seed(k)
    if columns:
        blocks = [lower.neurons(0, torch.randperm(d, generator=g)[:k], d, "set", 1.0)]
    else:
        blocks = [lower.ablate(0, vector(g, k, d), 0.5)] if k else []
    for program in (Program(tuple(blocks), d), Program((*blocks, lower.add(1, vector(g, d), 0.1, True)), d)):
        check([(program, torch.arange(n))], vector(g, 6, d), None, kernel)
    Table.build([], d, kernel).apply(vector(g, n, d), None, None, torch.zeros(0, 0), torch.zeros(0))


def test_same_bits_alone_and_in_a_batch(kernel: str) -> None:
    for dtype in DTYPES:
        g = torch.Generator().manual_seed(3)
        x, residual, n = vector(g, 40, 576).to(dtype), vector(g, 40, 576).to(dtype), 40
        groups = spread(SOME, n, 3)
        rows = torch.cat([r for _, r in groups])
        gates = gates_of(len(rows), 3)
        together = x.clone()
        Table.build(groups, 576, kernel).apply(together, residual, gates)
        owners = [p for p, r in groups for _ in r]
        for k, (program, row) in enumerate(zip(owners, rows.tolist(), strict=True)):
            alone = x[row : row + 1].clone()
            table = Table.build([(program, torch.tensor([0]))], 576, kernel)
            table.apply(alone, residual[row : row + 1].clone(), gates[k : k + 1])
            assert torch.equal(bits(alone[0]), bits(together[row]))


def test_same_bits_on_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    g = torch.Generator().manual_seed(4)
    x, groups = vector(g, 300, 576), spread(SOME, 300, 4)
    gates = gates_of(sum(len(r) for _, r in groups), 4)
    one, two = x.clone(), x.clone()
    monkeypatch.setattr(cpu, "PARALLEL", 2**60)
    Table.build(groups, 576, "cpp").apply(one, None, gates)
    monkeypatch.setattr(cpu, "PARALLEL", 0)
    torch.set_num_threads(2)
    try:
        table = Table.build(groups, 576, "cpp")
        table.apply(two, None, gates)
        assert torch.equal(one, two)
        check(groups, x, None, "cpp", table)
    finally:
        torch.set_num_threads(threads)


def test_untouched_rows_and_unmoved_rows_keep_their_bits(kernel: str) -> None:
    x = torch.full((4, 33), -0.0)
    x[1, 0] = float("nan")
    before = x.clone()
    closed = Program((lower.add(0, torch.ones(33), 1.0, False, gate=0),), 33)
    Table.build([(closed, torch.tensor([2]))], 33, kernel).apply(x, None, torch.zeros(1, 1))
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(bits(x)[[0, 1, 3]], bits(before)[[0, 1, 3]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_odd_numbers_stay_in_their_row(value: float, kernel: str) -> None:
    programs = [p for p in SOME if p.blocks]
    x = vector(torch.Generator().manual_seed(5), 2 * len(programs), 576)
    groups = [(p, torch.tensor([2 * i, 2 * i + 1])) for i, p in enumerate(programs)]
    table, gates = Table.build(groups, 576, kernel), torch.ones(len(x), N_GATES)
    clean = x.clone()
    table.apply(clean, None, gates)
    x[::2, 7] = value
    table.apply(x, None, gates, torch.zeros(len(x), table.max_blocks), torch.zeros(len(x)))
    assert torch.equal(x[1::2], clean[1::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_float_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    for shift in (0.0, 1e-7, 0.37, -3.0, 6e4, 1e38):
        x = every.clone()
        table = Table.build([(Program((lower.add(0, torch.full((256,), shift), 1.0, False),), 256), torch.arange(256))], 256, "cpp")  # fmt: skip  # noqa: E501
        table.apply(x)
        torch.testing.assert_close(x, (every.float() + shift).to(dtype), rtol=0, atol=0, equal_nan=True)
        scalar = every.clone()
        columns = Program((lower.neurons(0, torch.arange(256), 256, "add", shift),), 256)
        Table.build([(columns, torch.arange(256))], 256, "cpp").apply(scalar)
        finite = every.isfinite()
        torch.testing.assert_close(scalar[finite], x[finite], rtol=0, atol=0, equal_nan=True)


def test_wide_rows_need_more_than_the_stack(kernel: str) -> None:
    d, g = 20000, torch.Generator().manual_seed(6)
    program = Program((lower.ablate(0, vector(g, 2, d), 1.0), lower.heads_factor(1, [0, 9], 20, d, 0.0)), d)
    check([(program, torch.tensor([1]))], vector(g, 3, d), vector(g, 3, d), kernel)


@pytest.mark.parametrize("kinds", [COLUMNAR, CONSTANT])
def test_shards_of_what_reads_no_sum(kinds: tuple[str, ...], kernel: str) -> None:
    program, x = draw(40, 8, kinds), vector(torch.Generator().manual_seed(8), 3, 40)
    whole, gates, rows = x.clone(), gates_of(3, 8), torch.arange(3)
    Table.build([(program, rows)], 40, kernel).apply(whole, None, gates)
    for a, b in ((0, 24), (24, 40)):
        part = program.shard(a, b)
        assert Table.supports(part, sharded=True)
        assert not Table.supports(part, sharded=True, measured=True)
        Table.build([(part, rows)], b - a, kernel).apply(x[:, a:b], None, gates)
    torch.testing.assert_close(x, whole, rtol=1e-6, atol=1e-6)
    dense = Program((lower.ablate(0, torch.ones(1, 40), 1.0),), 40)
    assert Table.supports(dense)
    assert not Table.supports(dense, sharded=True)


def test_bad_calls_edit_nothing() -> None:
    program = Program((lower.add(0, torch.ones(D_HEAD), 1.0, False),), D_HEAD)
    table, x = Table.build([(program, torch.tensor([0, 4]))], D_HEAD, "cpp"), torch.zeros(4, D_HEAD)
    with pytest.raises(IndexError):
        table.apply(x)
    for bad in (torch.zeros(5, 9), torch.zeros(5, D_HEAD, dtype=torch.float64), torch.zeros(D_HEAD, 5).T):
        with pytest.raises(ValueError, match="x is"):
            table.apply(bad)
    with pytest.raises(ValueError, match="residual"):
        table.apply(torch.zeros(5, D_HEAD), torch.zeros(4, D_HEAD))
    with pytest.raises(ValueError, match="norms"):
        table.apply(torch.zeros(5, D_HEAD), norms=torch.zeros(2, 0))
    with pytest.raises(ValueError, match="width"):
        Table.build([(program, torch.tensor([0]))], 9)
    with pytest.raises(ValueError, match="int64"):
        Table.build([(program, torch.tensor([0], dtype=torch.int32))], D_HEAD)
    gated = Program((lower.add(0, torch.ones(D_HEAD), 1.0, False, gate=2),), D_HEAD)
    table = Table.build([(gated, torch.tensor([0]))], D_HEAD, "cpp")
    with pytest.raises(ValueError, match="gates must be given"):
        table.apply(x)
    with pytest.raises(ValueError, match="gates"):
        table.apply(x, None, torch.ones(1, 2))
    assert not x.any()


# The library


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("STEERSMAN_CPU_KERNEL", raising=False)
    cpu_library._library.cache_clear()
    yield tmp_path
    cpu_library._library.cache_clear()


def test_without_a_compiler_torch_does_the_work(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_library, "COMPILERS", ("no-such-compiler",))
    program, x = Program((lower.add(0, torch.ones(33), 2.0, False),), 33), torch.zeros(2, 33)
    for _ in range(2):
        Table.build([(program, torch.tensor([1]))], 33).apply(x)
    assert x.sum(1).tolist() == [0, 132]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with pytest.raises(RuntimeError, match="could not be compiled"):
        Table.build([], 33, "cpp")


def test_a_compiler_that_fails_is_no_error(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, "--no-such-flag"))
    assert cpu_library.library("auto") is None
    assert "no-such-flag" in caplog.text
    assert not [*fresh.rglob("*.so"), *fresh.rglob(".*.so")]


def test_the_environment_chooses(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_CPU_KERNEL", "torch")
    assert Table.build([], 33)._loaded is None
    monkeypatch.setenv("STEERSMAN_CPU_KERNEL", "cuda")
    with pytest.raises(ValueError, match="cuda"):
        Table.build([], 33)


START = """
import os, torch
from steersman.kernels.cpu_library import library
loaded = library("cpp")
"""


def run(script: str, cache: Path) -> "subprocess.Popen[str]":
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen([sys.executable, "-c", START + script], env=env, text=True, stdout=subprocess.PIPE)


def test_processes_that_start_together_share_one_library(tmp_path: Path) -> None:
    running = [run("print(len(loaded.brief))", tmp_path) for _ in range(2)]
    assert [p.communicate(timeout=300)[0].strip() for p in running] == ["3", "3"]
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_no_threads_but_torchs_own() -> None:
    script = """
from steersman.kernels import cpu
from steersman.kernels.program import Program
from steersman.steering import lower
cpu.PARALLEL = 0
torch.set_num_threads(2)
x = torch.randn(2000, 576)
def count():
    return len(os.listdir("/proc/self/task"))
x.add(x)
before = count()
program = Program((lower.ablate(0, torch.randn(1, 576), 1.0),), 576)
table = cpu.Table.build([(program, torch.arange(2000))], 576, "cpp")
for _ in range(3):
    table.apply(x)
    x @ x[:576]
print(bool(loaded.parallel), count() - before)
"""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    assert run(script, default).communicate(timeout=300)[0].split() == ["True", "0"]
