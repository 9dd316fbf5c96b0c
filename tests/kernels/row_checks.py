"""What a device kernel must keep of rows from one place to later ones, or for whoever asks: gates, what is carried to
injections, and what probes read.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steersman.kernels.program import Code, Inject, Program, Reading, Source
from steersman.kernels.reference import edit as reference
from steersman.kernels.reference import inject, is_open
from steersman.kernels.reference import read as read_row
from steersman.kernels.tables import NONE, Buffers, Tables
from steersman.steering import lower
from tests.kernels.device_checks import (
    HALF_STEP,
    PLACE,
    PLACES,
    POISON,
    SMALLEST,
    SUMS,
    Batch,
    Edit,
    bits,
    deal,
)
from tests.kernels.programs import COLUMNAR, CONSTANT, draw, gates_of, vector


def reading(d: int, rng: random.Random, g: torch.Generator) -> Reading:
    """Of a coordinate, a cosine or a feature, with bounds that a few of many rows are between."""
    cosine, is_feature = rng.choice([(True, False), (False, False), (False, True)])
    direction = vector(g, d)
    direction /= direction.norm() * (1 if cosine else 3)
    above, below = rng.choice([(-0.05, None), (None, 0.05), (-0.5, 0.5), (0.0, None)])
    bias, threshold = (rng.gauss(0, 0.5), rng.choice([0.0, 0.4])) if is_feature else (0.0, None)
    return Reading(direction, cosine, bias, threshold, above, below)


def check_gates(edit: Edit, device: str, d: int, dtype: torch.dtype, seed: int, gap: int = 16) -> set[bool]:
    """Gates that rows read where some of them are edited: what the reference finds, and the edits are as without.

    Returns what was decided.
    """
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    programs = deal([draw(d, seed, ("add", "ablate", "neurons")), draw(d, seed + 1, CONSTANT)], 9, seed)
    batch = Batch.make(device, programs, d, dtype, gap=gap, seed=seed, with_residual=bool(seed % 2))
    before = batch.whole.clone()
    batch.gates = torch.rand(len(programs), 6, device=device).round()
    edit(batch.x, batch.residual, batch.entries, batch.tables, PLACE, batch.gates, *batch.sizes())
    plain, sizes = batch.whole.clone(), (batch.norms.clone(), batch.squares.clone())
    batch.whole.copy_(before)
    read = [{gate: reading(d, rng, g) for gate in rng.sample(range(3, 6), rng.randint(0, 3))} for _ in programs]
    n, floats = len(programs), 40 * (d + 4)
    tables = Tables(PLACES, torch.device(device), entries=n, words=20000, floats=n * floats)
    entries = [
        tables.add({PLACE: Code(p.blocks if p else (), some)}) if p or some else NONE
        for p, some in zip(programs, read, strict=True)
    ]
    stream = batch.x.cpu().double() + (0 if batch.residual is None else batch.residual.cpu().double())
    gates = batch.gates.clone()
    named = torch.tensor(entries, dtype=torch.int32, device=device)
    edit(batch.x, batch.residual, named, tables, PLACE, gates, *batch.sizes())
    assert torch.equal(bits(batch.whole), bits(plain)), "a reading changes no edit"
    edited = torch.tensor([p is not None for p in programs])
    assert torch.equal(batch.norms[:-1][edited], sizes[0][:-1][edited])
    assert (batch.norms[:-1][~edited] == POISON).all(), "a reading has no size"
    assert torch.equal(batch.squares[:-1][edited], sizes[1][:-1][edited])
    seen = set[bool]()
    for i, some in enumerate(read):
        untouched = [column for column in range(6) if column not in some]
        assert torch.equal(gates[i, untouched], batch.gates[i, untouched])
        for gate, one in some.items():
            value = float(read_row(stream[i : i + 1], one)[0])
            slack = SUMS * float(1 + stream[i].norm() * one.direction.norm())
            if any(b is not None and abs(value - b) < slack for b in (one.above, one.below, one.threshold)):
                continue
            want = bool(is_open(stream[i : i + 1], one)[0])
            assert gates[i, gate] == want
            seen.add(want)
    tables.gates, wide = 4, batch.gates.clone()  # as a captured graph may hold it
    edit(batch.x, batch.residual, named, tables, PLACE, wide[:, :4])
    assert torch.equal(wide[:, 4:], batch.gates[:, 4:])
    return seen


def check_gates_hold_at_later_places(edit: Edit, device: str) -> None:
    """Decided by one launch, looked up by the next; NaN is within no bounds."""
    d, axis = 40, torch.eye(40)[3]
    step = Program((lower.add(0, torch.ones(d), 1.0, False, gate=1),), d)
    tables = Tables(2, torch.device(device), entries=2, words=200, floats=400)
    entry = tables.add({0: Code(gates={1: Reading(axis, above=0.5)}), 1: step})
    x = torch.zeros(4, d, device=device)
    x[:, 3] = torch.tensor([1.0, 0.25, float("nan"), 2.0])
    entries = torch.tensor([entry, entry, entry, NONE], dtype=torch.int32, device=device)
    before, gates = x.clone(), torch.full((4, 2), 0.5, device=device)
    edit(x, None, entries, tables, 0, gates)
    assert torch.equal(bits(x), bits(before))
    assert gates.tolist() == [[0.5, 1], [0.5, 0], [0.5, 0], [0.5, 0.5]]
    edit(x, None, entries, tables, 1, gates)
    assert torch.equal(x[0], before[0] + 1)
    assert torch.equal(bits(x[1:]), bits(before[1:]))


@dataclass
class Injecting:
    """Rows of which some carry from places to later ones, and the activations that come to each place."""

    device: str
    codes: dict[int, Code]
    others: Program  # of some other rows
    tables: Tables
    entries: Tensor
    gates: Tensor  # [rows, gates] before the first place
    x: Tensor  # [places, rows, d]
    residual: Tensor | None

    @classmethod
    def make(cls, device: str, d: int, dtype: torch.dtype, seed: int, carry_rows: int = 99) -> "Injecting":
        g, rng, n = torch.Generator().manual_seed(seed), random.Random(seed), 7
        codes = cls.codes_of(d, seed)
        carry = torch.full((min(carry_rows, n), 3, -(-d // 8) * 8), float("nan"), device=device)
        gates = gates_of(n, seed).to(device)
        tables = Tables(
            4,
            torch.device(device),
            entries=3,
            words=4000 + 16 * d,
            floats=60 * (d + 4),
            buffers=Buffers(gates.clone(), carry, torch.zeros(0, 1, device=device)),
        )
        others = draw(d, seed + 9, ("ablate", "clamp"), 2)
        mine, other = tables.add(codes), tables.add(dict.fromkeys(range(4), others))
        entries = [mine, other, mine, NONE, *(rng.choice([mine, other, NONE]) for _ in range(n - 4))]
        rng.shuffle(entries)
        x, residual = vector(g, 4, n, d).to(dtype).to(device), vector(g, n, d).to(dtype).to(device)
        named = torch.tensor(entries, dtype=torch.int32, device=device)
        return cls(device, codes, others, tables, named, gates, x, residual if seed % 2 else None)

    @staticmethod
    def codes_of(d: int, seed: int) -> dict[int, Code]:
        g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        one, two, three = (draw(d, seed + i, ("ablate", "add_relative"), 1).blocks for i in range(3))
        return {
            0: Code(sources=(Source(0, 0.75, True), Source(2, -1.5, True))),
            1: Code((*one, Inject(0), *two, Inject(2, gate=1)), sources=(Source(0, rng.gauss(0, 1), False),)),
            2: Code((Inject(0, gate=0), *three), {2: Reading(vector(g, d), above=1e9)}),
            3: Code((Inject(0), *draw(d, seed + 4, COLUMNAR, 1).blocks, Inject(2, gate=2))),
        }

    def run(self, edit: Edit, sized: bool = False) -> tuple[Tensor, list[Tensor]]:
        """What becomes of ``x``, and the sizes of the blocks' changes by place."""
        out, sizes = self.x.clone(), []
        assert self.tables.buffers is not None
        self.tables.buffers.gates[: len(self.gates)] = self.gates
        for place in range(4):
            norms = torch.full((self.x.shape[1], self.tables.blocks), POISON, device=self.device)
            given = (norms, torch.empty(self.x.shape[1], device=self.device)) if sized else ()
            edit(out[place], self.residual, self.entries, self.tables, place, None, *given)
            sizes.append(norms)
        return out, sizes

    def wanted(self, row: int) -> tuple[Tensor, list[Tensor]]:
        """[places, d] the row in float64, and the sizes."""
        gates = self.gates[row : row + 1].cpu().double()
        carry = torch.zeros(3, 1, self.x.shape[2], dtype=torch.float64)
        out, sizes = [], []
        for place, code in self.codes.items():
            own = self.x[place, row : row + 1].cpu().double()
            stream = own if self.residual is None else own + self.residual[row : row + 1].cpu().double()
            for gate, one in code.gates.items():
                gates[0, gate] = float(is_open(stream, one))
            now, moved = stream.clone(), torch.zeros(1, len(code.blocks), dtype=torch.float64)
            for i, block in enumerate(code.blocks):
                if isinstance(block, Inject):
                    change = inject(now, carry[block.slot]) * (1 if block.gate < 0 else gates[0, block.gate])
                    moved[0, i] = change.norm()
                else:
                    change = reference(now, Program((block,), own.shape[1]), gates, moved[:, i : i + 1])
                now = now + change
            for source in code.sources:
                carry[source.slot] += source.weight * stream
            out.append((own + now - stream)[0])
            sizes.append(moved[0])
        return torch.stack(out), sizes


