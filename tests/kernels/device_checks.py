"""What a device kernel's ``edit`` must do to a batch, whichever kernel and device it is."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.kernels.norms import DEFINED, Form, add_and_norm
from steersman.kernels.program import Program
from steersman.kernels.reference import edit as reference
from steersman.kernels.tables import NONE, Tables
from steersman.steering import lower
from tests.kernels.programs import gates_of, vector

FORMS = [DEFINED, Form.ONE_MORE, Form.ROUNDED_SUM | Form.ROUNDED_QUOTIENT, Form(0)]  # defined, Gemma's, compiled ones
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a rounding, relative
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # of a rounding among subnormals
SUMS = 1e-5  # float32 sums, relative to the lengths of the rows that they are made of
POISON = -77.0
PLACES, PLACE = 3, 1

Edit = Callable[..., None]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@dataclass
class Batch:
    """Rows inside a larger array whose other cells must stay as they are, and an entry for each."""

    device: str
    programs: Sequence[Program | None]  # of each row at PLACE, None: not edited
    x: Tensor
    residual: Tensor | None
    whole: Tensor
    tables: Tables
    entries: Tensor
    gates: Tensor
    norms: Tensor  # a column and a row more than needed
    squares: Tensor

    @classmethod
    def make(
        cls,
        device: str,
        programs: Sequence[Program | None],
        d: int,
        dtype: torch.dtype = torch.float32,
        *,
        with_residual: bool = True,
        gap: int = 16,
        seed: int = 0,
    ) -> "Batch":
        """``gap``: cells between the rows, half of them before the first."""
        g, n = torch.Generator().manual_seed(seed), len(programs)
        whole = vector(g, n + 2, d + gap).to(dtype).to(device)
        residual = (vector(g, n, d + gap) * 3).to(dtype).to(device)[:, gap // 2 : gap // 2 + d]
        tables, entries = fill(device, programs)
        x = whole[1 : n + 1, gap // 2 : gap // 2 + d]
        gates = gates_of(n, seed).to(device)
        norms, squares = torch.empty(n + 1, tables.blocks + 1), torch.empty(n + 1)
        return cls(
            device,
            programs,
            x,
            residual if with_residual else None,
            whole,
            tables,
            entries,
            gates,
            norms.to(device),
            squares.to(device),
        )

    def sizes(self) -> tuple[Tensor, Tensor]:
        """``norms`` and ``squares``, poisoned."""
        return self.norms.fill_(POISON), self.squares.fill_(POISON)

    def check(self, edit: Edit, steps: float = 0.5) -> None:
        """Edits the rows, without and with sizes, and holds every cell against the reference in float64.

        ``steps``: the most that the one rounding may be off, in units in the last place.
        """
        before = self.whole.clone()
        edit(self.x, self.residual, self.entries, self.tables, PLACE, self.gates)
        plain = self.whole.clone()
        self.whole.copy_(before)
        norms, squares = self.sizes()
        edit(self.x, self.residual, self.entries, self.tables, PLACE, self.gates, norms, squares)
        assert torch.equal(bits(self.whole), bits(plain)), "measuring changes nothing"
        old = self.x.clone()
        new = self.x.cpu().clone()
        old.copy_(before.as_strided(self.x.shape, self.x.stride(), self.x.storage_offset()))
        self.x.copy_(old)
        assert torch.equal(bits(self.whole), bits(before)), "nothing but the rows is written"
        self._check_rows(old.cpu(), new, norms.cpu(), squares.cpu(), 2.02 * steps)

    def _check_rows(self, old: Tensor, new: Tensor, norms: Tensor, squares: Tensor, slack: float) -> None:
        residual = None if self.residual is None else self.residual.cpu()
        for i, program in enumerate(self.programs):
            blocks = 0 if program is None else len(program.blocks)
            assert (norms[i, blocks:] == POISON).all()
            if program is None:
                assert torch.equal(bits(new[i]), bits(old[i]))
                assert squares[i] == POISON
                continue
            want, sizes, stream = self.wanted(i, program, old[i : i + 1], residual)
            length = 2 * stream.norm() + sizes.sum() + old[i].double().norm()
            rounding = HALF_STEP[new.dtype] * want.abs() + SMALLEST[new.dtype]
            assert ((new[i].double() - want).abs() <= slack * rounding + SUMS * length).all()
            assert ((norms[i, :blocks] - sizes).abs() <= 1e-4 * sizes + SUMS * length).all()
            torch.testing.assert_close(squares[i].double(), stream.square().sum(), rtol=1e-5, atol=0)
        assert (norms[len(self.programs) :] == POISON).all()
        assert (squares[len(self.programs) :] == POISON).all()

    def check_norm(
        self, edit: Edit, edit_and_norm: Edit, weight: Tensor | None, form: Form, steps: float = 0.5
    ) -> None:
        """What is added is what ``edit`` leaves, bit by bit; what is normalised is right up to its roundings."""
        eps = 1e-3
        assert self.residual is not None
        before, rest = self.whole.clone(), self.residual.clone()
        edit(self.x, self.residual, self.entries, self.tables, PLACE, self.gates, *self.sizes())
        edited, norms, squares = self.x.clone(), self.norms.clone(), self.squares.clone()
        self.whole.copy_(before)
        old = self.x.clone()
        where = (self.entries, self.tables, PLACE, self.gates, *self.sizes())
        edit_and_norm(self.x, self.residual, weight, eps, *where, form=form)
        got = self.x.cpu().double()
        self.x.copy_(old)
        assert torch.equal(bits(self.whole), bits(before)), "nothing but the rows is written"
        total = edited.float() + rest.float()
        if steps == 0.5:
            assert torch.equal(bits(self.residual), bits(total.to(rest.dtype)))
        half = 2.02 * steps * HALF_STEP[rest.dtype]
        assert ((self.residual.double() - total).abs() <= half * total.abs() + SMALLEST[rest.dtype]).all()
        assert torch.equal(self.norms, norms)
        assert torch.equal(self.squares, squares)
        z = (self.residual if Form.ROUNDED_SUM in form else total).cpu().double()
        factor = torch.ones(z.shape[1]).double() if weight is None else weight.cpu().double() + (Form.ONE_MORE in form)
        y = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * factor
        roundings = 2 if weight is not None and Form.ROUNDED_QUOTIENT in form else 1
        slack = SMALLEST[rest.dtype] * (1 + factor.abs())
        assert ((got - y).abs() <= (roundings * half + SUMS) * y.abs() + slack).all()

    def wanted(self, i: int, program: Program, own: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Row i after the edit, the size of each block's change, and the stream before, in float64."""
        own = own.double()
        stream = own if residual is None else own + residual[i : i + 1].double()
        sizes = stream.new_zeros(1, len(program.blocks))
        delta = reference(stream, program, self.gates[i : i + 1].cpu(), sizes)
        return (own + delta)[0], sizes[0], stream[0]


