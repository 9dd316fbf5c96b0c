"""Prometheus metrics of actions. Label values are the policies' names and outcomes from a fixed list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from steersman.steering.errors import SteeringError

OUTCOMES = ("ok", "refused", "failed", "cancelled")
SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)


class ActionMetrics:
    def __init__(self, policy: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._policy = policy
        self._actions = Counter(
            "steersman_actions",
            "Observations answered, by outcome: ok, refused (4xx), failed (5xx), cancelled (the robot has gone).",
            ["policy", "outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "steersman_action_seconds",
            "From an observation to its actions.",
            ["policy"],
            registry=registry,
            buckets=SECONDS,
        )
        self._saturation = Counter(
            "steersman_action_saturation",
            "Numbers of actions that were cut to the limit.",
            ["policy"],
            registry=registry,
        )
        for outcome in OUTCOMES:  # 0, not missing, until the first
            self._actions.labels(policy, outcome)
        self._seconds.labels(policy)
        self._saturation.labels(policy)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Times and counts one observation, however it ends."""
        started, outcome = perf_counter(), "cancelled"
        try:
            yield
            outcome = "ok"
            self._seconds.labels(self._policy).observe(perf_counter() - started)
        except SteeringError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        except Exception:  # vLLM's own
            outcome = "failed"
            raise
        finally:
            self._actions.labels(self._policy, outcome).inc()

    def saturated(self, count: int) -> None:
        self._saturation.labels(self._policy).inc(count)
