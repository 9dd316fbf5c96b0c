"""The CUDA kernel against the reference in float64: on a GPU, and emulated on the processor where there is none."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from steersman.kernels import cuda_edit
from steersman.kernels.cuda_edit import MAX_THREADS, edit, edit_and_norm
from steersman.kernels.norms import Form
from steersman.kernels.program import Block, Program, Rows
from steersman.kernels.tables import MAX_ROWS, Tables
from steersman.steering import lower
from tests.kernels.cuda_emulator import Emulator, compiler
from tests.kernels.device_checks import (
    DTYPES,
    FORMS,
    PLACE,
    Batch,
    bits,
    check_bad_calls,
    check_roundings,
    deal,
    fill,
)
from tests.kernels.programs import COLUMNAR, CONSTANT, N_GATES, draw, gates_of, ops, vector
from tests.kernels.row_checks import (
    captured,
    check_gates,
    check_gates_hold_at_later_places,
    check_injection,
    check_injection_of_nothing,
    check_probes,
    check_replays,
)

SOME = [Program((), 72), *(draw(72, seed) for seed in range(4)), draw(72, 6, COLUMNAR), draw(72, 7, CONSTANT)]
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]
)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the rows lie; on the processor, the kernel is emulated."""
    if request.param == "cpu":
        if compiler() is None:
            pytest.skip("there is no C++ compiler to emulate the kernel with")
        emulator = Emulator()
        monkeypatch.setattr(cuda_edit, "library", lambda device: emulator)
    yield request.param
    assert request.param != "cpu" or emulator.launches


def fresh() -> int:
    """A seed: other numbers at every run on a GPU, where there is no end of them; printed when a test fails."""
    seed = int.from_bytes(os.urandom(3), "big")
    print(f"seed {seed}")
    return seed


# Against the reference


@pytest.mark.parametrize("op", list(ops(40, random.Random(0), torch.Generator())))
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_op(op: str, dtype: torch.dtype, device: str) -> None:
    for d in (33, 200, 576):
        g = torch.Generator().manual_seed(d)
        program = Program((ops(d, random.Random(d), g)[op](0),), d)
        Batch.make(device, [program, None, program], d, dtype).check(edit)


