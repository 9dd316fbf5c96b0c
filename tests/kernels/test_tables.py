"""The tables that device kernels read: what is where, who shares what, and what is left after a failure."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.kernels import tables
from steersman.kernels.program import Block, Code, Program, Reading, Rows
from steersman.kernels.tables import (
    BLOCK_WORDS,
    COSINE,
    DECIDES,
    LOCAL,
    MAX_ROWS,
    NONE,
    PROGRAM_WORDS,
    READ_COLUMNS,
    READS,
    ROW_WORDS,
    UNIT,
    WRITE_COLUMNS,
    ProgramTooLarge,
    Space,
    Tables,
    TablesFull,
    supports,
)
from steersman.steering import lower
from tests.kernels.programs import COLUMNAR, CONSTANT, draw, naive, vector

CPU = torch.device("cpu")
FLAGS = {"relative": tables.RELATIVE, "only_if_active": tables.ONLY_IF_ACTIVE, "preserve_norm": tables.PRESERVE_NORM}
SCALARS = ("bias", "threshold", "gain", "offset", "low", "high")


def make(places: int = 3, entries: int = 8, words: int = 4000, floats: int = 20000) -> Tables:
    return Tables(places, CPU, entries=entries, words=words, floats=floats)


def state(t: Tables) -> tuple[object, ...]:
    """All that a failed call must leave as it was."""
    arrays = tuple(a.numpy().tobytes() for a in (t.starts, t.code, t.vectors))
    return arrays, t.used_floats, t._code.free, len(t), t.gates, t.blocks


def read_back(t: Tables, entry: int, place: int, width: int) -> Program:
    """The program that the arrays hold, with its blocks as they are laid out, all directions dense."""
    code, at = t.code.numpy(), int(t.starts[entry, place])
    assert at > 0
    blocks, indices = [], []
    at, n = at + PROGRAM_WORDS, int(code[at])
    for _ in range(n):
        flags, count, gate, index = (int(w) for w in code[at : at + BLOCK_WORDS])
        at += BLOCK_WORDS
        rows = code[at : at + count * ROW_WORDS].reshape(count, ROW_WORDS)
        at += count * ROW_WORDS

        def directions(words: "np.ndarray", columns: int) -> Rows:
            if columns:
                return Rows(width, columns=torch.from_numpy(words.astype(np.int64)))
            units = t.vectors.view(-1, UNIT)
            found = [units[w : w + -(-width // UNIT)].flatten() for w in words.tolist()]
            assert all((v[width:] == 0).all() for v in found)
            return Rows(width, dense=torch.stack([v[:width] for v in found]) if found else torch.zeros(0, width))

        read = directions(rows[:, 0], flags & READ_COLUMNS) if flags & READS else None
        assert flags & READS or (rows[:, 0] == NONE).all()
        scalars = torch.from_numpy(rows[:, 2:].copy()).view(torch.float32).T
        blocks.append(
            Block(
                index,
                directions(rows[:, 1], flags & WRITE_COLUMNS),
                read,
                **dict(zip(SCALARS, scalars, strict=True)),
                **{name: bool(flags & bit) for name, bit in FLAGS.items()},  # type: ignore[arg-type]
                gate=gate,
            )
        )
        indices.append((index, flags))
    for (_, flags), block in zip(indices, blocks, strict=True):
        written = block.write.columns
        if written is not None:
            assert (written.diff() >= 0).all(), "columns are in order"
            own = block.read is None or (block.read.columns is not None and torch.equal(block.read.columns, written))
            assert bool(flags & LOCAL) == own
        else:
            assert not flags & LOCAL
    assert [i for i, _ in indices] == sorted(i for i, _ in indices)
    return Program(tuple(blocks), width)


def check_same(got: Program, want: Program) -> None:
    """Both do the same to any row, whatever the gates."""
    x = vector(torch.Generator().manual_seed(1), 4, want.width)
    gates = torch.tensor([[0.0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
    after, sizes = naive(x, got, gates)
    wanted, wanted_sizes = naive(x, want, gates)
    torch.testing.assert_close(after, wanted, rtol=1e-10, atol=1e-10)
    squares = torch.zeros(4, len(want.blocks), dtype=torch.float64)
    for i, block in enumerate(got.blocks):
        squares[:, block.intervention] += sizes[:, i] ** 2
    torch.testing.assert_close(squares.sqrt(), wanted_sizes, rtol=1e-10, atol=1e-10)


# Space


@given(st.integers(0, 3), st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_space_is_first_fit(reserved: int, steps: list[tuple[bool, int]]) -> None:
    """Against an array of flags: the lowest place where all units are free, or TablesFull where there is none."""
    size = 32
    space, taken = Space(size, reserved), [i < reserved for i in range(size)]
    held: list[tuple[int, int]] = []
    for take, n in steps:
        if take or not held:
            first = next((i for i in range(size - n + 1) if not any(taken[i : i + n])), None)
            if first is None:
                with pytest.raises(TablesFull):
                    space.take(n)
            else:
                assert space.take(n) == first
                held.append((first, n))
                taken[first : first + n] = [True] * n
        else:
            first, n = held.pop(n % len(held))
            space.give(first, n)
            taken[first : first + n] = [False] * n
        assert space.free == taken.count(False)


@pytest.mark.parametrize(("start", "count"), [(4, 2), (2, 4), (6, 2), (0, 1), (9, 8)])
def test_space_takes_back_only_what_it_gave(start: int, count: int) -> None:
    space = Space(12, reserved=0)
    assert [space.take(n) for n in (4, 4, 4)] == [0, 4, 8]
    space.give(0, 2)
    space.give(5, 2)
    with pytest.raises(ValueError, match="not all taken"):
        space.give(start, count)
    assert space.free == 4


# What is laid out


@pytest.mark.parametrize("d", [1, 33, 40])
@pytest.mark.parametrize("kinds", [None, COLUMNAR, CONSTANT, ("neurons", "ablate", "add")])
def test_programs_read_back(d: int, kinds: tuple[str, ...] | None) -> None:
    if d == 1:
        kinds = ("add", "neurons") if kinds is None else tuple(k for k in kinds if "heads" not in k)
    t = make()
    wanted = {}
    for seed in range(4):
        programs = {place: draw(d, 10 * seed + place, kinds) for place in (0, 2)}
        wanted[t.add(programs)] = programs
    for entry, programs in wanted.items():
        assert t.starts[entry, 1] == 0
        for place, program in programs.items():
            check_same(read_back(t, entry, place, d), program)
    all_blocks = [p.blocks for programs in wanted.values() for p in programs.values()]
    assert t.blocks == max(map(len, all_blocks))
    assert t.gates == max(b.gate + 1 for blocks in all_blocks for b in blocks)


def test_columns_are_sorted_with_all_that_belongs_to_them() -> None:
    """A row's scalars and its dense read go where its column goes."""
    g, d = torch.Generator().manual_seed(3), 24
    columns = torch.tensor([7, 3, 7, 0, 23, 3])
    numbers = {name: vector(g, 6) for name in SCALARS if name not in ("low", "high")}
    bounds = {"low": torch.full((6,), -1.0), "high": torch.arange(6.0)}
    for read in (None, Rows(d, dense=vector(g, 6, d)), Rows(d, columns=columns), Rows(d, columns=columns.flip(0))):
        block = Block(0, Rows(d, columns=columns), read, **numbers, **bounds)  # type: ignore[arg-type]
        t = make()
        entry = t.add({1: Program((block,), d)})
        back = read_back(t, entry, 1, d)
        check_same(back, Program((block,), d))
        order = [3, 1, 5, 0, 2, 4]
        assert back.blocks[0].high.tolist() == order


