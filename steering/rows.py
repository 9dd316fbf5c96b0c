"""The tensors of a safetensors file that stays on disk: what is asked for is read, and nothing else is held.

A dictionary of a million features is tens of gigabytes, of which a request needs a few rows. They are read with
`pread` and not through a memory map: a file that is cut short under a map kills the process, here it is an error.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from steersman.steering.errors import UploadMalformed

DTYPES: Final[dict[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
CHUNK: Final = 1 << 24  # bytes read at once where a whole file is gone through


@dataclass(frozen=True)
class Spec:
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * self.dtype.itemsize)


class RowFile(Mapping[str, Tensor]):
    """Thread-safe. The file stays open, so it may be renamed or removed meanwhile."""

    def __init__(self, path: str | Path) -> None:
        """`UploadMalformed` when `path` is no whole safetensors file, or holds a dtype that no asset has."""
        try:
            with safe_open(path, framework="pt"):  # checks the header, its size, and that the file is whole
                pass
        except OSError:
            raise
        except Exception as error:  # the reader documents no list of what it raises
            raise UploadMalformed(f"not a safetensors file: {error}", "file") from error
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.nbytes = os.fstat(self._file).st_size
        size = int.from_bytes(self._read(0, 8), "little")
        self._data = 8 + size  # where the tensors begin
        header: dict[str, Any] = json.loads(self._read(8, size))
        header.pop("__metadata__", None)
        self.specs: dict[str, Spec] = {}
        for name in sorted(header):
            entry = header[name]
            if entry["dtype"] not in DTYPES:
                raise UploadMalformed(f"{name} is {entry['dtype']}; wanted: {', '.join(DTYPES)}", f"tensors.{name}")
            start = self._data + entry["data_offsets"][0]
            self.specs[name] = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]), start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, read into memory."""
        spec = self.specs[name]
        return self._tensor(spec.start, spec.nbytes, spec.dtype).reshape(spec.shape)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """[len(indices), ...] the chosen entries of the first axis."""
        spec = self.specs[name]
        shape = spec.shape[1:]
        size = math.prod(shape) * spec.dtype.itemsize
        out = torch.empty(len(indices), *shape, dtype=spec.dtype)
        for i, index in enumerate(indices):
            if not 0 <= index < spec.shape[0]:
                raise IndexError(f"{name} has {spec.shape[0]} rows")
            out[i] = self._tensor(spec.start + index * size, size, spec.dtype).reshape(shape)
        return out

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's numbers in order, flat, a part at a time."""
        spec = self.specs[name]
        for at in range(0, spec.nbytes, CHUNK):
            yield self._tensor(spec.start + at, min(CHUNK, spec.nbytes - at), spec.dtype)

    def content(self, metadata: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """The file's bytes, a part at a time. `metadata` stands in place of the header's own."""
        start = 0
        if metadata is not None:
            start = self._data
            names = {dtype: name for name, dtype in DTYPES.items()}
            header: dict[str, Any] = {"__metadata__": dict(metadata)}
            for name, spec in self.specs.items():
                offsets = [spec.start - start, spec.start - start + spec.nbytes]
                header[name] = {"dtype": names[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            yield len(text).to_bytes(8, "little") + text
        for at in range(start, self.nbytes, CHUNK):
            yield bytes(self._read(at, min(CHUNK, self.nbytes - at)))

    def _tensor(self, start: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(self._read(start, nbytes), dtype=dtype) if nbytes else torch.empty(0, dtype=dtype)

    def _read(self, start: int, nbytes: int) -> bytearray:
        out = bytearray(nbytes)
        view, done = memoryview(out), 0
        while done < nbytes:
            got = os.preadv(self._file, [view[done:]], start + done)
            if not got:
                raise OSError(f"the file ends at byte {start + done}; it has been cut short")
            done += got
        return out


def take(tensors: Mapping[str, Tensor], name: str, indices: Sequence[int]) -> Tensor:
    """[len(indices), ...] rows of a tensor in memory or on disk."""
    if isinstance(tensors, RowFile):
        return tensors.rows(name, indices)
    if isinstance(indices, range) and indices.step == 1:
        return tensors[name][indices.start : indices.stop]  # a view, not a copy
    return tensors[name][list(indices)]