@pytest.mark.parametrize("d", [1, 7, 33, 576, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_mixed_batch(d: int, dtype: torch.dtype, with_residual: bool, device: str) -> None:
    for gap in (0, 6, 16):  # cells between rows, so that they are 16-byte aligned, or only some are, or none
        kinds: list[tuple[str, ...] | None] = [None, None, None, COLUMNAR, CONSTANT, ("neurons", "ablate", "add")]
        if d == 1:  # no plane to turn in
            kinds = [("add", "ablate", "clamp", "neurons"), CONSTANT]
        programs = deal([draw(d, 10 * gap + i, k) for i, k in enumerate(kinds)], 9, gap)
        Batch.make(device, programs, d, dtype, with_residual=with_residual, gap=gap, seed=gap).check(edit)


@pytest.mark.parametrize("seed", range(12))
def test_any_program(seed: int, device: str) -> None:
    seed = seed if device == "cpu" else fresh()
    d = random.Random(seed).choice([40, 129, 264, 1000])
    programs = deal([draw(d, seed * 10 + i) for i in range(6)], 8, seed)
    Batch.make(device, programs, d, DTYPES[seed % 3], seed=seed, gap=seed % 4 * 4).check(edit)


@pytest.mark.parametrize("k", [0, 1, 7, 32, 64])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_row_counts(k: int, columns: bool, n: int, device: str) -> None:
    d, g = 300, torch.Generator().manual_seed(k)
    if columns:
        block = lower.neurons(0, torch.randperm(d, generator=g)[:k], d, "set", 1.0)
    else:
        block = lower.affine(0, torch.linalg.qr(vector(g, d, k)).Q.T, vector(g, k, d) / 11, vector(g, k), 0.5)
    program = Program((block, replace(block, preserve_norm=True), replace(block, relative=True)), d)
    Batch.make(device, [program] * n or [None], d).check(edit)


@pytest.mark.parametrize("reads", ["nothing", "its own", "other columns", "dense"])
@pytest.mark.parametrize("writes", ["columns", "dense"])
@pytest.mark.parametrize("relative", [False, True])
def test_columns_however_they_are_read(reads: str, writes: str, relative: bool, device: str) -> None:
    """Columns named twice and three times, in no order, with numbers of their own."""
    d, g = 70, torch.Generator().manual_seed(2)
    columns = torch.tensor([9, 3, 9, 69, 0, 64, 9, 3])
    own, dense = Rows(d, columns=columns), Rows(d, dense=vector(g, 8, d) / 8)
    read = {"nothing": None, "its own": own, "other columns": Rows(d, columns=columns.flip(0)), "dense": dense}[reads]
    numbers = {name: vector(g, 8) for name in ("bias", "threshold", "gain", "offset")}
    low, high = torch.full((8,), -1.0), vector(g, 8).abs()
    block = Block(0, own if writes == "columns" else dense, read, low=low, high=high, relative=relative, **numbers)
    blocks = (block, replace(block, only_if_active=True, gate=1), replace(block, preserve_norm=True, gate=2), block)
    Batch.make(device, [Program(blocks, d)] * 3, d).check(edit)


@pytest.mark.parametrize("rows", [MAX_ROWS, 2 * MAX_ROWS + 5])
def test_blocks_of_many_columns_have_one_size(rows: int, device: str) -> None:
    d = 3 * MAX_ROWS
    some = torch.randperm(d, generator=torch.Generator().manual_seed(rows))[:rows]
    blocks = (lower.neurons(0, some, d, "set", 2.0), lower.neurons(1, some, d, "scale", -1.0, gate=0))
    Batch.make(device, [Program(blocks, d)] * 3, d, torch.bfloat16, seed=1).check(edit)


def test_all_flags_at_once(device: str) -> None:
    d, flags = 96, ("relative", "only_if_active", "preserve_norm")
    programs = []
    for mask in range(16):
        block = draw(d, 50 + mask, ("feature", "rotate", "clamp", "neurons"), 1).blocks[0]
        on = {flag: bool(mask >> i & 1) for i, flag in enumerate(flags)}
        programs.append(Program((replace(block, **on, gate=1 if mask & 8 else -1), block), d))
    Batch.make(device, programs, d).check(edit)


def test_little_that_is_left_is_stretched_to_the_old_length(device: str) -> None:
    """Nearly all of the stream goes, and comes back at its old length: in float32 its square would be lost."""
    d = 96
    block = lower.multiply(0, torch.ones(d), 1e-3)
    batch = Batch.make(device, [Program((replace(block, preserve_norm=True),), d)], d, with_residual=False)
    batch.x.copy_(batch.x * 1e-3 + 1)
    batch.check(edit)


def test_rows_wider_than_a_blocks_threads(device: str) -> None:
    """Each thread has several groups of elements, and the last ones only some threads."""
    d = MAX_THREADS * 8 * 2 + 100
    g = torch.Generator().manual_seed(6)
    blocks = (lower.ablate(0, vector(g, 5, d), 1.0), lower.heads_factor(1, [0, 9], 20, d, 0.0),
              lower.add(2, vector(g, d), 0.1, True, preserve_norm=True))  # fmt: skip
    for gap in (4, 16):
        Batch.make(device, [Program(blocks, d), None], d, torch.bfloat16, gap=gap).check(edit)


# The norm that follows


@pytest.mark.parametrize("d", [1, 130, 576])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_that_follows(d: int, form: Form, dtype: torch.dtype, device: str) -> None:
    kinds = ("add", "ablate", "neurons") if d == 1 else None
    programs = deal([draw(d, 20, kinds), draw(d, 21, kinds), draw(d, 22, COLUMNAR), Program((), d)], 7, 3)
    weight = (vector(torch.Generator().manual_seed(9), d) / 4 + 1).to(dtype).to(device)
    for given in (weight, None):
        batch = Batch.make(device, programs, d, dtype, gap=6 if d == 130 else 16)
        batch.check_norm(edit, edit_and_norm, given, form)


def test_norm_has_the_roundings_that_are_asked_for(device: str) -> None:
    check_roundings(edit_and_norm, device)


# Gates


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_read(dtype: torch.dtype, device: str) -> None:
    decided = set[bool]()
    for d in (33, 576, 2100):
        for seed in range(2):
            decided |= check_gates(edit, device, d, dtype, 7 * d + seed, gap=6 * seed)
    assert decided == {False, True}


def test_gates_hold_at_later_places(device: str) -> None:
    check_gates_hold_at_later_places(edit, device)


# Injections


@pytest.mark.parametrize("dtype", DTYPES)
def test_injections(dtype: torch.dtype, device: str) -> None:
    for d in (33, 576, 2100):
        for seed in range(2):
            check_injection(edit, device, d, dtype, 5 * d + seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_injection_of_nothing(dtype: torch.dtype, device: str) -> None:
    check_injection_of_nothing(edit, device, dtype)


def test_captured_launches_keep_what_later_plans_need(device: str) -> None:
    check_replays(edit, device, captured if device == "cuda" else lambda launch: launch)


# Probes


@pytest.mark.parametrize("dtype", DTYPES)
def test_probes(dtype: torch.dtype, device: str) -> None:
    for seed, d in enumerate((33, 576, 2100)):
        check_probes(edit, edit_and_norm, device, d, dtype, 3 * d + seed)


# Bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_neighbours_or_alignment(dtype: torch.dtype, device: str) -> None:
    batch = Batch.make(device, deal(SOME, 12, 1), 72, dtype)
    assert batch.residual is not None
    before, rest = batch.x.clone(), batch.residual.clone()
    edit(batch.x, batch.residual, batch.entries, batch.tables, PLACE, batch.gates)
    for i in range(len(before)):
        room = torch.zeros(2, 96, dtype=dtype, device=device)
        alone, beside = room[:1, i % 3 : i % 3 + 72], room[1:, i % 5 : i % 5 + 72]
        alone.copy_(before[i])
        beside.copy_(rest[i])
        edit(alone, beside, batch.entries[i : i + 1].clone(), batch.tables, PLACE, batch.gates[i : i + 1].clone())
        assert torch.equal(bits(alone[0]), bits(batch.x[i]))
    assert not torch.equal(bits(before), bits(batch.x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_an_unedited_row_is_that_of_a_batch_without_edits(dtype: torch.dtype, device: str) -> None:
    batch = Batch.make(device, deal(SOME, 9, 2), 72, dtype)
    assert batch.residual is not None
    weight = torch.ones(72, dtype=dtype, device=device)
    nothing = torch.full_like(batch.entries, -1)
    results = []
    for entries in (batch.entries, nothing):
        x, residual = batch.x.clone(), batch.residual.clone()
        edit_and_norm(x, residual, weight, 1e-6, entries, batch.tables, PLACE, batch.gates)
        results.append((x, residual))
    rows = torch.tensor([p is None for p in batch.programs], device=device)
    for a, b in zip(*results, strict=True):
        assert torch.equal(bits(a[rows]), bits(b[rows]))
        assert not torch.equal(bits(a[~rows]), bits(b[~rows]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_move_keeps_its_bits(dtype: torch.dtype, device: str) -> None:
    """A closed gate, a block that adds nothing, and the columns beside those that a block names."""
    d = 33
    closed = lower.add(0, torch.ones(d), 1.0, False, gate=0)
    nothing = lower.add(0, torch.zeros(d), 1.0, False, preserve_norm=True)
    one = lower.neurons(0, torch.tensor([5]), d, "add", 1.0)
    programs = [Program((closed, nothing), d), Program((one,), d)]
    for with_residual in (False, True):
        batch = Batch.make(device, programs, d, dtype, with_residual=with_residual)
        batch.gates.zero_()
        batch.x[:, ::2] = -0.0
        batch.x[:, 1] = float("nan")
        before = batch.x.clone()
        edit(batch.x, batch.residual, batch.entries, batch.tables, PLACE, batch.gates)
        changed = bits(batch.x) != bits(before)
        assert changed.nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_odd_numbers_stay_in_their_row(value: float, device: str) -> None:
    programs = [p for p in SOME if p.blocks for _ in range(2)]
    clean, odd = (Batch.make(device, programs, 72, with_residual=False) for _ in range(2))
    odd.x[::2, 7] = value
    gates = torch.ones(len(programs), N_GATES, device=device)
    for batch in (clean, odd):
        edit(batch.x, None, batch.entries, batch.tables, PLACE, gates, *batch.sizes())
    assert torch.equal(odd.x[1::2], clean.x[1::2])
    if value != value:
        assert odd.x[::2].isnan().any(1).all(), "a NaN is not clipped away"


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_float_is_read_and_rounded_as_torch_does(dtype: torch.dtype, device: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(32, 2048).to(device)
    for shift in (1e-7, 0.37, -3.0, 6e4):
        program = Program((lower.add(0, torch.full((2048,), shift), 1.0, False),), 2048)
        tables, entries = fill(device, [program] * 32)
        x = every.clone()
        edit(x, None, entries, tables, PLACE)
        torch.testing.assert_close(x, (every.float() + shift).to(dtype), rtol=0, atol=0, equal_nan=True)


# Tables that change


def test_an_entry_that_comes_to_mean_another_plan(device: str) -> None:
    d = 33
    batch = Batch.make(device, [draw(d, 1), None, draw(d, 2)], d)
    batch.check(edit)
    batch.tables.remove(int(batch.entries[0]))
    later = draw(d, 3, n_blocks=2)
    batch.entries[0] = batch.tables.add({PLACE: later})
    batch.programs = [later, *batch.programs[1:]]
    batch.check(edit)


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_a_captured_graph_is_right_for_later_plans(device: str) -> None:
    """Every replay sees other input, other rows and another program, in tables that stay where they are."""
    d, n, seed = 576, 16, fresh()
    tables = Tables(3, torch.device(device), entries=4, words=10000, floats=4 * 320 * d)
    entry = tables.add({PLACE: draw(d, seed)})
    entries = torch.full((n,), entry, dtype=torch.int32, device=device)
    x, residual = (torch.empty(n, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    gates, norms = torch.ones(n, N_GATES, device=device), torch.zeros(n, 8, device=device)
    squares = torch.zeros(n, device=device)
    cuda_edit.prepare(torch.device(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        edit(x, residual, entries, tables, PLACE, gates, norms, squares)

    def replay(own: Tensor, _1: object, _2: object, _3: object, _4: object, _5: object, *sizes: Tensor) -> None:
        x.copy_(own)
        graph.replay()
        own.copy_(x)
        if sizes:
            blocks = len(program.blocks)
            sizes[0][rows, :blocks] = norms[rows, :blocks]
            sizes[1][rows] = squares[rows]

    for later in range(seed + 1, seed + 9):
        program, rows = draw(d, later), random.Random(later).sample(range(n), 5)
        tables.remove(entry)
        entry = tables.add({PLACE: program})
        entries.fill_(-1)
        entries[rows] = entry
        batch = Batch.make(device, [program if i in rows else None for i in range(n)], d, torch.bfloat16, seed=later)
        assert batch.residual is not None
        residual.copy_(batch.residual)
        gates.copy_(gates_of(n, later))
        batch.check(replay)


# Calls


def test_bad_calls_edit_nothing(device: str) -> None:
    good = check_bad_calls(edit, edit_and_norm, device)
    with pytest.raises(ValueError, match="up to"):
        edit(**{**good, "x": torch.zeros(1, 2**17, device=device)})
    edit(**good)
    assert good["x"].all()


def test_the_kernel_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="not on cpu"):
        cuda_edit.prepare(torch.device("cpu"))


def test_rows_that_are_too_wide_are_told_of_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_edit, "library", lambda device: SimpleNamespace(max_shared=1000))
    cuda_edit.prepare(torch.device("cpu"), 248)
    with pytest.raises(ValueError, match=r"249 wide; .* up to 248"):
        cuda_edit.prepare(torch.device("cpu"), 249)
