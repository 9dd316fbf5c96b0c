"""The Triton kernel against the reference in float64: on a GPU, and through Triton's interpreter on the CPU.

Triton decides when it is imported whether it interprets, and vLLM imports it early. So ``test_interpreter`` runs this
module in a process of its own, where the other tests find the device ``cpu``.
"""

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steersman.kernels.norms import Form
from steersman.kernels.program import Block, Program, Rows
from steersman.kernels.tables import MAX_ROWS, Tables
from steersman.kernels.triton_edit import edit, edit_and_norm, prepare, shape
from steersman.steering import lower
from tests.kernels.device_checks import (
    DTYPES,
    FORMS,
    PLACE,
    POISON,
    Batch,
    bits,
    check_bad_calls,
    check_roundings,
    deal,
    fill,
)
from tests.kernels.programs import COLUMNAR, CONSTANT, N_GATES, draw, ops, vector
from tests.kernels.row_checks import (
    captured,
    check_gates,
    check_gates_hold_at_later_places,
    check_injection,
    check_injection_of_nothing,
    check_probes,
    check_replays,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_device = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else CUDA])
SOME = [Program((), 70), *(draw(70, seed) for seed in range(4)), draw(70, 6, COLUMNAR), draw(70, 7, CONSTANT)]


def steps(dtype: torch.dtype) -> float:
    """How far off a rounding may be: the interpreter cuts bfloat16 off where a GPU rounds."""
    return 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5


def check(batch: Batch, launch: Callable[..., None] = edit) -> None:
    batch.check(launch, steps(batch.x.dtype))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_interpreter() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-m", "not gpu", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]


# Against the reference


@on_device
@pytest.mark.parametrize("op", list(ops(40, random.Random(0), torch.Generator())))
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_op(op: str, dtype: torch.dtype, device: str) -> None:
    for d in (33, 70):
        g = torch.Generator().manual_seed(d)
        program = Program((ops(d, random.Random(0), g)[op](0),), d)
        check(Batch.make(device, [program, None, program], d, dtype))


@on_device
@pytest.mark.parametrize("d", [1, 33, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_mixed_batch(d: int, dtype: torch.dtype, with_residual: bool, device: str) -> None:
    for seed in range(1 if INTERPRETED else 4):
        kinds: list[tuple[str, ...] | None] = [None, None, None, COLUMNAR, CONSTANT, ("neurons", "ablate", "add")]
        if d == 1:  # no plane to turn in
            kinds = [("add", "ablate", "clamp", "neurons"), CONSTANT]
        programs = deal([draw(d, 10 * seed + i, k) for i, k in enumerate(kinds)], 9, seed)
        check(Batch.make(device, programs, d, dtype, with_residual=with_residual, gap=10 * seed, seed=seed))


@on_device
@pytest.mark.parametrize("k", [0, 1, 7, 64])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_row_counts(k: int, columns: bool, n: int, device: str) -> None:
    d, g = 130, torch.Generator().manual_seed(k)
    if columns:
        block = lower.neurons(0, torch.randperm(d, generator=g)[:k], d, "set", 1.0)
    else:
        block = lower.affine(0, torch.linalg.qr(vector(g, d, k)).Q.T, vector(g, k, d) / 11, vector(g, k), 0.5)
    check(Batch.make(device, [Program((block, replace(block, preserve_norm=True)), d)] * n, d))


@on_device
@pytest.mark.parametrize("reads", ["nothing", "its own", "other columns", "dense"])
@pytest.mark.parametrize("relative", [False, True])
def test_columns_however_they_are_read(reads: str, relative: bool, device: str) -> None:
    """Columns named twice and three times, in no order, with numbers of their own."""
    d, g = 70, torch.Generator().manual_seed(2)
    columns = torch.tensor([9, 3, 9, 69, 0, 64, 9, 3])
    own = Rows(d, columns=columns)
    read = {"nothing": None, "its own": own, "other columns": Rows(d, columns=columns.flip(0)),
            "dense": Rows(d, dense=vector(g, 8, d) / 8)}[reads]  # fmt: skip
    numbers = {name: vector(g, 8) for name in ("bias", "threshold", "gain", "offset")}
    low, high = torch.full((8,), -1.0), vector(g, 8).abs()
    for write in (own, Rows(d, dense=vector(g, 8, d) / 8)):
        block = Block(0, write, read, low=low, high=high, relative=relative, **numbers)
        blocks = (block, replace(block, only_if_active=True, gate=1), replace(block, preserve_norm=True, gate=2))
        check(Batch.make(device, [Program(blocks, d)] * 2, d))


@on_device
def test_blocks_of_many_columns_have_one_size(device: str) -> None:
    d, rows = 1500, MAX_ROWS + 5
    some = torch.randperm(d, generator=torch.Generator().manual_seed(rows))[:rows]
    blocks = (lower.neurons(0, some, d, "set", 2.0), lower.neurons(1, some, d, "scale", -1.0, gate=0),
              lower.ablate(2, torch.ones(1, d), 1.0))  # fmt: skip
    check(Batch.make(device, [Program(blocks, d)], d, torch.bfloat16, seed=1))


@on_device
def test_all_flags_at_once(device: str) -> None:
    d, flags = 96, ("relative", "only_if_active", "preserve_norm")
    programs = []
    for mask in range(16):
        block = draw(d, 50 + mask, ("feature", "rotate", "clamp", "neurons"), 1).blocks[0]
        on = {flag: bool(mask >> i & 1) for i, flag in enumerate(flags)}
        programs.append(Program((replace(block, **on, gate=1 if mask & 8 else -1), block), d))
    check(Batch.make(device, programs, d))


@on_device
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_that_follows(dtype: torch.dtype, form: Form, device: str) -> None:
    d = 130
    programs = deal([draw(d, 20), draw(d, 21), draw(d, 22, COLUMNAR)], 5, 3)
    weight = vector(torch.Generator().manual_seed(9), d).to(dtype).to(device)
    for given in (weight, None):
        Batch.make(device, programs, d, dtype, gap=6).check_norm(edit, edit_and_norm, given, form, steps(dtype))


@on_device
def test_norm_has_the_roundings_that_are_asked_for(device: str) -> None:
    check_roundings(edit_and_norm, device)


# Gates


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_read(dtype: torch.dtype, device: str) -> None:
    decided = set[bool]()
    for seed, d in enumerate((33, 70)):
        decided |= check_gates(edit, device, d, dtype, 7 * d + seed, gap=6 * seed)
    assert decided == {False, True}


@on_device
def test_gates_hold_at_later_places(device: str) -> None:
    check_gates_hold_at_later_places(edit, device)


# Injections


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_injections(dtype: torch.dtype, device: str) -> None:
    check_injection(edit, device, 70, dtype, 350, steps(dtype))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_injection_of_nothing(dtype: torch.dtype, device: str) -> None:
    check_injection_of_nothing(edit, device, dtype)


@pytest.mark.parametrize("device", [CUDA])
def test_captured_launches_keep_what_later_plans_need(device: str) -> None:
    check_replays(edit, device, captured)


# Probes


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_probes(dtype: torch.dtype, device: str) -> None:
    check_probes(edit, edit_and_norm, device, 70, dtype, 211)


# Bits


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_neighbours(dtype: torch.dtype, device: str) -> None:
    batch = Batch.make(device, deal(SOME, 12, 1), 70, dtype)
    assert batch.residual is not None
    before = batch.x.clone()
    edit(batch.x, batch.residual, batch.entries, batch.tables, PLACE, batch.gates)
    for i in range(len(before)):
        alone, rest = before[i : i + 1].clone(), batch.residual[i : i + 1].clone()
        edit(alone, rest, batch.entries[i : i + 1].clone(), batch.tables, PLACE, batch.gates[i : i + 1].clone())
        assert torch.equal(bits(alone[0]), bits(batch.x[i]))
    if any(p is not None and p.blocks for p in batch.programs):
        assert not torch.equal(bits(before), bits(batch.x))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_move_keeps_its_bits(dtype: torch.dtype, device: str) -> None:
    """Unedited rows, closed gates and columns that no row names: -0 stays -0, a NaN the same NaN."""
    d = 33
    closed = Program((lower.add(0, torch.ones(d), 1.0, False, gate=0, preserve_norm=True),), d)
    batch = Batch.make(device, [None, closed, Program((), d), draw(d, 1, ("neurons",), 1)], d, dtype)
    batch.x.fill_(-0.0)
    batch.x[:, 1] = float("nan")
    batch.x[:, 2] = float("inf")
    batch.x[3].fill_(-0.0)
    before = batch.whole.clone()
    norms, squares = batch.sizes()
    gates = torch.ones(4, N_GATES, device=device)
    gates[1, 0] = 0
    edit(batch.x, None, batch.entries, batch.tables, PLACE, gates, norms, squares)
    assert norms[1, 0] == 0
    named = batch.programs[3].blocks[0].write.columns  # type: ignore[union-attr]
    changed = (bits(batch.whole) != bits(before)).nonzero().cpu()
    assert set(changed[:, 0].tolist()) <= {4}
    assert 0 < len(changed) <= len(set(named.tolist()))  # type: ignore[union-attr]


@on_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_odd_numbers_stay_in_their_row(value: float, device: str) -> None:
    programs = [p for p in SOME[1::2] for _ in range(2)]
    clean, odd = (Batch.make(device, programs, 70, with_residual=False) for _ in range(2))
    odd.x[::2, 7] = value
    gates = torch.ones(len(programs), N_GATES, device=device)
    for batch in (clean, odd):
        edit(batch.x, None, batch.entries, batch.tables, PLACE, gates, *batch.sizes())
    assert torch.equal(odd.x[1::2], clean.x[1::2])
    if value != value:
        assert odd.x[::2].isnan().any(1).all(), "a NaN stays one"


@on_device
@pytest.mark.parametrize("dtype", DTYPES[2:] if INTERPRETED else DTYPES[1:])
def test_every_half_float_is_read_and_rounded_as_torch_does(dtype: torch.dtype, device: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(8, 8192).to(device)
    for shift in (1e-7, 0.37, -3.0, 6e4):
        program = Program((lower.add(0, torch.full((8192,), shift), 1.0, False),), 8192)
        tables, entries = fill(device, [program] * 8)
        x = every.clone()
        edit(x, None, entries, tables, PLACE)
        torch.testing.assert_close(x, (every.float() + shift).to(dtype), rtol=0, atol=0, equal_nan=True)


# Tables that change


@pytest.mark.parametrize("device", [CUDA])
def test_a_captured_graph_is_right_for_later_plans(device: str) -> None:
    """Every replay sees other input, other rows and another program, in arrays that stay where they are."""
    d, n = 576, 16
    batch = Batch.make(device, [draw(d, 0)] * n, d, torch.bfloat16)
    batch.tables = Tables(3, torch.device(device), entries=2, words=20000, floats=5 * 2 * 64 * d)
    batch.norms = torch.empty(n + 1, 6, device=device)
    given = (batch.x, batch.residual, batch.entries, batch.tables, PLACE, batch.gates)
    graphs = []
    for sizes in ((), (batch.norms, batch.squares)):
        batch.entries.fill_(-1)
        edit(*given, *sizes)  # compiles
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            edit(*given, *sizes)

    def replay(*arguments: object) -> None:
        graphs[len(arguments) > 6].replay()

    for seed in range(1, 9):
        program, other = draw(d, seed), Batch.make(device, [None] * n, d, torch.bfloat16, seed=seed)
        entry = batch.tables.add({PLACE: program})
        rows = random.Random(seed).sample(range(n), 5)
        batch.programs = [program if i in rows else None for i in range(n)]
        batch.entries.fill_(-1)
        batch.entries[rows] = entry
        assert batch.residual is not None
        assert other.residual is not None
        for mine, fresh in ((batch.whole, other.whole), (batch.residual, other.residual), (batch.gates, other.gates)):
            mine.copy_(fresh)
        check(batch, replay)
        batch.tables.remove(entry)


@on_device
def test_gates_and_norms_that_were_given_too_narrow_are_not_overrun(device: str) -> None:
    """As a captured graph may hold them: a gate past the last column is closed, a norm past it is not written."""
    d = 33
    blocks = [lower.add(i, torch.ones(d), 1.0, False, gate=gate) for i, gate in enumerate((-1, 0, 2))]
    batch = Batch.make(device, [Program(tuple(blocks), d)], d, with_residual=False)
    norms, _ = batch.sizes()
    before = batch.x.clone()
    batch.tables.gates = batch.tables.blocks = 0
    edit(batch.x, None, batch.entries, batch.tables, PLACE, torch.ones(1, 3, device=device)[:, :2], norms[:, :2])
    torch.testing.assert_close(batch.x, before + 2)
    assert (norms[0, :2] > 5).all()
    assert (norms[0, 2:] == POISON).all()


@on_device
def test_an_entry_that_comes_to_mean_another_plan(device: str) -> None:
    d = 33
    batch = Batch.make(device, [draw(d, 1), None, draw(d, 2)], d)
    check(batch)
    batch.tables.remove(int(batch.entries[0]))
    later = draw(d, 3, n_blocks=2)
    batch.entries[0] = batch.tables.add({PLACE: later})
    batch.programs = [later, *batch.programs[1:]]
    check(batch)


# Calls


def test_bad_calls_edit_nothing() -> None:
    check_bad_calls(edit, edit_and_norm, "cpu")


@needs_triton
def test_a_cpu_needs_the_interpreter() -> None:
    if INTERPRETED:
        prepare(torch.device("cpu"))
    else:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            prepare(torch.device("cpu"))


def test_triton_is_imported_at_the_first_launch_only() -> None:
    script = "import sys, steersman.kernels.triton_edit; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("norm", "width", "arch"), [(False, 4096, 80), (True, 5120, 90), (False, 28672, 90)])
def test_compiles_for_gpus(norm: bool, width: int, arch: int) -> None:
    """With all that is optional, where no GPU is needed; in the shared memory that every GPU has."""
    import triton
    from triton.backends.compiler import GPUTarget

    from steersman.kernels import triton_device

    lanes, warps = shape(width)
    constants = {"WIDTH": width, "BLOCK": lanes, "NORM": norm, "FORM": 4}
    types = dict.fromkeys(("x", "residual", "weight"), "*bf16")
    types |= dict.fromkeys(("gates", "norms", "squares", "vectors", "carry", "values"), "*fp32")
    types |= (
        dict.fromkeys(("entries", "starts", "code"), "*i32") | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    )
    signature = {name: types.get(name, "i32") for name in triton_device.edit.arg_names}
    source = triton.compiler.ASTSource(triton_device.edit, signature, constants)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert compiled.metadata.shared <= 48 * 1024
