"""Every PromQL expression that we ship, and a real Prometheus to run it on.

Prometheus and promtool are Debian's package ``prometheus``; where they are not on the PATH, the tests say so and are
skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import yaml

from tests.e2e.server import free_port

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
RULES = DEPLOY / "prometheus/rules"
START_SECONDS = 30

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not on the PATH (Debian: apt-get install prometheus)",
)


@dataclass(frozen=True)
class Expression:
    """One query, ready to be run. ``where`` says whose it is."""

    where: str
    kind: Literal["panel", "variable", "record", "alert"]
    promql: str

    @property
    def measure(self) -> str:
        """What an alert compares with its limit: a healthy server has it too, where the alert itself is empty."""
        if self.kind != "alert":
            return self.promql
        compared = re.fullmatch(r"(.*\S)\s*[<>]\s*[\d.]+", self.promql.strip(), re.DOTALL)
        assert compared, f"{self.where} is not of the form `measure > limit`"
        return compared[1]


def dashboards() -> dict[str, dict[str, Any]]:
    """The committed dashboards by file name."""
    return {
        f.name: json.loads(f.read_text(encoding="utf-8")) for f in sorted((DEPLOY / "grafana/dashboards").iterdir())
    }


def rules() -> list[dict[str, Any]]:
    """The recording rules and alerts that we ship, in order."""
    files = [yaml.safe_load(f.read_text(encoding="utf-8")) for f in sorted(RULES.iterdir())]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def expressions(window: str = "30s") -> list[Expression]:
    """All of them: panels, dashboards' variables, recording rules, alerts. ``window``: of the rates in panels."""
    found = []
    for file, board in dashboards().items():
        variables = {v["name"]: v for v in board["templating"]["list"]}
        values = {name: v["allValue"] for name, v in variables.items() if "allValue" in v}
        for name, variable in variables.items():
            if variable["type"] == "query":
                found.append(Expression(f"{file}: ${name}", "variable", _known_values(variable["query"])))
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                where = f"{file}: {panel['title']} [{target['refId']}]"
                found.append(Expression(where, "panel", substitute(target["expr"], values, window)))
    for rule in rules():
        kind: Literal["record", "alert"] = "record" if "record" in rule else "alert"
        found.append(Expression(f"{kind} {rule[kind]}", kind, rule["expr"]))
    return found


def substitute(promql: str, values: Mapping[str, str], window: str = "30s") -> str:
    """The text as Grafana would send it. ``$1`` and the like belong to PromQL's label_replace and stay."""
    known = {"__rate_interval": window, "__interval": window, "__range": window, **values}

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise KeyError(f"the dashboard has no variable ${match[1]}: {promql}")
        return known[match[1]]

    return re.sub(r"\$([A-Za-z_]\w*)", value, promql)


def _known_values(query: str) -> str:
    """Grafana's ``label_values(metric, label)`` as PromQL."""
    parts = re.fullmatch(r"label_values\((\S+), (\w+)\)", query)
    assert parts, f"not of the form label_values(metric, label): {query}"
    return f"count by ({parts[2]}) ({parts[1]})"


def promtool(*arguments: str | Path, page: str | None = None) -> str:
    """Runs it, must succeed, and gives what it said. ``page``: its standard input."""
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, input=page, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def ours(page: str) -> str:
    """Steersman's part of a page of metrics: promtool finds fault with the colon in vLLM's names."""
    return "".join(line + "\n" for line in page.splitlines() if re.match(r"(# \w+ )?steersman_", line))


@dataclass(frozen=True)
class Prometheus:
    """A running one. ``http`` has its address."""

    http: httpx.Client

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of the HTTP API."""
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer['errorType']}: {answer['error']}"
        return answer["data"]

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The series of an instant vector, now."""
        return list(self.get("query", query=promql)["result"])

    def numbers(self, promql: str, patience: float = 0) -> list[float]:
        """An instant vector's values other than NaN, after up to ``patience`` seconds of waiting for one."""
        deadline = time.monotonic() + patience
        while True:
            values = [float(series["value"][1]) for series in self.query(promql)]
            if (found := [v for v in values if v == v]) or time.monotonic() >= deadline:
                return found
            time.sleep(0.5)


@contextmanager
def run_prometheus(
    targets: Sequence[str], folder: Path, thresholds: Mapping[str, float] | None = None, scrapes: int = 4
) -> Iterator[Prometheus]:
    """Starts Prometheus with our configuration and rules on the given ``host:port``s; it scrapes every second.

    ``thresholds``: by probe, as an operator adds them. ``scrapes``: of each target, before it is handed out.
    """
    port = free_port()
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [
            {"targets": list(targets) if job["job_name"] == "steersman" else [f"127.0.0.1:{port}"]}
        ]
    shutil.copytree(RULES, folder / "rules")
    (folder / "rules/own.yml").write_text(yaml.safe_dump(_thresholds(thresholds or {})))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            prometheus = Prometheus(http)
            _wait(prometheus, process, log, len(targets), scrapes)
            yield prometheus
    finally:
        process.terminate()
        process.wait(20)


def _wait(prometheus: Prometheus, process: subprocess.Popen[bytes], log: Path, targets: int, scrapes: int) -> None:
    asked = f'count(count_over_time(up{{job="steersman"}}[10m]) >= {scrapes})'
    deadline = time.monotonic() + START_SECONDS + 2 * scrapes
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if prometheus.numbers(asked) == [targets]:
                return
        except httpx.TransportError:  # not listening yet
            pass
        except ValueError:  # not ready yet: a sentence instead of JSON
            pass
        time.sleep(0.25)
    raise RuntimeError(f"Prometheus did not come up:\n{log.read_text(errors='replace')[-4000:]}")


def _thresholds(values: Mapping[str, float]) -> dict[str, Any]:
    added = [
        {"record": "steersman:probe_threshold", "labels": {"probe": probe}, "expr": f"vector({value})"}
        for probe, value in values.items()
    ]
    return {"groups": [{"name": "own-thresholds", "rules": added}]}
