"""Numbers that a pass leaves on the device, brought to the host without waiting for it.

Each pass queues a copy into memory of its own, pinned, and says what is to be done with the numbers. That is done when
the copy has ended: at a later step, or when somebody cannot go on without. Nothing is allocated after the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 4  # passes whose copies may be under way; more than an engine runs ahead

Note = Callable[[Tensor], None]
"""Takes [rows, columns] of one pass, which are written over afterwards."""


class _Waiting(NamedTuple):
    buffer: int
    rows: int
    note: Note


class Readback:
    """Of ``source`` [rows, columns], which every pass fills anew."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        on_gpu = source.is_cuda
        self._buffers = [torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu) for _ in range(DEPTH)]
        self._events = [torch.cuda.Event() for _ in range(DEPTH)] if on_gpu else None
        self._waiting: deque[_Waiting] = deque()
        self._next = 0

    def take(self, rows: int, note: Note) -> None:
        """The pass that is queued last has filled the first ``rows``; ``note`` is called with them, later."""
        while len(self._waiting) == DEPTH:
            self._finish()
        buffer, self._next = self._next, (self._next + 1) % DEPTH
        self._buffers[buffer][:rows].copy_(self._source[:rows], non_blocking=True)
        if self._events is not None:
            self._events[buffer].record()
        self._waiting.append(_Waiting(buffer, rows, note))

    def settle(self, wait: bool = False) -> None:
        """Does what can be done; all of it where ``wait``. In the order of the passes."""
        while self._waiting and (wait or self._has_ended(self._waiting[0].buffer)):
            self._finish()

    def _finish(self) -> None:
        buffer, rows, note = self._waiting.popleft()
        if self._events is not None:
            self._events[buffer].synchronize()
        note(self._buffers[buffer][:rows])

    def _has_ended(self, buffer: int) -> bool:
        return self._events is None or self._events[buffer].query()
