"""A model without attention or weights, whose layers call a runtime as the hooked ones do.

A token's first coordinate is its id, so that gates can be told by token. Layers are plain arithmetic on single numbers:
a row's bits do not depend on the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import make_args
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from steersman.steering.tokens import Ints, Prompt, Selection
from tests.steering.library import LAYERS, D, noise

PRE, POST = Site.RESID_PRE, Site.RESID_POST
BRANCHES = Site.ATTN_OUT, Site.MLP_OUT
TABLE = noise(64, D, seed=7)
POSITIONS = noise(256, D, seed=8)
SHIFTS = noise(LAYERS, D, seed=9)
FACTORS = noise(LAYERS, 2, D, seed=10) / 4  # of what each branch adds
for table in (POSITIONS, SHIFTS, FACTORS):
    table[..., 0] = 0
TABLE[:, 0] = torch.arange(64.0)


@dataclass(frozen=True)
class Piece:
    """What one request is fed in one pass."""

    request_id: str
    start: int
    ids: Sequence[int]


@dataclass
class Toy:
    runtime: Runtime
    dtype: torch.dtype = torch.float32
    split: bool = False  # the stream comes as x + residual
    replays: bool = False  # passes that do not need the host launch what a graph of their level holds, and no more
    _level: frozenset[Place] = frozenset()  # where this pass's graph launches

    def add(self, request_id: str, plan: Plan | None, prompt: Sequence[int], key: str = "") -> None:
        """A request enters, steered by ``plan``."""
        if plan is not None:
            self.runtime.plans.add(plan.to_bytes(), "http")
            self.runtime.add_request(request_id, args(plan, prompt, key or request_id))

    def run(self, *pieces: Piece) -> dict[str, Tensor]:
        """The stream after the last layer, [n, d] of each request."""
        ids = [i for p in pieces for i in p.ids]
        batch, row = [], 0
        for piece in pieces:
            batch.append(Scheduled(piece.request_id, piece.start, row, len(piece.ids)))
            row += len(piece.ids)

        def token_ids(first: int, count: int) -> Ints:
            return np.asarray(ids[first : first + count], dtype=np.int64)

        positions = [p.start + i for p in pieces for i in range(len(p.ids))]
        stream = (TABLE[ids] + POSITIONS[positions]).to(self.dtype)
        starts = {piece.request_id: piece.start for piece in pieces}
        replayed = self.replays and not self.runtime.needs_host(starts, len(ids))
        self.runtime.begin(batch, token_ids, replayed)
        self._level = frozenset()
        if replayed and self.runtime.device is not None:
            self._level = self.runtime.device.at(self.runtime.device.sites)
        try:
            for layer in range(LAYERS):
                stream = self._touch(Place(layer, PRE), stream)
                for site, factors in zip(BRANCHES, FACTORS[layer].to(self.dtype), strict=True):
                    stream = stream + self._touch(Place(layer, site), stream * factors)
                stream = stream * 0.75 + SHIFTS[layer].to(self.dtype)
                stream[:, 0] /= 0.75  # what tells tokens apart stays
                stream = self._touch(Place(layer, POST), stream)
        finally:
            self.runtime.end()
        return {s.request_id: stream[s.row : s.row + s.n] for s in batch}

    def _touch(self, place: Place, stream: Tensor) -> Tensor:
        x, residual = stream.clone(), None
        if self.split and place.site not in BRANCHES:
            residual = (stream * 0.5).to(self.dtype)
            x = stream - residual
        if place in self._level:
            assert self.runtime.device is not None
            self.runtime.device.edit(place, x, residual)
        elif not self._level and self.runtime.live and place in self.runtime.wanted:
            self.runtime.apply(place, x, residual)
        return x if residual is None else x + residual

    def complete(self, request_id: str, ids: Sequence[int], prompt: int, chunks: Sequence[int] = ()) -> Tensor:
        """The whole of a request by itself: its prompt cut at ``chunks``, then token by token."""
        cuts = sorted({0, *(c for c in chunks if 0 < c < prompt), *range(prompt, len(ids) + 1)})
        parts = [self.run(Piece(request_id, a, ids[a:b]))[request_id] for a, b in pairwise(cuts)]
        return torch.cat(parts)


def args(plan: Plan, prompt: Sequence[int], key: str) -> dict[str, Any]:
    return make_args(plan, Selection.build(plan.selectors, Prompt(prompt), [s.path for s in plan.steps]), key)


def alone(plan: Plan | None, ids: Sequence[int], prompt: int, chunks: Sequence[int] = (), **toy: Any) -> Tensor:
    """The stream of a request that has a runtime to itself."""
    made = Toy(Runtime(), **toy)
    made.add("r", plan, ids[:prompt])
    return made.complete("r", ids, prompt, chunks)


def report(runtime: Runtime, key: str) -> Mapping[str, Any]:
    (found,) = runtime.reports([key])[key]
    return found