def test_gates_lie_before_the_blocks_and_share_directions() -> None:
    v = vector(torch.Generator().manual_seed(0), 33)
    t, step = make(), Program((lower.add(0, v, 1.0, False, gate=1),), 33)
    read = {4: Reading(v, cosine=True, above=0.25), 2: Reading(v, bias=0.5, threshold=0.75, below=2.0)}
    entry = t.add({0: Code(step.blocks, read), 2: Code(gates={0: Reading(v)})})
    assert (t.used_floats, t.gates, t.blocks) == (36, 5, 1)
    code, at = t.code.numpy(), int(t.starts[entry, 0])
    assert code[at] == 3
    nan = None
    for k, (flags, gate, numbers) in enumerate(
        [(DECIDES | READS | COSINE, 4, [0.0, nan, 0, 0, 0.25, nan]), (DECIDES | READS, 2, [0.5, 0.75, 0, 0, nan, 2.0])]
    ):
        words = code[at + 1 + 12 * k :][:12]
        assert words[:6].tolist() == [flags, 1, gate, NONE, 0, NONE]
        assert [None if math.isnan(n) else n for n in words[6:].view(np.float32).tolist()] == numbers
    assert (code[at + 25], code[at + 27]) == (0, 1)  # the add: no flags, gate 1
    assert t.starts[entry, 1] == 0
    assert code[int(t.starts[entry, 2])] == 1
    t.remove(entry)
    assert (t.used_floats, t.gates) == (0, 0)