def check_probes(edit: Edit, edit_and_norm: Edit, device: str, d: int, dtype: torch.dtype, seed: int) -> None:
    """What is read after all edits of a place, as rounded, and before a norm; more than a kernel reads at once."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    programs = [draw(d, seed, n_blocks=2), None, draw(d, seed + 1, COLUMNAR), draw(d, seed + 2, CONSTANT), None, None]
    batch = Batch.make(device, programs, d, dtype, gap=rng.choice([6, 16]), seed=seed, with_residual=bool(seed % 2))
    before = batch.whole.clone()
    edit(batch.x, batch.residual, batch.entries, batch.tables, PLACE, batch.gates)
    edited = batch.whole.clone()
    batch.whole.copy_(before)
    counts = (3, 1, 0, 35, 70, 0)
    probes = [{c: replace(reading(d, rng, g), cosine=False) for c in rng.sample(range(80), count)} for count in counts]
    floats = (d + 4) * (sum(counts) + sum(2 * p.rows for p in programs if p))
    values = torch.full((5, 75), POISON, device=device)
    room = Buffers(batch.gates, torch.zeros(0, 1, 8, device=device), torch.zeros(5, 80, device=device))
    tables = Tables(
        PLACES, torch.device(device), entries=6, words=4000 + 16 * d, floats=2 * floats + 1000, buffers=room
    )
    entries = [
        tables.add({PLACE: Code(p.blocks if p else (), probes=some)}) if p or some else NONE
        for p, some in zip(programs, probes, strict=True)
    ]
    entries[5] = entries[4]  # a row past the last of the values
    tables.buffers = replace(room, values=values)  # and columns past the last, as a captured graph may hold it
    named = torch.tensor(entries, dtype=torch.int32, device=device)
    for _ in range(2):
        batch.whole.copy_(before)
        edit(batch.x, batch.residual, named, tables, PLACE)
        assert torch.equal(bits(batch.whole), bits(edited)), "a probe changes nothing"
        stream = batch.x.cpu().double() + (0 if batch.residual is None else batch.residual.cpu().double())
        for i, some in enumerate(probes[:5]):
            for column in range(75):
                if (one := some.get(column)) is None:
                    assert values[i, column] == POISON
                    continue
                slack = SUMS * float(1 + stream[i].norm() * one.direction.norm())
                plain = float(read_row(stream[i : i + 1], replace(one, threshold=None))[0])
                if one.threshold is None or abs(plain - one.threshold) > slack:
                    assert abs(float(values[i, column]) - float(read_row(stream[i : i + 1], one)[0])) <= slack
    if batch.residual is not None:
        plain = values.clone()
        batch.whole.copy_(before)
        edit_and_norm(batch.x, batch.residual.clone(), None, 1e-6, named, tables, PLACE)
        rounding = 2.02 * HALF_STEP[dtype] * stream.norm(dim=1).max().float()  # directions are at most 1 long
        torch.testing.assert_close(values, plain, rtol=0, atol=float(rounding) + 1e-4)


def check_injection(edit: Edit, device: str, d: int, dtype: torch.dtype, seed: int, steps: float = 0.5) -> None:
    """Against the formula in float64; neighbours' bits are those of a batch without it."""
    batch = Injecting.make(device, d, dtype, seed)
    out, _ = batch.run(edit)
    again, sizes = batch.run(edit, sized=True)
    assert torch.equal(bits(again), bits(out)), "neither measuring nor what was carried before changes anything"
    mine = (batch.entries == batch.entries.new_tensor([0])).cpu()
    for row in range(len(mine)):
        if batch.entries[row] == NONE:
            assert torch.equal(bits(out[:, row]), bits(batch.x[:, row]))
        elif mine[row]:
            want, moved = batch.wanted(row)
            length = 3 * (want.norm() + batch.x[:, row].cpu().double().norm() + sum(m.sum() for m in moved))
            rounding = 2.02 * steps * HALF_STEP[dtype] * want.abs() + SMALLEST[dtype]
            assert ((out[:, row].cpu().double() - want).abs() <= rounding + SUMS * length).all()
            for got, size in zip(sizes, moved, strict=True):
                assert ((got[row, : len(size)].cpu() - size).abs() <= 1e-4 * size + SUMS * length).all()
                assert (got[row, len(size) :] == POISON).all()
    assert batch.tables.buffers is not None
    kept, carry = batch.entries.clone(), batch.tables.buffers.carry
    assert carry[mine].isfinite().any()
    assert carry[~mine].isnan().all(), "nothing is carried for other rows"
    batch.entries[mine.to(device)] = NONE
    without, _ = batch.run(edit)
    assert torch.equal(bits(without[:, ~mine]), bits(out[:, ~mine]))
    for row in mine.nonzero()[:, 0].tolist():  # alone, the row computes the same
        alone = replace(
            batch, entries=kept[row : row + 1].clone(), gates=batch.gates[row : row + 1],
            x=batch.x[:, row : row + 1].clone(),
            residual=None if batch.residual is None else batch.residual[row : row + 1].clone(),
        )  # fmt: skip
        assert torch.equal(bits(alone.run(edit)[0][:, 0]), bits(out[:, row]))


