"""Programs laid out for kernels that run on a device: one launch edits every row of a batch, whatever its plan.

An *entry* is what a row of the batch may name: one program per place (or none), as a plan and a set of its
interventions give them. A kernel is told which entry each row has and looks up the rest itself::

    starts   int32 [entries, places]   where the program of an entry at a place begins in ``code``; 0: there is none
    code     int32 [words]             programs; floats by their bits
    vectors  float32 [floats]          directions, each once, whoever uses it; rows of a multiple of 4 floats

A program is one word, its number of blocks, followed by its blocks in order, then one word, its number of probes, and
a row for each. A block is four words (flags, the
number of its rows r, its gate or -1, its index in the program) and r rows of eight: read, write, bias, threshold,
gain, offset, low, high. ``read`` and ``write`` are a column where the flag ``READ_COLUMNS`` or ``WRITE_COLUMNS``
is set, else an offset into ``vectors`` in units of 4 floats; ``read`` is -1 without the flag ``READS``. Rows that
write columns are sorted by them, so that one thread can add up what goes to the same column; with the flag
``LOCAL`` none of them reads anything but the column that it writes. A block of more than ``MAX_ROWS`` such rows is
laid out as several that have the same index: the square of its size is the sum of theirs.

Some blocks are no edits with a read and a write vector; they have one row, of which they use some words. Their index
is -1, but for injections, which edit.

* ``DECIDES``: reads a gate (a :class:`~steersman.kernels.program.Reading`, of a cosine with ``COSINE``) from the stream
  as it comes to the place, and writes 1 or 0 where blocks at later places look their gate up. ``low`` and ``high`` are
  the bounds; NaN stands for a threshold or a bound that there is not. Such blocks come first.
* ``INJECTS``: an :class:`~steersman.kernels.program.Inject`; ``write`` is the slot.
* ``CARRIES``: a :class:`~steersman.kernels.program.Source`, ``FIRST`` the first of its slot; ``write`` is the slot,
  ``bias`` the weight. Such blocks come last, and read what the DECIDES ones do.

A probe's row is that of a ``DECIDES`` block without bounds; ``write`` is its column.

What the words mean is :mod:`steersman.kernels.program`'s formula. All three arrays stay where they are, as a
captured graph needs; writes to them are queued on the device's current stream.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.kernels.program import Block, Code, Inject, Program, Reading, Rows

RELATIVE, ONLY_IF_ACTIVE, PRESERVE_NORM, READS, READ_COLUMNS, WRITE_COLUMNS, LOCAL = (1 << i for i in range(7))
DECIDES, COSINE, INJECTS, CARRIES, FIRST = (1 << i for i in range(7, 12))
PROGRAM_WORDS, BLOCK_WORDS, ROW_WORDS = 1, 4, 8
UNIT = 4  # floats
MAX_ROWS = 1024  # of a block: a kernel keeps one coefficient of each in fast memory
NONE = -1  # the entry of a row that is not edited


class TablesFull(RuntimeError):
    """There is no room for another program; removing entries makes some."""


class ProgramTooLarge(ValueError):
    """A block has more rows than a kernel can hold."""


class Space:
    """Offsets in an array of ``size`` units, first fit."""

    def __init__(self, size: int, reserved: int = 0) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(reserved, size)]  # (first, past the last), in order

    @property
    def free(self) -> int:
        return sum(b - a for a, b in self._free)

    def take(self, count: int) -> int:
        """The first of ``count`` units. Raises TablesFull."""
        for i, (a, b) in enumerate(self._free):
            if b - a >= count:
                self._free[i : i + 1] = [(a + count, b)] if b - a > count else []
                return a
        raise TablesFull(f"no {count} of {self.size} units in a row are free")

    def give(self, start: int, count: int) -> None:
        """Takes back what :meth:`take` gave."""
        stop = start + count
        i = bisect_left(self._free, (start, stop))
        before = self._free[i - 1][1] if i else 0
        after = self._free[i][0] if i < len(self._free) else self.size
        if not before <= start <= stop <= after:
            raise ValueError(f"units {start} to {stop} are not all taken")
        first, last = i, i
        if i and before == start:
            first, start = i - 1, self._free[i - 1][0]
        if i < len(self._free) and after == stop:
            last, stop = i + 1, self._free[i][1]
        self._free[first:last] = [(start, stop)]


@dataclass
class _Vector:
    offset: int  # units
    size: int
    users: int = 0


@dataclass
class _Entry:
    code: list[tuple[int, int]] = field(default_factory=list)  # (first word, words)
    vectors: list[bytes] = field(default_factory=list)
    gates: int = 0
    blocks: int = 0


_Writes = list[tuple[int, NDArray[Any]]]  # (where, what)


@dataclass(frozen=True)
class Buffers:
    """What kernels keep of each row of a batch from one place to later ones. They stay where they are.

    A row past the last one of ``carry`` cannot inject: nothing changes where it should. What probes read of one past
    the last of ``values`` is not kept.
    """

    gates: Tensor  # [rows, columns] float32, 0 or 1
    carry: Tensor  # [rows, slots, width] float32, the width a multiple of 8
    values: Tensor  # [rows, columns] float32, what probes read


class Tables:
    """The three arrays on ``device``, and who uses what in them."""

    def __init__(
        self,
        places: int,
        device: torch.device,
        *,
        entries: int,
        words: int,
        floats: int,
        buffers: Buffers | None = None,
    ) -> None:
        self.buffers = buffers
        self.starts = torch.zeros(entries, places, dtype=torch.int32, device=device)
        self.code = torch.zeros(words, dtype=torch.int32, device=device)
        self.vectors = torch.zeros(floats // UNIT * UNIT, device=device)
        self._entries: dict[int, _Entry] = {}
        self._unused = list(range(entries - 1, -1, -1))
        self._code = Space(words, reserved=1)  # a program at word 0 would read as none
        self._vectors = Space(floats // UNIT)
        self._known: dict[bytes, _Vector] = {}
        self.gates = 0  # columns that ``gates`` must have for the entries there are
        self.blocks = 0  # and ``norms``

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.starts, self.code, self.vectors))

    @property
    def used_floats(self) -> int:
        return (self._vectors.size - self._vectors.free) * UNIT

    def add(self, programs: Mapping[int, Program | Code]) -> int:
        """A new entry, with a program at each of these places. Raises TablesFull or ProgramTooLarge and keeps none."""
        places = self.starts.shape[1]
        if wrong := [place for place in programs if not 0 <= place < places]:
            raise IndexError(f"there is no place {wrong[0]}, only 0 to {places - 1}")
        if not self._unused:
            raise TablesFull(f"all {self.starts.shape[0]} entries are in use")
        entry, code, vectors = _Entry(), _Writes(), _Writes()
        starts = np.zeros(places, np.int32)
        try:
            for place, program in programs.items():
                given = Code(program.blocks) if isinstance(program, Program) else program
                words = self._encode(given, entry, vectors)
                start = self._code.take(len(words))
                entry.code.append((start, len(words)))
                gates = [*(block.gate for block in given.blocks), *given.gates]
                entry.gates = max(entry.gates, 1 + max(gates, default=NONE))
                entry.blocks = max(entry.blocks, len(given.blocks))
                code.append((start, words))
                starts[place] = start
        except BaseException:
            self._drop(entry)
            raise
        index = self._unused.pop()
        self._entries[index] = entry
        self._measure()
        _write(self.vectors, vectors)
        _write(self.code, code)
        _write(self.starts.view(-1), [(index * places, starts)])
        return index

    def remove(self, index: int) -> None:
        """The entry may be given to others; no row may name it in what is queued from now on."""
        self._drop(self._entries.pop(index))
        self._unused.append(index)
        self._measure()

    def _measure(self) -> None:
        self.gates = max((e.gates for e in self._entries.values()), default=0)
        self.blocks = max((e.blocks for e in self._entries.values()), default=0)

    def _drop(self, entry: _Entry) -> None:
        for start, count in entry.code:
            self._code.give(start, count)
        for key in entry.vectors:
            vector = self._known[key]
            vector.users -= 1
            if not vector.users:
                self._vectors.give(vector.offset, vector.size)
                del self._known[key]

    def _encode(self, given: Code, entry: _Entry, new: _Writes) -> NDArray[np.int32]:
        blocks = [self._reading(gate, reading, entry, new) for gate, reading in given.gates.items()]
        for index, block in enumerate(given.blocks):
            if isinstance(block, Inject):
                blocks.append(_block_of_one(INJECTS, block.gate, index, write=self._slot(block.slot)))
            else:
                blocks += [self._block(part, index, entry, new) for part in _split(block)]
        for source in given.sources:
            flags = CARRIES | (FIRST if source.first else 0)
            blocks.append(_block_of_one(flags, NONE, NONE, [source.weight], write=self._slot(source.slot)))
        probes = [self._probe(column, reading, entry, new) for column, reading in given.probes.items()]
        counts = [np.array([n], np.int32) for n in (len(blocks), len(probes))]
        return np.concatenate([counts[0], *blocks, counts[1], *probes])

    def _probe(self, column: int, reading: Reading, entry: _Entry, new: _Writes) -> NDArray[np.int32]:
        if self.buffers is None or not 0 <= column < self.buffers.values.shape[1]:
            raise ProgramTooLarge(f"there is no room for what is read in column {column}")
        block = self._reading(NONE, reading, entry, new)[BLOCK_WORDS:]
        block[1] = column
        return block

    def _slot(self, slot: int) -> int:
        if self.buffers is None or not 0 <= slot < self.buffers.carry.shape[1]:
            raise ProgramTooLarge(f"there is no room for what is carried in slot {slot}")
        return slot

    def _reading(self, gate: int, reading: Reading, entry: _Entry, new: _Writes) -> NDArray[np.int32]:
        direction = self._vector(reading.direction.float().contiguous().numpy(), entry, new)
        bounds = (reading.threshold, 0.0, 0.0, reading.above, reading.below)
        numbers = [reading.bias, *(math.nan if b is None else b for b in bounds)]
        flags = DECIDES | READS | (COSINE if reading.cosine else 0)
        return _block_of_one(flags, gate, NONE, numbers, read=direction)

    def _block(self, block: Block, index: int, entry: _Entry, new: _Writes) -> NDArray[np.int32]:
        if block.count > MAX_ROWS:
            raise ProgramTooLarge(f"an intervention of {block.count} directions; a kernel takes {MAX_ROWS}")
        flags = (
            (RELATIVE if block.relative else 0)
            | (ONLY_IF_ACTIVE if block.only_if_active else 0)
            | (PRESERVE_NORM if block.preserve_norm else 0)
            | (READS if block.read is not None else 0)
            | (READ_COLUMNS if block.read is not None and block.read.columns is not None else 0)
            | (WRITE_COLUMNS if block.write.columns is not None else 0)
            | (LOCAL if _is_local(block) else 0)
        )
        rows = np.empty((block.count, ROW_WORDS), np.int32)
        rows[:, 0] = NONE if block.read is None else self._directions(block.read, entry, new)
        rows[:, 1] = self._directions(block.write, entry, new)
        scalars = (block.bias, block.threshold, block.gain, block.offset, block.low, block.high)
        rows[:, 2:] = torch.stack([s.float() for s in scalars], 1).numpy().view(np.int32)
        return np.concatenate([np.array([flags, block.count, block.gate, index], np.int32), rows.ravel()])

    def _directions(self, rows: Rows, entry: _Entry, new: _Writes) -> Any:
        if rows.columns is not None:
            return rows.columns.numpy()
        assert rows.dense is not None
        return [self._vector(row, entry, new) for row in rows.dense.float().contiguous().numpy()]

    def _vector(self, row: NDArray[np.float32], entry: _Entry, new: _Writes) -> int:
        key = hashlib.blake2b(row.data, digest_size=16).digest()
        found = self._known.get(key)
        if found is None:
            size = -(-len(row) // UNIT)
            found = _Vector(self._vectors.take(size), size)
            self._known[key] = found
            padded = np.zeros(size * UNIT, np.float32)
            padded[: len(row)] = row
            new.append((found.offset * UNIT, padded))
        found.users += 1
        entry.vectors.append(key)
        return found.offset


def _block_of_one(
    flags: int, gate: int, index: int, numbers: Sequence[float] = (), *, read: int = NONE, write: int = NONE
) -> NDArray[np.int32]:
    scalars = np.zeros(ROW_WORDS - 2, np.float32)
    scalars[: len(numbers)] = numbers
    return np.array([flags, 1, gate, index, read, write, *scalars.view(np.int32)], np.int32)


def supports(program: Program, sharded: bool = False) -> bool:
    """Whether a kernel can run the program: of one rank's shard only what reads no dot and no norm."""
    whole = not sharded or program.is_columnar or program.constant is not None
    if not whole or program.encodes:
        return False
    return all(part.count <= MAX_ROWS for block in program.blocks for part in _split(block))


