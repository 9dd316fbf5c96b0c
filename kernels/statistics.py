"""Histograms of activations, filled for many tokens at a time, in fixed buffers.

A :class:`Histograms` has one histogram for each of its rows, all with the same bounds. A value v falls into the
first bucket whose bound is at least v, as Prometheus's ``le`` has it; the last bucket has no bound and takes NaN
too. Sums and maxima leave out what is not finite, so that one such value does not hide all others.

The bounds are fixed and exponential, not derived from a model: those of norms span six orders of magnitude by
factors of two, which the norms of any model seen so far fit in, over all of its depth. A quantile that is
interpolated in a bucket is off by less than the bucket's factor.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NORM_BOUNDS = tuple(2.0**i for i in range(-4, 18))  # ‖x‖, in the model's own units
RELATIVE_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # ‖Δx‖/‖x‖
COSINE_BOUNDS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
ENTROPY_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # nats
_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
PROBE_COSINE_BOUNDS = (*(-s for s in reversed(_SHARES[:-1])), 0.0, *_SHARES)  # v̂·x / ‖x‖
PROBE_BOUNDS = (*(-s for s in reversed(_SIZES)), 0.0, *_SIZES)  # v̂·x, in the units of the norms

RULED_OUT = -1e4  # a logit below the largest whose token has no probability left in float32
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


class Histograms:
    """``rows`` histograms with the upper ``bounds`` of their buckets, ascending."""

    def __init__(self, rows: int, bounds: tuple[float, ...]) -> None:
        self.bounds = np.array(bounds)
        self.counts = np.zeros((rows, len(bounds) + 1), np.int64)
        self.sums = np.zeros(rows)  # float64
        self.largest = np.full(rows, -np.inf)

    def add(self, rows: Ints, values: Floats) -> None:
        """Adds ``values`` [n] to the histograms named by ``rows`` [n]; a negative row leaves its value out."""
        if rows.min(initial=0) < 0:
            rows, values = rows[rows >= 0], values[rows >= 0]
        if not len(values):
            return
        used, width = int(rows.max()) + 1, self.counts.shape[1]
        cells = rows * width + np.searchsorted(self.bounds.astype(values.dtype), values)
        self.counts[:used] += np.bincount(cells, minlength=used * width).reshape(used, width)
        values = values.astype(np.float64)
        if not (finite := np.isfinite(values)).all():
            rows, values = rows[finite], values[finite]
        self.sums[:used] += np.bincount(rows, weights=values, minlength=used)
        np.maximum.at(self.largest, rows, values)

    def clear(self) -> None:
        self.counts[:] = 0
        self.sums[:] = 0
        self.largest[:] = -np.inf

    def rows(self) -> list[tuple[int, list[int], float, float]]:
        """(row, counts by bucket, sum, maximum) of every histogram with a value. The maximum of none finite is -inf."""
        filled = np.flatnonzero(self.counts.any(1))
        return [(int(i), self.counts[i].tolist(), float(self.sums[i]), float(self.largest[i])) for i in filled]


class KeyedHistograms:
    """Histograms that are named by keys as they come, at most ``limit``; all keys after that share ``other``."""

    def __init__(self, limit: int, bounds: tuple[float, ...], other: Hashable) -> None:
        self.limit = limit
        self.other = other
        self._keys: dict[Hashable, int] = {}
        self._all = Histograms(limit + 1, bounds)
        self._waiting: list[tuple[list[int], Floats]] = []  # rows [k] and their values [k, n]

    def add(self, key: Hashable, values: Floats) -> None:
        """Adds ``values`` [n]. They are kept until :meth:`settle`, so the caller must not change them."""
        self.add_all([key], values[None])

    def add_all(self, keys: Sequence[Hashable], values: Floats) -> None:
        """Adds ``values`` [k, n] of as many keys."""
        self._waiting.append(([self._row(key) for key in keys], values))

    def _row(self, key: Hashable) -> int:
        row = self._keys.get(key)
        if row is None and len(self._keys) < self.limit:
            row = self._keys[key] = len(self._keys)
        return self.limit if row is None else row

    def settle(self) -> None:
        """Counts what has been added."""
        if not self._waiting:
            return
        rows = np.concatenate([np.repeat(rows, values.shape[1]) for rows, values in self._waiting])
        self._all.add(rows, np.concatenate([values.ravel() for _, values in self._waiting]))
        self._waiting.clear()

    def clear(self) -> None:
        self._keys.clear()
        self._waiting.clear()
        self._all.clear()

    def rows(self) -> list[tuple[Hashable, list[int], float, float]]:
        """What :meth:`Histograms.rows` says, by key."""
        self.settle()
        names: Mapping[int, Hashable] = {row: key for key, row in self._keys.items()}
        return [(names.get(row, self.other), *rest) for row, *rest in self._all.rows()]  # type: ignore[misc]


def stream_of(x: Tensor, residual: Tensor | None, out: Tensor, spare: Tensor) -> Tensor:
    """The stream of the first rows in ``out`` [n, d] float32; ``spare`` is of the same kind.

    Both are given, as fresh memory costs more than what is written there: the system clears it a page at a time.
    """
    out.copy_(x[: len(out)])
    if residual is not None:  # in float32, whatever its type; on a CPU a sum of two types makes a copy of its own
        out += spare.copy_(residual[: len(out)]) if out.is_cpu else residual[: len(out)]
    return out


def norms(stream: Tensor) -> Tensor:
    """[n] ‖x‖ of each row of ``stream`` [n, d]."""
    return torch.linalg.vector_norm(stream, dim=-1)


def cosines(a: Tensor, b: Tensor, a_norms: Tensor, b_norms: Tensor, spare: Tensor) -> Tensor:
    """[n] the cosine between rows of ``a`` and ``b`` [n, d] of known norms; 0 where one is zero.

    ``spare`` [n, d] is written to.
    """
    return torch.mul(a, b, out=spare).sum(-1) / (a_norms * b_norms).clamp_min_(1e-30)


def entropies(logits: Tensor) -> Tensor:
    """[n] the entropy in nats of the distribution that each row of ``logits`` [n, vocabulary] stands for.

    With z = logits − max it is ln Σe^z − Σ e^z·z / Σe^z. On a CPU row by row: one stays in the cache, all do not.
    """
    return torch.cat([_entropies(row[None]) for row in logits]) if logits.is_cpu and len(logits) else _entropies(logits)


def mass_entropies(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """[n] −(p ln p + (1 − p) ln(1 − p)), p what each row of ``logits`` [n, vocabulary] gives to ``ids`` together."""
    z = logits.float()
    p = (z[:, list(ids)] - z.logsumexp(-1, keepdim=True)).exp().sum(-1).clamp(0, 1)
    found: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return found


def logprobs(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """[n, ids] ln p of each of ``ids`` by each row of ``logits`` [n, vocabulary]; -inf of what the vocabulary lacks."""
    z = logits.float()
    chosen = torch.tensor(list(ids), device=z.device)
    found = z[:, chosen.clamp_max(z.shape[1] - 1)] - z.logsumexp(-1, keepdim=True)
    return found.masked_fill(chosen >= z.shape[1], float("-inf"))


def _entropies(logits: Tensor) -> Tensor:
    z = logits.float()
    z = (z - z.amax(-1, keepdim=True)).clamp_min_(RULED_OUT)  # 0·∞ is no number
    weights = z.exp()
    total = weights.sum(-1)
    return total.log() - (weights * z).sum(-1) / total
