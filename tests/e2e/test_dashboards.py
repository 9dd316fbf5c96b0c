"""Every query of every dashboard, rule and alert, answered by a Prometheus that scrapes a real server under load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.exporter import METRICS
from tests.deploy.prometheus import (
    Expression,
    Prometheus,
    expressions,
    needs_prometheus,
    ours,
    promtool,
    rules,
    run_prometheus,
)
from tests.e2e.server import Server
from tests.e2e.traffic import DAMAGED, DETECTOR, GATES, THRESHOLDS, VECTORS, WATCHED, serving, traffic
from tests.models.tiny import N_LAYERS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, needs_prometheus]
PATIENCE = 20.0  # seconds for what happens seldom
SCRAPED = "max(timestamp(steersman_plans_resident))"
ALL = expressions()


@dataclass(frozen=True)
class Watched:
    server: Server
    prometheus: Prometheus
    first: str  # the page of metrics before any request


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    tmp = tmp_path_factory.mktemp("watched")
    with serving(tmp) as server:
        first = server.rpc_stats()
        target = server.url.removeprefix("http://")
        with traffic(server), run_prometheus([target], tmp / "prometheus", THRESHOLDS, scrapes=8) as prometheus:
            yield Watched(server, prometheus, first)


@pytest.mark.parametrize("expression", ALL, ids=lambda e: e.where)
def test_it_finds_numbers(watched: Watched, expression: Expression) -> None:
    found = watched.prometheus.numbers(expression.measure, patience=PATIENCE)
    assert found, expression.measure
    if expression.kind == "panel":
        assert all(map(math.isfinite, found)), expression.measure


def by(watched: Watched, promql: str, label: str) -> dict[str, float]:
    """The finite values, by a label."""
    series = watched.prometheus.query(promql)
    found = {s["metric"][label]: float(s["value"][1]) for s in series}
    assert len(found) == len(series), f"{promql}: several series for one {label}"
    return {name: value for name, value in found.items() if math.isfinite(value)}


def expression(where: str) -> str:
    (found,) = (e.promql for e in ALL if e.where == where)
    return found


def test_panels_show_what_was_done(watched: Watched) -> None:
    """Numbers alone could be those of anything."""
    outcomes = by(watched, expression("overview.json: Requests for steering [A]"), "outcome")
    assert set(outcomes) == {"steered", "refused", "failed", "cancelled"}
    assert min(outcomes.values()) > 0
    errors = by(watched, expression("overview.json: Store errors [A]"), "reason")
    assert {reason for reason, rate in errors.items() if rate > 0} == {"asset_not_found", "asset_corrupt"}
    gates = by(watched, expression("assets.json: Gate open [A]"), "asset")
    assert set(gates) == set(GATES)
    assert (gates["always"], gates["never"]) == (1, 0)
    assert 0 < gates["sometimes"] < 1
    limited = by(watched, expression("assets.json: Dosage limited [A]"), "asset")
    assert limited["bold"] > 0
    assert limited["calm"] == 0
    sizes = by(watched, expression("assets.json: Now [B]"), "asset")
    assert sizes["bold"] == pytest.approx(0.9, rel=1e-3)
    assert 0.05 <= sizes["calm"] <= 0.35
    probes = by(watched, expression("assets.json: Probe values [A]"), "probe")
    assert set(probes) == {WATCHED, "truth"}
    for heat in ("Norm of the stream", "Norms out of baseline", "Cosine between a layer's input and output"):
        assert set(by(watched, expression(f"layers.json: {heat} [A]"), "layer")) == {f"{i:03}" for i in range(N_LAYERS)}
    unusual = by(watched, expression("assets.json: Unusual answers [A]"), "detector")
    assert 0 < unusual[DETECTOR] < 1  # those that `bold` steers, and only they
    kinds = by(watched, expression("overview.json: Assets [A]"), "kind")
    assert kinds["vector"] == len(VECTORS)
    assert (kinds["baseline"], kinds["detector"]) == (1, 1)
    saturated = by(watched, expression("robots.json: Saturation [A]"), "policy")
    assert saturated["bins"] > 0


def test_prometheus_has_the_pages_own_counts(watched: Watched) -> None:
    """What Prometheus last saw of each counter lies between two readings of the page."""
    names = ("steersman_requests_total", "steersman_edited_tokens_total", "steersman_gate_decisions_total")
    before = totals(watched.server.rpc_stats())
    (scraped,) = watched.prometheus.numbers(SCRAPED)
    assert watched.prometheus.numbers(f"{SCRAPED} > {scraped} + 1.5", patience=PATIENCE)
    seen = {name: sum(watched.prometheus.numbers(name)) for name in names}
    after = totals(watched.server.rpc_stats())
    for name in names:
        assert 0 < before[name] <= seen[name] <= after[name], name


def totals(page: str) -> dict[str, float]:
    """Each sample's sum over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_alerts_for_what_goes_wrong(watched: Watched) -> None:
    """Pending: they wait for minutes before they fire."""
    wrong = {
        "SteersmanEditTooLarge": {"asset": "bold"},
        "SteersmanProbeOverThreshold": {"probe": WATCHED},
        "SteersmanAnswersUnusual": {"detector": DETECTOR},
        "SteersmanStoreErrors": {"reason": "asset_corrupt"},
        "SteersmanRequestsFailing": {},
    }
    for name, labels in wrong.items():
        matchers = ", ".join(f'{k}="{v}"' for k, v in {"alertname": name, **labels}.items())
        assert watched.prometheus.numbers(f"ALERTS{{{matchers}}}", patience=PATIENCE), name
    active = {alert["labels"]["alertname"] for alert in watched.prometheus.get("alerts")["alerts"]}
    assert active == set(wrong), "an alert for what is well"
    assert active < {rule["alert"] for rule in rules() if "alert" in rule}


