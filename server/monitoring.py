"""The workers' statistics in ``/metrics``: read every few seconds, whatever is scraped.

What each metric counts is said where it is counted, in :mod:`steersman.server.engine.monitor`. A scrape reads what is
here and never waits for a worker: where workers do not answer, ``steersman_monitor_lag_seconds`` grows, the time since
everything counted until then was last read. While no request is in the engine nobody is asked, and the lag is none.

Every counted token is in one answer to one HTTP process, so processes and engines simply add up. An answer that got
lost is asked for again by its number.

Labels are layers, and the names of stored assets, at most ``MAX_NAMES`` of them in metrics that have a layer too; later
ones are ``other``, with the layer ``all``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from steersman.kernels.statistics import (
    COSINE_BOUNDS,
    ENTROPY_BOUNDS,
    NORM_BOUNDS,
    PROBE_BOUNDS,
    PROBE_COSINE_BOUNDS,
    RELATIVE_BOUNDS,
)
from steersman.server.engine.frontend import Frontend
from steersman.server.engine.monitor import GROUPS, OTHER
from steersman.server.histograms import PreBucketed
from steersman.server.live.feed import Feed
from steersman.steering import spec
from steersman.steering.detectors import BaselineMeta
from steersman.steering.errors import SiteUnsupported, SteeringError
from steersman.steering.plan import Plan
from steersman.steering.sites import Site

logger = logging.getLogger(__name__)

MAX_NAMES = 64
TICK = 1.0  # seconds between two looks at how long the workers have not answered


class LayerMetrics:
    """The metrics that workers' statistics go into."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, layers: int = 0) -> None:
        """``layers``: of the model; their outliers count from 0."""

        def histogram(name: str, help: str, bounds: tuple[float, ...], *labels: str) -> PreBucketed:
            return PreBucketed(f"steersman_{name}", help, labels, buckets=bounds, registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"steersman_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, mode: Any, *labels: str) -> Gauge:
            return Gauge(f"steersman_{name}", help, labels, registry=registry, multiprocess_mode=mode)

        self.norms = histogram(
            "activation_norm", "Norm of the stream leaving a layer, of sampled tokens.", NORM_BOUNDS,
            "layer", "tokens", "steered",
        )  # fmt: skip
        self.largest = gauge(
            "activation_norm_max", "Largest norm leaving a layer in the statistics read last.", "mostrecent", "layer"
        )
        self.cosines = histogram(
            "layer_cosine", "Cosine between the streams entering and leaving a layer.", COSINE_BOUNDS, "layer"
        )
        self.edits = histogram(
            "relative_edit_norm", "Norm of an edit beside that of the stream, of sampled tokens.", RELATIVE_BOUNDS,
            "asset", "layer",
        )  # fmt: skip
        self.probes = histogram(
            "probe_value", "What requests' probes read, of sampled tokens.", PROBE_BOUNDS, "probe", "layer"
        )
        self.aligned = histogram(
            "probe_cosine", "Cosine between probes' directions and what they are read from, of sampled tokens.",
            PROBE_COSINE_BOUNDS, "probe", "layer",
        )  # fmt: skip
        self.entropy = histogram(
            "answer_entropy", "Entropy in nats of the next token's distribution, of sampled tokens.", ENTROPY_BOUNDS
        )
        self.decisions = counter("gate_decisions", "Decisions of gates, by the asset whose edit they gate.", "asset")
        self.open = counter("gate_open", "Decisions of gates to open.", "asset")
        self.outliers = counter("norm_outliers", "Sampled tokens whose norm is far from what is usual.", "layer")
        self.passes = counter("monitor_passes", "Forward passes that statistics looked at, on each pipeline stage.")
        self.errors = counter("monitor_errors", "Errors that cost statistics.")
        self.lag = gauge("monitor_lag_seconds", "Time since every worker's statistics were read.", "livemax")
        self._names: dict[PreBucketed | Counter, set[str]] = {}
        for layer in range(layers):
            self.outliers.labels(str(layer))

    def take(self, answer: Mapping[str, Any]) -> None:
        """Adds one worker's statistics."""
        largest: dict[int, float] = {}
        for layer, group, counts, total, most in answer["activation_norm"]:
            self.norms.labels(str(layer), *GROUPS[group]).add(counts, total)
            if most is not None:
                largest[layer] = max(most, largest.get(layer, 0.0))
        for layer, value in largest.items():
            self.largest.labels(str(layer)).set(value)
        for layer, counts, total in answer["layer_cosine"]:
            self.cosines.labels(str(layer)).add(counts, total)
        named = {"relative_edit_norm": self.edits, "probe_value": self.probes, "probe_cosine": self.aligned}
        for name, metric in named.items():
            for asset, layer, counts, total in answer[name]:
                shown = self._shown(metric, asset)
                metric.labels(shown, "all" if shown == OTHER else str(layer)).add(counts, total)
        for counts, total in answer["answer_entropy"]:
            self.entropy.add(counts, total)
        for asset, decisions, opened in answer["gates"]:
            shown = self._shown(self.decisions, asset)
            self.decisions.labels(shown).inc(decisions)
            self.open.labels(shown).inc(opened)
        for layer, count in answer["norm_outliers"]:
            self.outliers.labels(str(layer)).inc(count)
        self.passes.inc(answer["passes"])
        self.errors.inc(answer["errors"])

    def _shown(self, metric: PreBucketed | Counter, name: str) -> str:
        names = self._names.setdefault(metric, set())
        if name not in names and name != OTHER and len(names) < MAX_NAMES:
            names.add(name)
        return name if name in names else OTHER


class Monitoring:
    """Reads the statistics of every worker that this process reaches, as long as it runs."""

    def __init__(
        self,
        frontend: Frontend,
        metrics: LayerMetrics,
        interval: float,
        live: Feed | None = None,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """``busy``: whether a request of this process is in the engine."""
        self._watched = ""  # the id of the plan of probes that the workers read for all requests
        self._refused = ""  # why they do not read the one that is asked for
        self.frontend = frontend
        self.metrics = metrics
        self.live = live  # gets the same statistics
        self.interval = interval
        self._busy = busy
        self.baseline: BaselineMeta | None = None  # what norms are judged by, instead of those seen before
        self._based = False  # whether the workers know it
        self._begun = -1  # sequences, at the last look: any number but this one means traffic
        self._more = False  # whether there was traffic at the last look, whose end the next reading brings
        self._received: dict[str, int] = {}  # by worker, the number of the last answer that arrived
        self._read = time.monotonic()  # everything counted until then has been read
        self._failing = False

    def due(self) -> bool:
        """Whether there may be anything to read: from the first request on until a reading after the last one.

        Workers that share memory with their engine wait by spinning for a second after every call: an idle server's
        would never come to rest.
        """
        more, begun = self._busy() or self.frontend.begun != self._begun, self.frontend.begun
        due = more or self._more or self._failing
        self._more, self._begun = more, begun
        return due

    async def watch(self) -> None:
        """One call to the workers at a time, however long it takes; none while there is no traffic."""
        while True:
            asked = time.monotonic()
            if not self.due():
                self._done(asked)
                self.show_lag()
                await asyncio.sleep(self.interval)
                continue
            call = asyncio.ensure_future(self.read())
            try:
                while not call.done():
                    await asyncio.wait({call}, timeout=TICK)
                    self.show_lag()
            finally:
                call.cancel()
            self._note(call, asked)
            self.show_lag()
            await asyncio.sleep(max(asked + self.interval - time.monotonic(), TICK / 10))

    async def read(self) -> None:
        """One reading. Raises what the call raises."""
        if self.frontend.settings.watched:
            await self._watch_probes()
        if self.baseline is not None and not self._based:
            await self.tell_baseline()
        answers = await self.frontend.rpc("steersman_statistics", self.frontend.holder, dict(self._received))
        self.receive(a for a in answers if a is not None)

    def receive(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Counts each answer once, also if it comes again."""
        for answer in answers:
            if answer["worker"] not in self._received:
                self._watched = ""  # it may have started after it was told what to watch
                self._based = False
            if answer["number"] > self._received.get(answer["worker"], 0):
                self._received[answer["worker"]] = answer["number"]
                self.metrics.take(answer)
                if self.live is not None:
                    self.live.take(answer)

    async def _watch_probes(self) -> None:
        """Tells the workers which vectors to read for all requests, as the store has them now."""
        try:
            plan = await asyncio.to_thread(self._plan_of_probes)
        except SteeringError as error:
            if error.message != self._refused:
                self._refused = error.message
                logger.warning("--steering-monitor-probes: %s", error.message)
            return
        if plan.id != self._watched:
            await self.frontend.rpc("steersman_watch", plan.to_bytes())
            self._watched, self._refused = plan.id, ""

    async def tell_baseline(self) -> None:
        """Tells the workers which norms are usual. Raises what the call raises."""
        assert self.baseline is not None
        await self.frontend.rpc("steersman_baseline", list(self.baseline.mean), list(self.baseline.deviation))
        self._based = True

    def _plan_of_probes(self) -> Plan:
        probes = [spec.Probe(vector=name) for name in self.frontend.settings.watched]
        plan = self.frontend.resolver.resolve(spec.Steering(probes=probes))
        for read in plan.probes:
            if read.place.site in (Site.ATTN_Z, Site.MLP_POST):
                raise SiteUnsupported(
                    f"{plan.probe_names[read.probe]} is of {read.place.site}, of which a rank has a part"
                )
        return plan

    def show_lag(self) -> None:
        lag = time.monotonic() - self._read
        self.metrics.lag.set(lag)
        if self.live is not None:
            self.live.late(lag)

    def _note(self, call: asyncio.Future[None], asked: float) -> None:
        error = asyncio.CancelledError() if call.cancelled() else call.exception()
        if error is None:
            self._done(asked)
        elif not self._failing:
            self._failing = True
            logger.error("the workers' statistics could not be read: %s", error or type(error).__name__)

    def _done(self, asked: float) -> None:
        """Everything counted until ``asked`` has been read."""
        self._read, self._failing = asked, False
        if self.live is not None:
            self.live.publish()