def _write(array: Tensor, parts: _Writes) -> None:
    """Queues the copies, one for parts that lie side by side."""
    parts = sorted(parts, key=lambda part: part[0])
    while parts:
        first, stop, taken = parts[0][0], parts[0][0], 0
        while taken < len(parts) and parts[taken][0] == stop:
            stop += len(parts[taken][1])
            taken += 1
        source = torch.from_numpy(np.concatenate([values for _, values in parts[:taken]]))
        if array.is_cuda:
            source = source.pin_memory()  # the allocator keeps it until the copy is done
        array[first:stop].copy_(source, non_blocking=True)
        parts = parts[taken:]


def _is_local(block: Block) -> bool:
    """Whether each row reads nothing but the column that it writes."""
    columns = block.write.columns
    if columns is None or block.read is None:
        return columns is not None
    return block.read.columns is not None and torch.equal(block.read.columns, columns)


def _split(block: Block) -> list[Block]:
    """The block with its columns in order; in parts of MAX_ROWS where its rows do not see each other."""
    columns = block.write.columns
    if columns is None:
        return [block]
    ordered = _take(block, torch.argsort(columns, stable=True))
    alone = _is_local(block) and len(torch.unique(columns)) == len(columns)
    if block.count <= MAX_ROWS or not alone or block.relative or block.preserve_norm:
        return [ordered]
    return [_take(ordered, torch.arange(a, min(a + MAX_ROWS, block.count))) for a in range(0, block.count, MAX_ROWS)]


def _take(block: Block, rows: Tensor) -> Block:
    scalars = {n: getattr(block, n)[rows] for n in ("bias", "threshold", "gain", "offset", "low", "high")}
    return replace(block, write=_of(block.write, rows), read=_of(block.read, rows) if block.read else None, **scalars)


def _of(directions: Rows, rows: Tensor) -> Rows:
    if directions.columns is not None:
        return Rows(directions.width, columns=directions.columns[rows])
    assert directions.dense is not None
    return Rows(directions.width, dense=directions.dense[rows])