def test_promtool_finds_no_fault_with_the_page(watched: Watched) -> None:
    page = ours(watched.server.rpc_stats())
    assert len(page.splitlines()) > 100
    assert promtool("check", "metrics", page=page) == ""


def test_fixed_labels_count_from_zero(watched: Watched) -> None:
    """Before any request: a counter that appears with its first event shows no rate for it."""
    found = {
        (s.name.removeprefix("steersman_"), *(v for k, v in sorted(s.labels.items()) if k != "policy")): s.value
        for family in text_string_to_metric_families(watched.first) for s in family.samples
    }  # fmt: skip
    outcomes = {"requests_total": "steered refused failed cancelled", "actions_total": "ok refused failed cancelled"}
    reasons = {"store_errors_total": "asset_not_found asset_exists asset_in_use asset_corrupt store_unavailable"}
    for name, labels in {**outcomes, **reasons}.items():
        assert {found[name, label] for label in labels.split()} == {0.0}, name
    assert {found["norm_outliers_total", str(layer)] for layer in range(N_LAYERS)} == {0.0}
    assert found["action_saturation_total",] == 0.0
    outcomes = ("usual", "unusual", "unscored")
    assert {found["detector_answers_total", DETECTOR, outcome] for outcome in outcomes} == {0.0}


def test_the_stand_in_page_is_like_this_one(watched: Watched) -> None:
    """Name, type and labels of every metric that the other tests of queries take for granted."""
    families = {f.name: f for f in text_string_to_metric_families(watched.server.rpc_stats())}
    for name, (kind, labels, _) in METRICS.items():
        found = families[name]
        assert found.type == kind.__name__.lower(), name
        shown = {label for sample in found.samples for label in sample.labels} - {"le"}
        assert shown == set(labels) if name.startswith("steersman_") else shown >= set(labels), name


def test_sums_are_there_but_for_values_below_zero(watched: Watched) -> None:
    """prometheus_client leaves such sums out; dashboards take medians there."""
    page = totals(ours(watched.server.rpc_stats()))
    counts = {name.removesuffix("_count") for name in page if name.endswith("_count")}
    without = {name for name in counts if f"{name}_sum" not in page}
    asked = [e.promql for e in ALL if any(f"{name}_sum" in e.promql for name in without)]
    assert not asked
    assert "steersman_probe_value" in without
    assert {"steersman_activation_norm", "steersman_relative_edit_norm"} <= counts - without


def test_a_damaged_asset_is_named_in_the_answer(watched: Watched) -> None:
    body = {
        "model": watched.server.model,
        "prompt": [1, 9],
        "steering": {"interventions": [{"op": "add", "vector": DAMAGED}]},
    }
    error = watched.server.post("/v1/completions", body).json()["error"]
    assert (error["code"], error["param"]) == ("asset_corrupt", "steering.interventions[0].vector")
