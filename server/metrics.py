"""Prometheus metrics of steered requests and of the store, in vLLM's own ``/metrics``.

Label values are outcomes, error codes and kinds from fixed lists, and the names of stored assets, at most
``MAX_ASSETS`` of them. Counters by a fixed list are there from the start, at 0: Prometheus takes the first value it
sees for where a counter began, and a first error would not show in a rate. Where several HTTP processes serve one
port, Prometheus adds their counters up and takes the gauge that was set last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from steersman.server.detection import Score
from steersman.server.reports import Overdose
from steersman.steering.assets import KINDS
from steersman.steering.errors import (
    AssetCorrupt,
    AssetExists,
    AssetInUse,
    SteeringError,
    StoreError,
    StoreUnavailable,
    UnknownAsset,
    UnknownCapture,
)
from steersman.steering.plan import Plan

OUTCOMES = ("steered", "refused", "failed", "cancelled")
REASONS = tuple(
    error.code for error in (UnknownAsset, UnknownCapture, AssetExists, AssetInUse, AssetCorrupt, StoreUnavailable)
)
REPLAYED = ("done", "failed")
FOUND = ("usual", "unusual", "unscored")
MAX_ASSETS = 200
OTHER = "other"
BUILD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

CONFLICTS = (-20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
SCORES = (-20.0, -10.0, -5.0, -2.0, 0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0, 10000.0)


class Metrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, help: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, help, labels, registry=registry, multiprocess_mode="mostrecent")

        def counter(name: str, help: str, label: str) -> Counter:
            return Counter(name, help, [label], registry=registry)

        self.requests = counter("steersman_requests", "Requests that asked for steering, by outcome.", "outcome")
        self.edited = counter("steersman_edited_tokens", "Tokens edited, by asset.", "asset")
        self.store_errors = counter("steersman_store_errors", "Failed look-ups and changes in the store.", "reason")
        self.store_assets = gauge("steersman_store_assets", "Versions in the store, by kind.", ("kind",))
        self.plans = gauge("steersman_plans_resident", "Plans on a worker, when the last one was loaded.")
        self.building = Histogram(
            "steersman_plan_build_seconds",
            "From a request's steering object to a plan that is on every worker.",
            registry=registry,
            buckets=BUILD_SECONDS,
        )
        self.dosage = Counter(
            "steersman_dosage_limited",
            "Edits beyond --steering-max-relative-norm, one for each token and layer, by asset and what was done.",
            ["asset", "action"],
            registry=registry,
        )
        self.scores = Histogram(
            "steersman_detector_score",
            "-ln p of steered requests' answers under the detector's mixture.",
            ["detector"],
            registry=registry,
            buckets=SCORES,
        )
        self.answers = Counter(
            "steersman_detector_answers",
            "Answers by what the detector found: usual, unusual (beyond its threshold), unscored (a signal lacks).",
            ["detector", "outcome"],
            registry=registry,
        )
        self.conflict = Histogram(
            "steersman_conflict",
            "Inferential conflict ln p(y|image, text) - ln p(y|text) of the tokens of replayed answers.",
            registry=registry,
            buckets=CONFLICTS,
        )
        self.replays = counter("steersman_replays", "Answers replayed without their images, by outcome.", "outcome")
        self._assets: set[str] = set()
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for outcome in REPLAYED:
            self.replays.labels(outcome)
        for reason in REASONS:
            self.store_errors.labels(reason)

    def count(self, outcome: str) -> None:
        """steered, refused (4xx), failed (5xx) or cancelled (the client has gone)."""
        self.requests.labels(outcome).inc()

    @contextmanager
    def watching(self) -> Iterator[Callable[[str], None]]:
        """Counts a request that ends in an error; gives the function that counts one that does not."""
        try:
            yield self.count
        except SteeringError as error:
            self.count("refused" if error.status < 500 else "failed")
            raise
        except Exception:  # vLLM's own
            self.count("failed")
            raise
        except BaseException:
            self.count("cancelled")
            raise

    def observe(self, plan: Plan, report: Mapping[str, Any]) -> None:
        for step, done in zip(plan.steps, report.get("interventions", ()), strict=False):
            for asset in step.assets or ("none",):
                self.edited.labels(self._label(asset.partition("@")[0])).inc(done["tokens"])

    def overdosed(self, plan: Plan, found: Iterable[Overdose], action: str) -> None:
        """Of a plan that was served under a limit; what it did not exceed counts 0."""
        over = {one.index: one.tokens for one in found}
        for i, step in enumerate(plan.steps):
            for asset in step.assets or ("none",):
                self.dosage.labels(self._label(asset.partition("@")[0]), action).inc(over.get(i, 0))

    def detects(self, detector: str) -> None:
        """Answers are scored by this detector; its outcomes count from 0."""
        for outcome in FOUND:
            self.answers.labels(detector, outcome)

    def scored(self, detector: str, scores: Iterable[Score], threshold: float) -> None:
        for score in scores:
            if score.value is None:
                self.answers.labels(detector, "unscored").inc()
                continue
            self.scores.labels(detector).observe(score.value)
            self.answers.labels(detector, "unusual" if score.value > threshold else "usual").inc()

    def replayed(self, conflict: Iterable[float] | None) -> None:
        """Of one answer, the conflict of each token; None: it could not be replayed."""
        self.replays.labels("failed" if conflict is None else "done").inc()
        for value in conflict or ():
            self.conflict.observe(value)

    def store_failed(self, error: StoreError) -> None:
        self.store_errors.labels(error.code).inc()

    def stocked(self, kinds: Mapping[str, int]) -> None:
        """How many versions of each kind the store holds."""
        for kind in KINDS:
            self.store_assets.labels(kind).set(kinds.get(kind, 0))

    def _label(self, asset: str) -> str:
        if asset not in self._assets and len(self._assets) < MAX_ASSETS:
            self._assets.add(asset)
        return asset if asset in self._assets else OTHER