def check_injection_of_nothing(edit: Edit, device: str, dtype: torch.dtype) -> None:
    """Where nothing is carried, and in a row that there is no room to carry for, no bit changes."""
    d = 37
    batch = Injecting.make(device, d, dtype, 1, carry_rows=3)
    codes = {0: Code(sources=(Source(0, 0.0, True),)), 1: Code((Inject(0),)), 2: Code(sources=(Source(0, 2.0, False),))}
    entry = batch.tables.add({**codes, 3: Code((Inject(0),))})
    batch.entries.fill_(entry)
    out, sizes = batch.run(edit, sized=True)
    assert torch.equal(bits(out[:3]), bits(batch.x[:3]))
    assert (sizes[1][:, 0] == 0).all()
    changed = (bits(out[3]) != bits(batch.x[3])).any(1)
    assert changed.tolist() == [True] * 3 + [False] * 4


def check_replays(edit: Edit, device: str, capture: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
    """Launches that are captured once do what others would, for later plans, rows and gates."""
    d = 576
    batch = Injecting.make(device, d, torch.bfloat16, 1)
    given, tables = batch.x.clone(), batch.tables
    assert tables.buffers is not None

    def launch() -> None:
        for place in range(4):
            edit(given[place], batch.residual, batch.entries, tables, place)

    launch()  # compiles
    replay = capture(launch)
    mine = int(batch.entries.max())
    for seed in range(2, 8):
        tables.remove(mine)
        mine = tables.add(Injecting.codes_of(d, seed))
        other = Injecting.make(device, d, torch.bfloat16, 2 * seed + 1)
        batch.entries.copy_(torch.where(other.entries == 0, mine, NONE))
        batch.x, batch.gates = other.x, other.gates
        want, _ = batch.run(edit)
        given.copy_(other.x)
        tables.buffers.gates.copy_(other.gates)
        tables.buffers.carry.fill_(float("nan"))
        replay()
        assert torch.equal(bits(given), bits(want))
        assert not torch.equal(bits(given), bits(other.x))


def captured(launch: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of the launches."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay
