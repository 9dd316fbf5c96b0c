"""What the live page shows: the statistics that :mod:`steersman.server.monitoring` reads, once more, as they come.

Nothing is asked of the workers for it. Each reading becomes one frame, encoded once, that all viewers get; the last
``HISTORY`` frames are what a new viewer sees first. With several HTTP processes, and so several readers, a frame holds
what this process has read: a part of all that was sampled.

A frame is a JSON object. Means are over the tokens that were sampled in the interval:

=========== ==========================================================================================
time        seconds since 1970, of the reading
passes      forward passes that were looked at
tokens      tokens sampled, and how many of them were of requests with interventions
requests    requests that ended, None where vLLM does not count them; by outcome, those that asked for steering
norms       [layer, mean, largest] of ‖x‖ as the stream leaves the layer
not_finite  layers at which no sampled token had a finite norm
edits       [layer, mean] of ‖Δx‖/‖x‖, over all assets
assets      [name, mean, edits] of ‖Δx‖/‖x‖, over all layers
probes      [name, layer, mean, tokens] of what a probe read
left_out    assets and probes at layers for which there was no room
=========== ==========================================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from steersman.server.answers import dumps
from steersman.server.engine.monitor import GROUPS
from steersman.steering.errors import TooManySessions

HISTORY = 150  # frames
MAX_VIEWERS = 16
MAX_ASSETS = 32  # in a frame
MAX_PROBES = 64  # pairs of a probe and a layer in a frame
BEHIND = 8  # events that may wait for a viewer; at the next one it is dropped
ENDED = "vllm:request_success_total"
STEERED = "steersman_requests_total"


class Viewer:
    """One open page. ``waiting``: events to be sent to it, after ``hello``."""

    def __init__(self, hello: bytes) -> None:
        self.hello = hello
        self.waiting: asyncio.Queue[bytes] = asyncio.Queue(BEHIND)
        self.dropped = False


class Feed:
    """The frames and who watches them, in one event loop."""

    def __init__(self, about: Mapping[str, Any], interval: float, registry: CollectorRegistry = REGISTRY) -> None:
        """``about``: what viewers are told of the server. ``interval``: seconds between two readings."""
        self.about = {"monitor": "on", **about, "interval": interval, "history": HISTORY}
        self._late_after = 3 * interval + 2.0  # seconds
        self._registry = registry
        self._requests = _counts(registry)
        self._interval = _Interval()
        self._frames: deque[bytes] = deque(maxlen=HISTORY)
        self._hello: bytes | None = None  # as all who come before the next frame get it
        self._assets, self._probes = _Room(MAX_ASSETS), _Room(MAX_PROBES)
        self.viewers: set[Viewer] = set()

    def take(self, answer: Mapping[str, Any]) -> None:
        """Adds one worker's statistics to the next frame."""
        self._interval.take(answer)

    def publish(self) -> None:
        """Makes a frame of what was taken since the last one, and gives it to every viewer."""
        before, self._requests = self._requests, _counts(self._registry)
        found, self._interval = self._interval, _Interval()
        assets = self._assets.admitted(found.assets)
        probes = self._probes.admitted(found.probes)
        ended, steered = self._requests
        frame = dumps({
            "time": round(time.time(), 2),
            "passes": found.passes,
            "tokens": [max(found.tokens.values(), default=0), max(found.steered.values(), default=0)],
            "requests": [
                None if ended is None else ended - (before[0] or 0),
                {outcome: n - before[1].get(outcome, 0) for outcome, n in steered.items()},
            ],
            "norms": [
                [layer, _mean(found.norms[layer]), _short(largest)] for layer, largest in sorted(found.largest.items())
            ],
            "not_finite": sorted(set(found.norms) - set(found.largest)),
            "edits": [[layer, _mean(sum_)] for layer, sum_ in sorted(found.edits.items())],
            "assets": [[name, _mean(found.assets[name]), found.assets[name][1]] for name in assets],
            "probes": [[*key, _mean(found.probes[key]), found.probes[key][1]] for key in probes],
            "left_out": len(found.assets) - len(assets) + len(found.probes) - len(probes),
        })  # fmt: skip
        self._frames.append(frame)
        self._hello = None
        self._give(b"event: frame\ndata: " + frame + b"\n\n")

    def late(self, lag: float) -> None:
        """Tells viewers that the last reading was ``lag`` seconds ago, where that is long."""
        if lag > self._late_after:
            self._give(b"event: lag\ndata: " + dumps({"lag": round(lag, 1)}) + b"\n\n")

    @contextmanager
    def viewing(self) -> Iterator[Viewer]:
        """One viewer's stay. Raises TooManySessions."""
        if len(self.viewers) >= MAX_VIEWERS:
            raise TooManySessions(f"{MAX_VIEWERS} pages are open on this server, as many as may be")
        viewer = Viewer(self._greeting())
        self.viewers.add(viewer)
        try:
            yield viewer
        finally:
            self.viewers.discard(viewer)

    def _greeting(self) -> bytes:
        if self._hello is None:
            about = dumps(self.about)[:-1] + b',"frames":['
            self._hello = b"event: hello\ndata: " + about + b",".join(self._frames) + b"]}\n\n"
        return self._hello

    def _give(self, event: bytes) -> None:
        for viewer in list(self.viewers):
            if viewer.waiting.full():
                viewer.dropped = True
                self.viewers.discard(viewer)
            else:
                viewer.waiting.put_nowait(event)


