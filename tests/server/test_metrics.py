import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from steersman.server.metrics import MAX_ASSETS, OTHER, Metrics
from steersman.server.reports import Overdose
from steersman.steering.errors import EngineUnsteered, SteeringError, StoreError, StoreUnavailable, UnknownAsset
from tests.server.fakes import raw_report
from tests.steering.library import inline, noise, plan_of, resolve, vector


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def test_the_names_are_those_of_the_design(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.count("steered")
    metrics.stocked({})
    metrics.store_failed(StoreUnavailable("gone"))
    metrics.edited.labels("v").inc()
    text = generate_latest(registry).decode()
    for line in (
        'steersman_requests_total{outcome="steered"} 1.0',
        'steersman_edited_tokens_total{asset="v"} 1.0',
        'steersman_store_errors_total{reason="store_unavailable"} 1.0',
        'steersman_store_assets{kind="vector"} 0.0',
        "steersman_plans_resident 0.0",
        "steersman_plan_build_seconds_count 0.0",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UnknownAsset("no"), "refused"),
        (EngineUnsteered("no"), "failed"),
        (KeyError("no"), "failed"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_a_request_that_ends_in_an_error_is_counted_once(
    registry: CollectorRegistry, metrics: Metrics, error: BaseException, outcome: str
) -> None:
    with pytest.raises(type(error)), metrics.watching():
        raise error
    outcomes = ("steered", "refused", "failed", "cancelled")
    found = {o: registry.get_sample_value("steersman_requests_total", {"outcome": o}) for o in outcomes}
    assert found == {**dict.fromkeys(outcomes, 0.0), outcome: 1.0}


def test_counters_by_a_fixed_list_begin_at_zero(registry: CollectorRegistry, metrics: Metrics) -> None:
    found = {
        (s.name, *s.labels.values()): s.value
        for family in registry.collect() for s in family.samples if s.name.endswith("_total")
    }  # fmt: skip
    reasons = [error.code for error in leaves(StoreError)]
    assert found == {
        **{("steersman_requests_total", outcome): 0.0 for outcome in ("steered", "refused", "failed", "cancelled")},
        **{("steersman_store_errors_total", reason): 0.0 for reason in reasons},
        **{("steersman_replays_total", outcome): 0.0 for outcome in ("done", "failed")},
    }


def leaves(error: type[SteeringError]) -> list[type[SteeringError]]:
    return [leaf for below in error.__subclasses__() for leaf in leaves(below)] or [error]


def test_assets_within_the_limit_count_zero(registry: CollectorRegistry, metrics: Metrics) -> None:
    edits = [{"op": "add", "vector": name} for name in ("v", "w")]
    plan = resolve({"interventions": edits}, vector("v", noise(1, 8), [1]), vector("w", noise(1, 8), [1]))
    metrics.overdosed(plan, [Overdose(1, 5, 1, 0.9)], "cap")
    found = {
        a: registry.get_sample_value("steersman_dosage_limited_total", {"asset": a, "action": "cap"}) for a in "vw"
    }
    assert found == {"v": 0.0, "w": 5.0}


def test_edited_tokens_are_counted_by_name_without_the_version(registry: CollectorRegistry, metrics: Metrics) -> None:
    plan = resolve({"interventions": [{"op": "add", "vector": "v"}]}, vector("v", noise(1, 8), [1]))
    assert plan.steps[0].assets[0].startswith("v@")
    metrics.observe(plan, {"interventions": [{"tokens": 5}]})
    assert registry.get_sample_value("steersman_edited_tokens_total", {"asset": "v"}) == 5


def test_an_edit_without_an_asset_is_counted_too(registry: CollectorRegistry, metrics: Metrics) -> None:
    plan = plan_of(
        {"op": "heads", "heads": [[1, 0]], "factor": 0}, {"op": "add", "vector": inline(noise(8)), "layers": 1}
    )
    metrics.observe(plan, {"interventions": [{"tokens": raw_report(plan)["edited"][0]}, {"tokens": 4}]})
    assert registry.get_sample_value("steersman_edited_tokens_total", {"asset": "none"}) == 3
    assert registry.get_sample_value("steersman_edited_tokens_total", {"asset": "inline"}) == 4


def test_labels_are_capped(registry: CollectorRegistry, metrics: Metrics) -> None:
    names = [f"a{i}" for i in range(MAX_ASSETS + 50)]
    for name in names * 2:
        metrics.edited.labels(metrics._label(name)).inc()
    samples = [s for family in registry.collect() for s in family.samples if s.name == "steersman_edited_tokens_total"]
    assert len(samples) == MAX_ASSETS + 1
    assert registry.get_sample_value("steersman_edited_tokens_total", {"asset": OTHER}) == 100


def test_kinds_that_have_gone_fall_to_zero(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.stocked({"vector": 3, "profile": 1})
    metrics.stocked({"vector": 2})
    assert registry.get_sample_value("steersman_store_assets", {"kind": "vector"}) == 2
    assert registry.get_sample_value("steersman_store_assets", {"kind": "profile"}) == 0


def test_two_servers_in_one_process_need_two_registries(registry: CollectorRegistry, metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry)
