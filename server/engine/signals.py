"""The signals that requests ask for, token by token; what each is, :mod:`steersman.steering.signals` says.

A value belongs to the position whose output is the generated token: the prompt's last one and those after it. Entropies
come from the logits that the model computes after a pass, one row for each request of the batch; where an engine
speculates there are others, and they are unknown. A signal that is not known of every generated token is not told.

What travels with a request, ``wanted``: by the signal's name, what it takes. ``answer_entropy``: nothing;
``evidence_entropy``: the hedging tokens' ids; a logprob: its token's id; a norm: its layer; a probe's: the column among
the plan's reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.statistics import entropies, logprobs, mass_entropies, norms
from steersman.server.engine.traces import Trace, Values, plain
from steersman.steering.plan import Place
from steersman.steering.signals import parse_signal, summary
from steersman.steering.sites import Site


class Signals:
    """One request's."""

    def __init__(self, wanted: Mapping[str, Any], prompt: int) -> None:
        """``prompt``: its length."""
        self.first = max(prompt - 1, 0)  # the position whose output is the first generated token
        self._traces = {name: Trace(1, whole=True) for name in wanted}  # by position from `first` on
        self._probes: dict[int, str] = {}
        self.norms: dict[Place, str] = {}
        self.hedges: tuple[int, ...] | None = None
        self.tokens: dict[str, int] = {}  # ids whose logprobs are told
        for name, argument in wanted.items():
            kind = parse_signal(name).kind
            if kind == "norm":
                self.norms[Place(int(argument), Site.RESID_POST)] = name
            elif kind == "probe":
                self._probes[int(argument)] = name
            elif kind == "evidence_entropy":
                self.hedges = tuple(argument)
            elif kind == "logprob":
                self.tokens[name] = int(argument)
        self.answer = "answer_entropy" in wanted

    @property
    def of_logits(self) -> bool:
        return self.answer or self.hedges is not None or bool(self.tokens)

    def see(self, name: str, start: int, values: Values) -> None:
        """Values [n] at the positions from ``start``; those of the prompt are left out."""
        values = values[max(self.first - start, 0) :]
        if len(values):
            self._traces[name].see(max(start - self.first, 0), values[:, None])

    def see_next(self, name: str, position: int, value: float) -> None:
        """Of a token that comes next. What is known stays: the logits of a preempted request are not all made again."""
        if position >= self.first + self._traces[name].end:
            self.see(name, position, np.array([value], np.float32))

    def see_probes(self, columns: Sequence[int], start: int, values: Values) -> None:
        """Values [n, columns] of these reads of the plan."""
        for i, column in enumerate(columns):
            if (name := self._probes.get(column)) is not None:
                self.see(name, start, values[:, i])

    def told(self, end: int | None, whole: bool) -> dict[str, Any]:
        """By signal: statistics of the positions before ``end``, ``whole``: and all values. Only of complete ones."""
        found: dict[str, dict[str, Any]] = {}
        for name, trace in self._traces.items():
            count = trace.end if end is None else max(end - self.first, 0)
            positions, rows = trace.rows(0, count)
            if not positions or len(positions) < count:
                continue
            values = rows[:, 0]
            found[name] = {**summary(values.astype(np.float64).tolist())}
            if whole:
                found[name] |= {"positions": [p + self.first for p in positions], "values": plain(values)}
        return found


class State(Protocol):
    @property
    def signals(self) -> Signals | None: ...


class Reader(Protocol):
    """A request's rows in a pass."""

    start: int  # position of the first

    @property
    def state(self) -> State: ...

    @property
    def rows(self) -> slice: ...


class Streams:
    """The norms that one pass's requests ask for."""

    def __init__(self, readers: Iterable[Reader] = ()) -> None:
        self._asked: dict[Place, list[tuple[Signals, str, Reader]]] = {}
        for reader in readers:
            signals = reader.state.signals
            for place, name in signals.norms.items() if signals is not None else ():
                self._asked.setdefault(place, []).append((signals, name, reader))  # type: ignore[arg-type]
        self.places = frozenset(self._asked)
        self._read: list[tuple[Place, Tensor]] = []

    def read(self, place: Place, x: Tensor, residual: Tensor | None) -> None:
        """``x`` [T, d] at a place, after its edits."""
        parts = []
        for _, _, reader in self._asked[place]:
            own = x[reader.rows].float()
            parts.append(norms(own if residual is None else own + residual[reader.rows].float()))
        self._read.append((place, torch.cat(parts)))

    def finish(self) -> None:
        """Gives each request its values."""
        for place, found in self._read:
            values, first = found.cpu().numpy(), 0
            for signals, name, reader in self._asked[place]:
                count = reader.rows.stop - reader.rows.start
                signals.see(name, reader.start, values[first : first + count])
                first += count


@dataclass(frozen=True)
class Next:
    """A token that is to be sampled after a pass."""

    row: int  # of the logits
    position: int  # whose output it is
    signals: Signals


@dataclass(frozen=True)
class Logits:
    """What of a pass's logits is read: those of ``tokens``, out of a row for each of ``requests`` requests."""

    requests: int
    tokens: Sequence[Next]

    def read(self, logits: Tensor) -> None:
        """``logits`` [requests, vocabulary]; of another number nobody knows whose they are."""
        if len(logits) != self.requests:
            return
        answer = [t for t in self.tokens if t.signals.answer]
        hedged: dict[tuple[int, ...], list[Next]] = {}
        for token in self.tokens:
            if token.signals.hedges is not None:
                hedged.setdefault(token.signals.hedges, []).append(token)
        if answer:
            _give(answer, "answer_entropy", entropies(logits[[t.row for t in answer]]))
        for ids, tokens in hedged.items():
            _give(tokens, "evidence_entropy", mass_entropies(logits[[t.row for t in tokens]], ids))
        for token in self.tokens:
            if names := token.signals.tokens:
                found = logprobs(logits[token.row, None], list(names.values()))[0].cpu().numpy()
                for name, value in zip(names, found, strict=True):
                    token.signals.see_next(name, token.position, float(value))


def next_tokens(batch: Sequence[Any], readers: Iterable[Reader]) -> Logits | None:
    """What is read after a pass over ``batch`` (entries of row and n), for those ``readers`` whose prompts it ends."""
    at = {entry.row: i for i, entry in enumerate(batch) if entry.n}
    tokens = []
    for reader in readers:
        signals, last = reader.state.signals, reader.start + (reader.rows.stop - reader.rows.start) - 1
        if signals is not None and signals.of_logits and last >= signals.first:
            tokens.append(Next(at[reader.rows.start], last, signals))
    return Logits(len(batch), tokens) if tokens else None


def _give(tokens: Sequence[Next], name: str, found: Tensor) -> None:
    for token, value in zip(tokens, found.float().cpu().numpy(), strict=True):
        token.signals.see_next(name, token.position, float(value))


def watch_logits(model: Any, look: Callable[[Tensor], None]) -> None:
    """``look`` gets what ``model.compute_logits`` returns, on the ranks where that is anything."""
    compute: Callable[..., Any] = model.compute_logits

    @functools.wraps(compute)
    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        if logits is not None:
            look(logits)
        return logits

    model.compute_logits = compute_logits
