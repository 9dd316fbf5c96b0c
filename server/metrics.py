"""Prometheus metrics of steered requests, in vLLM's own ``/metrics``.

Label values are outcomes from a fixed list and the names of stored assets, at most ``MAX_ASSETS`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from steersman.steering.errors import SteeringError
from steersman.steering.plan import Plan

MAX_ASSETS = 200
OTHER = "other"


class Metrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "steersman_requests", "Requests that asked for steering, by outcome.", ["outcome"], registry=registry
        )
        self.edited = Counter("steersman_edited_tokens", "Tokens edited, by asset.", ["asset"], registry=registry)
        self._assets: set[str] = set()

    def count(self, outcome: str) -> None:
        """steered, refused (4xx) or failed (5xx)."""
        self.requests.labels(outcome).inc()

    @contextmanager
    def watching(self) -> Iterator[Callable[[str], None]]:
        """Counts a request that ends in an error; gives the function that counts one that does not."""
        try:
            yield self.count
        except SteeringError as error:
            self.count("refused" if error.status < 500 else "failed")
            raise

    def observe(self, plan: Plan, report: dict[str, Any]) -> None:
        for step, done in zip(plan.steps, report.get("interventions", ()), strict=False):
            for asset in step.assets or ("none",):
                self.edited.labels(self._label(asset.partition("@")[0])).inc(done["tokens"])

    def _label(self, asset: str) -> str:
        if asset not in self._assets and len(self._assets) < MAX_ASSETS:
            self._assets.add(asset)
        return asset if asset in self._assets else OTHER
