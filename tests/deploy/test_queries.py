"""Every query of every panel, variable, rule and alert, run by a real Prometheus, finds numbers.

The page of metrics is a stand-in with the agreed names; a misspelt name answers with success and nothing.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.deploy.exporter import LAYERS, METRICS
from tests.deploy.prometheus import Expression, Prometheus, expressions, needs_prometheus, rules, substitute

ALL = expressions()
NAME = re.compile(r"(?<![\w:])(?:steersman_|vllm:)\w+")


def known() -> set[str]:
    """The names as they stand on a page, with their suffixes."""
    suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_sum", "_count", "_bucket"]}
    return {name + end for name, (kind, _, _) in METRICS.items() for end in suffixes[kind.__name__]}


@needs_prometheus
@pytest.mark.parametrize("expression", ALL, ids=lambda e: e.where)
def test_it_finds_numbers(prometheus: Prometheus, expression: Expression) -> None:
    assert prometheus.numbers(expression.promql, patience=8), expression.promql


@needs_prometheus
def test_what_alerts_measure_is_there_whether_they_fire_or_not(prometheus: Prometheus) -> None:
    for expression in ALL:
        if expression.kind == "alert":
            assert len(prometheus.numbers(expression.measure, patience=8)) >= len(prometheus.numbers(expression.promql))


@needs_prometheus
def test_a_misspelt_name_is_caught(prometheus: Prometheus) -> None:
    assert prometheus.numbers("sum(rate(steersman_request_total[30s]))") == []
    with pytest.raises(AssertionError, match="parse error"):
        prometheus.numbers("sum(rate(steersman_requests_total[30s])")


@needs_prometheus
def test_layers_come_in_their_order(prometheus: Prometheus) -> None:
    """Rows of a heat map stand in the order of the answer."""
    (heat,) = [e for e in ALL if e.where == "layers.json: Norm of the stream [A]"]
    now = float(prometheus.get("query", query="time()")["result"][1])
    series = prometheus.get("query_range", query=heat.promql, start=now - 5, end=now, step=1)["result"]
    assert [int(s["metric"]["layer"]) for s in series] == [int(layer) for layer in LAYERS]


def test_names_are_the_agreed_ones() -> None:
    """Where ``or`` gives a zero, a misspelt name would find a number all the same."""
    for expression in ALL:
        assert set(NAME.findall(expression.promql)) <= known(), expression.where


def test_vllm_has_the_names_that_are_its_own() -> None:
    """In the source of its metrics, with the same type: the page here is only a stand-in."""
    found = importlib.util.find_spec("vllm")
    assert found
    assert found.origin
    source = (Path(found.origin).parent / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    real = {name: kind for kind, name in re.findall(r'self\._(\w+)_cls\(\s*name="(vllm:\w+)"', source)}
    for name, (kind, labels, _) in METRICS.items():
        if name.startswith("vllm:"):
            assert real[name] == kind.__name__.lower(), name
            assert set(labels) <= {"model_name", "engine", "finished_reason"}
    assert 'labelnames + ["finished_reason"]' in source


def test_every_metric_of_ours_is_shown_somewhere() -> None:
    used = {name for expression in ALL if expression.kind == "panel" for name in NAME.findall(expression.promql)}
    bare = {re.sub("_(total|sum|count|bucket)$", "", name) for name in used}
    assert {name for name in METRICS if name.startswith("steersman_")} <= bare


def test_recorded_series_are_those_that_others_ask_for() -> None:
    asked = {name for e in ALL for name in re.findall(r"steersman:[\w:]+", e.promql)}
    assert asked == {rule["record"] for rule in rules() if "record" in rule}


def test_substitution_knows_the_dashboards_variables_only() -> None:
    assert substitute('rate(a{b=~"$b"}[$__rate_interval])', {"b": ".*"}, "7s") == 'rate(a{b=~".*"}[7s])'
    assert substitute('label_replace(a, "l", "0$1", "l", "(.)")', {}) == 'label_replace(a, "l", "0$1", "l", "(.)")'
    with pytest.raises(KeyError, match="no variable \\$layer"):
        substitute('a{layer=~"$layer"}', {"b": ".*"})


@needs_prometheus
def test_alerts_have_the_labels_that_their_texts_name(prometheus: Prometheus) -> None:
    active = {alert["labels"]["alertname"]: alert for alert in prometheus.get("alerts")["alerts"]}
    for rule in rules():
        if "alert" in rule:
            named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            assert named <= set(active[rule["alert"]]["labels"]), rule["alert"]