def fill(device: str, programs: Sequence[Program | None]) -> tuple[Tables, Tensor]:
    """Tables with each program once at PLACE (and another one elsewhere), and the entries of the rows."""
    distinct = {id(p): p for p in programs if p is not None}
    # Twice what is needed, from 1000 words or floats on.
    words = 1000 + 2 * sum(8 * p.rows + 4 * len(p.blocks) + 4096 for p in distinct.values())
    floats = 1000 + 4 * sum(p.rows * (p.width + 4) for p in distinct.values() if any(_is_dense(b) for b in p.blocks))
    tables = Tables(PLACES, torch.device(device), entries=len(distinct) + 2, words=words, floats=floats)
    other = Program((), next(iter(distinct.values())).width) if distinct else Program((), 1)
    nowhere = tables.add({PLACE + 1: other})  # an entry with nothing at PLACE
    index = {key: tables.add({PLACE: p, PLACE - 1: other}) for key, p in distinct.items()}
    rng = random.Random(len(programs))
    named = [index[id(p)] if p is not None else rng.choice([NONE, nowhere]) for p in programs]
    return tables, torch.tensor([*named, NONE], dtype=torch.int32, device=device)


def _is_dense(block: object) -> bool:
    rows = (block.write, block.read)  # type: ignore[attr-defined]
    return any(r is not None and r.dense is not None for r in rows)