def test_a_direction_is_stored_once_whoever_uses_it() -> None:
    t, v = make(), vector(torch.Generator().manual_seed(0), 33)
    plain = Program((lower.add(0, v, 1.0, False), lower.add(1, v, 1.0, False)), 33)
    first = t.add({0: plain, 1: plain})
    assert t.used_floats == 36  # 33, in units of 4
    second = t.add({2: Program((lower.add(0, 2 * v, 0.5, False), lower.ablate(1, v[None], 1.0)), 33)})
    assert t.used_floats == 72
    t.remove(first)
    check_same(read_back(t, second, 2, 33), Program((lower.add(0, v, 1.0, False), lower.ablate(1, v[None], 1.0)), 33))
    assert t.used_floats == 72
    t.remove(second)
    assert t.used_floats == 0
    assert t._code.free == len(t.code) - 1


def test_entries_come_and_go() -> None:
    """Whatever was added and removed before, every entry there is reads back; in the end all is free."""
    rng, t = random.Random(5), make(entries=5)
    held: dict[int, Program] = {}
    for step in range(60):
        if held and (rng.random() < 0.4 or len(held) == 5):
            entry = rng.choice(list(held))
            t.remove(entry)
            del held[entry]
        else:
            program = draw(33, rng.randrange(8) if step % 2 else step)
            try:
                held[t.add({rng.randrange(2): program, 2: program})] = program
            except TablesFull:
                continue
        assert len(t) == len(held)
        for entry, program in held.items():
            check_same(read_back(t, entry, 2, 33), program)
        assert t.blocks == max((len(p.blocks) for p in held.values()), default=0)
    for entry in held:
        t.remove(entry)
    fresh = make(entries=5)
    assert (t.used_floats, t._code.free, t.gates, t.blocks) == (0, fresh._code.free, 0, 0)


def test_an_entry_given_anew_has_nothing_of_the_old_one() -> None:
    t = make(entries=1)
    t.remove(t.add({0: draw(33, 1), 1: draw(33, 2)}))
    entry = t.add({2: draw(33, 3)})
    assert t.starts[entry, :2].tolist() == [0, 0]
    assert t.starts[entry, 2] > 0
    with pytest.raises(KeyError):
        t.remove(entry + 1)


# What does not fit


def too_many_rows() -> Program:
    return Program((lower.add(0, torch.ones(33), 3.0, False), _dense(MAX_ROWS + 1, 33)), 33)


def _dense(rows: int, d: int) -> Block:
    return lower.affine(1, torch.ones(rows, d), torch.zeros(rows, d), torch.zeros(rows), 1.0)


