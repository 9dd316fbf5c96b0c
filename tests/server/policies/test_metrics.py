"""Actions in ``/metrics``: each counted once, by how it ended."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from steersman.server.policies.metrics import ActionMetrics
from steersman.steering.errors import EngineUnsteered, InvalidRequest


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def outcomes(registry: CollectorRegistry) -> dict[str, float]:
    return {
        s.labels["outcome"]: s.value
        for family in registry.collect() for s in family.samples if s.name == "steersman_actions_total"
    }  # fmt: skip


def test_every_outcome_begins_at_zero(registry: CollectorRegistry) -> None:
    ActionMetrics("bins", registry)
    assert outcomes(registry) == {"ok": 0.0, "refused": 0.0, "failed": 0.0, "cancelled": 0.0}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (InvalidRequest("no"), "refused"),
        (EngineUnsteered("no"), "failed"),
        (KeyError("no"), "failed"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_an_action_is_counted_once_and_timed_when_it_was_given(
    registry: CollectorRegistry, error: BaseException | None, outcome: str
) -> None:
    metrics = ActionMetrics("bins", registry)
    if error is None:
        with metrics.acting():
            pass
    else:
        with pytest.raises(type(error)), metrics.acting():
            raise error
    assert outcomes(registry) == {**dict.fromkeys(outcomes(registry), 0.0), outcome: 1.0}
    timed = registry.get_sample_value("steersman_action_seconds_count", {"policy": "bins"})
    assert timed == (outcome == "ok")