class _Interval:
    """What was counted between two frames. Sums are pairs of a total and a count."""

    def __init__(self) -> None:
        self.passes = 0
        self.tokens: defaultdict[int, int] = defaultdict(int)  # by layer: stages of a pipeline see the same tokens
        self.steered: defaultdict[int, int] = defaultdict(int)
        self.norms: defaultdict[int, list[float]] = defaultdict(_zero)
        self.largest: dict[int, float] = {}
        self.edits: defaultdict[int, list[float]] = defaultdict(_zero)
        self.assets: defaultdict[str, list[float]] = defaultdict(_zero)
        self.probes: defaultdict[tuple[str, int], list[float]] = defaultdict(_zero)

    def take(self, answer: Mapping[str, Any]) -> None:
        self.passes += answer["passes"]
        for layer, group, counts, total, largest in answer["activation_norm"]:
            n = sum(counts)
            self.tokens[layer] += n
            self.steered[layer] += n if GROUPS[group][1] == "yes" else 0
            _add(self.norms[layer], total, n)
            if largest is not None:
                self.largest[layer] = max(largest, self.largest.get(layer, 0.0))
        for asset, layer, counts, total in answer["relative_edit_norm"]:
            _add(self.assets[asset], total, sum(counts))
            if layer >= 0:  # else of many layers together
                _add(self.edits[layer], total, sum(counts))
        for probe, layer, counts, total in answer["probe_value"]:
            _add(self.probes[probe, layer], total, sum(counts))


class _Room:
    """Room for ``limit`` names. One that came early stays until it has not been seen for ``HISTORY`` frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seen: dict[Hashable, int] = {}
        self._frame = 0

    def admitted(self, names: Iterable[Any]) -> list[Any]:
        """Those of a frame's ``names`` for which there is room, in order."""
        self._frame += 1
        self._seen = {name: seen for name, seen in self._seen.items() if seen > self._frame - HISTORY}
        out = []
        for name in sorted(names):
            if name in self._seen or len(self._seen) < self.limit:
                self._seen[name] = self._frame
                out.append(name)
        return out


def _zero() -> list[float]:
    return [0.0, 0]


def _add(sum_: list[float], total: float, count: int) -> None:
    sum_[0] += total
    sum_[1] += count


def _mean(sum_: list[float]) -> float:
    return _short(sum_[0] / sum_[1])


def _short(value: float) -> float:
    """Four digits: what a picture can show."""
    return float(f"{value:.4g}")


def _counts(registry: CollectorRegistry) -> tuple[int | None, dict[str, int]]:
    """Requests that ended in this process, None where they are not counted; by outcome, those to be steered."""
    ended: int | None = None
    steered: dict[str, int] = {}
    for metric in registry.restricted_registry([ENDED, STEERED]).collect():
        for sample in metric.samples:
            if sample.name == ENDED:
                ended = (ended or 0) + int(sample.value)
            elif sample.name == STEERED:
                outcome = sample.labels["outcome"]
                steered[outcome] = steered.get(outcome, 0) + int(sample.value)
    return ended, steered