def deal(programs: Sequence[Program], n: int, seed: int) -> list[Program | None]:
    """A program or none for each of n rows, in no order, every one of them at least once where there is room."""
    rng = random.Random(seed)
    hands: list[Program | None] = [*programs, None]
    dealt = hands[:n] + [rng.choice(hands) for _ in range(n - len(hands))]
    rng.shuffle(dealt)
    return dealt


def check_roundings(edit_and_norm: Edit, device: str) -> None:
    """With a weight of 1.5 each form gives other numbers for some rows: each is the one that was asked for."""
    g = torch.Generator().manual_seed(5)
    own, rest = (vector(g, 64, 8).half().to(device) for _ in range(2))
    tables, entries = fill(device, [None] * 64)
    found = []
    for form in FORMS:
        weight = torch.full((8,), 0.5 if Form.ONE_MORE in form else 1.5, dtype=torch.float16, device=device)
        want, stream = own.clone(), rest.clone()
        add_and_norm(want, stream, weight, 0.0, form)
        x, residual = own.clone(), rest.clone()
        edit_and_norm(x, residual, weight, 0.0, entries, tables, PLACE, form=form)
        assert torch.equal(residual, stream)
        assert (x != want).sum() <= 1, "a sum in another order may turn a rounding"
        found.append(x)
    for a, b in ((0, 1), (0, 2), (2, 3), (0, 3)):
        assert (found[a] != found[b]).sum() > 8
    assert torch.equal(found[1], found[3]), "1 + 0.5 is 1.5"


def check_bad_calls(edit: Edit, edit_and_norm: Edit, device: str) -> dict[str, Any]:
    """What does not fit is named before anything is launched, and x stays as it is; the arguments of a good call."""
    program = Program((lower.add(0, torch.ones(8), 1.0, False, gate=2),), 8)
    tables, entries = fill(device, [program] * 4)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    x, gates = zeros(4, 8), zeros(4, 3) + 1
    good = {"x": x, "residual": None, "entries": entries, "tables": tables, "place": PLACE, "gates": gates}

    def bad(match: str, error: type[Exception] = ValueError, **changed: object) -> None:
        with pytest.raises(error, match=match):
            edit(**{**good, **changed})

    for own in (zeros(4, 8, dtype=torch.float64), zeros(8), zeros(4, 0)):
        bad("x is", x=own)
    bad("x has strides", x=zeros(8, 4).T)
    bad("x is written, and its rows overlap", x=zeros(1, 8).expand(4, 8))
    bad(f"entries on {entries.device}, x on meta", x=torch.zeros(4, 8, device="meta"))
    for residual in (zeros(3, 8), zeros(8, 4).T, zeros(4, 8, dtype=torch.float16)):
        bad("residual", residual=residual)
    for wrong in (entries[:3], entries.long(), torch.stack([entries, entries], 1)[:, 0]):
        bad("entries is", entries=wrong)
    for place in (-1, PLACES):
        bad(f"only 0 to {PLACES - 1}", IndexError, place=place)
    bad("gates must be given", gates=None)
    for wrong in (gates[:, :2], gates[:3], gates.double(), (zeros(3, 4) + 1).T):
        bad("gates is", gates=wrong)
    bad("norms is", norms=zeros(4, 0))
    bad("squares is", squares=zeros(3))
    rest = (1e-6, entries, tables, PLACE, gates)
    for weight in (zeros(7), zeros(8, dtype=torch.float16)):
        with pytest.raises(ValueError, match="weight is"):
            edit_and_norm(x, zeros(4, 8), weight, *rest)
    with pytest.raises(ValueError, match="residual is written, and its rows overlap"):
        edit_and_norm(x, zeros(1, 8).expand(4, 8), None, *rest)
    assert not x.any()
    return good