@pytest.mark.parametrize(
    ("error", "room", "last"),
    [
        (TablesFull, {"floats": 36 * 6}, lambda: draw(33, 5, ("ablate_subspace",), 5)),
        (TablesFull, {"words": 60}, lambda: draw(33, 1, CONSTANT, 5)),
        (TablesFull, {"entries": 1}, lambda: draw(33, 1)),
        (ProgramTooLarge, {}, too_many_rows),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(
    error: type[Exception], room: dict[str, int], last: Callable[[], Program]
) -> None:
    t = make(**room)
    shared = draw(33, 1, CONSTANT, 1)
    kept = t.add({0: shared})
    before = state(t)
    for _ in range(3):
        with pytest.raises(error):
            t.add({0: shared, 1: draw(33, 2, CONSTANT, 2), 2: last()})
        assert state(t) == before
    check_same(read_back(t, kept, 0, 33), shared)


@pytest.mark.parametrize("place", [-1, 3])
def test_a_place_that_is_not_there(place: int) -> None:
    t = make()
    before = state(t)
    with pytest.raises(IndexError, match="0 to 2"):
        t.add({0: draw(33, 1), place: draw(33, 2)})
    assert state(t) == before


def columnar(columns: Tensor, d: int, **flags: object) -> Program:
    return Program((lower.neurons(0, columns, d, "set", 2.0, **flags), lower.add(1, torch.ones(d), 1.0, False)), d)


@pytest.mark.parametrize("rows", [MAX_ROWS, MAX_ROWS + 1, 3 * MAX_ROWS])
def test_many_columns_are_laid_out_in_parts(rows: int) -> None:
    d = 4 * MAX_ROWS
    program = columnar(torch.randperm(d, generator=torch.Generator().manual_seed(0))[:rows], d, gate=1)
    t = make(words=40000)
    back = read_back(t, t.add({0: program}), 0, d)
    assert [b.intervention for b in back.blocks] == [0] * math.ceil(rows / MAX_ROWS) + [1]
    assert all(b.count <= MAX_ROWS for b in back.blocks)
    check_same(back, program)
    assert t.blocks == 2
    assert supports(program)


def test_what_cannot_be_taken_apart_is_too_large() -> None:
    d, many = 4 * MAX_ROWS, torch.arange(MAX_ROWS + 1)
    whole = columnar(many, d)
    relative, kept = (Program((replace(whole.blocks[0], **{f: True}),), d) for f in ("relative", "preserve_norm"))
    elsewhere = Program((replace(whole.blocks[0], read=Rows(d, columns=many + 1)),), d)
    for program in (relative, kept, elsewhere, columnar(many // 2, d), Program((_dense(MAX_ROWS + 1, 8),), 8)):
        assert not supports(program)
        with pytest.raises(ProgramTooLarge, match=str(MAX_ROWS + 1)):
            make(words=40000).add({0: program})
    assert supports(columnar(many[:-1] // 2, d))


def test_a_shard_is_supported_where_it_needs_no_sum() -> None:
    assert not supports(Program((lower.ablate(0, torch.ones(1, 8), 1.0),), 8), sharded=True)
    assert supports(Program((lower.ablate(0, torch.ones(1, 8), 1.0),), 8))
    assert supports(Program((lower.add(0, torch.ones(8), 1.0, False),), 8), sharded=True)
    assert supports(Program((lower.neurons(0, torch.arange(3), 8, "scale", 0.0),), 8), sharded=True)


def test_a_thousand_plans_fit_in_a_gibibyte() -> None:
    """One vector at each of 32 layers, width 4096: a tenth of it in a tenth, counted where nothing is allocated."""
    layers, d, plans, nbytes = 32, 4096, 100, 2**30 // 10
    t = Tables(layers, torch.device("meta"), entries=2 * plans, words=nbytes // 64, floats=nbytes // 16 * 3)
    assert t.nbytes <= nbytes
    v = torch.ones(d)
    for plan in range(plans):
        programs = {}
        for layer in range(layers):
            v = v.clone()
            v[:2] = torch.tensor([plan, layer])
            programs[layer] = Program((lower.add(0, v, 1.0, False),), d)
        t.add(programs)
    assert t.used_floats == plans * layers * d
