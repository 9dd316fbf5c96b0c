"""Prometheus' configuration, recording rules and alerts, by promtool and against the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import Counter, generate_latest

from steersman.server.settings import Settings
from tests.deploy.exporter import METRICS, Page
from tests.deploy.prometheus import DEPLOY, RULES, expressions, needs_prometheus, ours, promtool, rules

CASES = Path(__file__).parent / "alerts.test.yml"
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
DOCS = (DEPLOY.parent / "docs/monitoring.md").read_text(encoding="utf-8")


@needs_prometheus
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    said = promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")
    assert f"{len(list(RULES.iterdir()))} rule files found" in said
    assert "FAILED" not in said


@needs_prometheus
def test_promtool_accepts_our_names_and_helps() -> None:
    page = Page()
    page.step()
    promtool("check", "metrics", page=ours(generate_latest(page.registry).decode()))
    with pytest.raises(AssertionError, match="_total"):
        promtool(
            "check",
            "metrics",
            page="# HELP steersman_edits Edits.\n# TYPE steersman_edits counter\nsteersman_edits 1\n",
        )


@needs_prometheus
def test_alerts_fire_where_they_should_and_nowhere_else() -> None:
    promtool("test", "rules", CASES)


def test_every_alert_has_a_case_where_it_fires() -> None:
    fired = set(re.findall(r'ALERTS\{alertname="(\w+)", alertstate="firing"', CASES.read_text()))
    assert fired == set(ALERTS)


@needs_prometheus
def test_a_limit_that_is_wrong_is_caught(tmp_path: Path) -> None:
    """The cases hold the alerts to their limits."""
    text = (RULES / "steersman.yml").read_text()
    (tmp_path / "steersman.yml").write_text(text.replace("p95 > 0.5", "p95 > 5"))
    (tmp_path / "thresholds.yml").write_text((RULES / "thresholds.yml").read_text())
    cases = yaml.safe_load(CASES.read_text())
    (tmp_path / "cases.yml").write_text(yaml.safe_dump({**cases, "rule_files": ["steersman.yml", "thresholds.yml"]}))
    with pytest.raises(AssertionError, match="SteersmanEditTooLarge"):
        promtool("test", "rules", tmp_path / "cases.yml")


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name: str) -> None:
    """In the alert itself, and under a heading of its own in the docs."""
    annotations = ALERTS[name]["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert "{{ $labels." in annotations["summary"]
    assert re.search(rf"^### {name}$", DOCS, re.MULTILINE)
    assert ALERTS[name]["labels"]["severity"] in ("warning", "critical")


def test_alerts_compare_a_measure_with_a_limit() -> None:
    """So that the measure can be looked for on a healthy server."""
    for expression in expressions():
        if expression.kind == "alert":
            assert len(expression.measure) < len(expression.promql)


def test_the_options_that_runbooks_and_docs_name_exist() -> None:
    texts = [DOCS, *((RULES / name).read_text() for name in ("steersman.yml", "thresholds.yml"))]
    named = {option for text in texts for option in re.findall(r"--steering-([a-z-]+)", text)}
    assert named
    assert named <= {field.replace("_", "-") for field in Settings.__dataclass_fields__}


def test_the_docs_list_every_metric() -> None:
    """By the names in the table, with their labels."""
    table = DOCS.partition("| metric |")[2].partition("\n\n")[0]
    listed = dict(re.findall(r"`(\w+)(?:\{([\w,]+)\})?`", table))
    for name, (kind, labels, _) in METRICS.items():
        if name.startswith("steersman_"):
            shown = name.removeprefix("steersman_") + ("_total" if kind is Counter else "")
            assert listed.get(shown) == ",".join(labels), shown
