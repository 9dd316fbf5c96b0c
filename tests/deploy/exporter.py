"""A page of metrics as a busy and troubled Steersman shows it: every name and label that the dashboards may ask for.

It stands in for the server where only the queries are tested. ``METRICS`` is the agreed list; the server's own page
has the same names.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LAYERS = tuple(str(layer) for layer in range(12))
ASSETS = ("french", "joyful")
PROBES = ("sentiment", "refusal")
POLICIES = ("openvla", "pi0")
STEP_SECONDS = 0.2

NORMS = tuple(2.0**i for i in range(-2, 13))
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
VALUES = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
COSINES = (-0.5, 0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
SHARED = (-0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
NATS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0)

METRICS: dict[str, tuple[type[Any], tuple[str, ...], tuple[float, ...] | None]] = {
    "steersman_requests": (Counter, ("outcome",), None),
    "steersman_edited_tokens": (Counter, ("asset",), None),
    "steersman_activation_norm": (Histogram, ("layer", "tokens", "steered"), NORMS),
    "steersman_relative_edit_norm": (Histogram, ("asset", "layer"), SHARES),
    "steersman_probe_value": (Histogram, ("probe", "layer"), VALUES),
    "steersman_probe_cosine": (Histogram, ("probe", "layer"), SHARED),
    "steersman_gate_open": (Counter, ("asset",), None),
    "steersman_gate_decisions": (Counter, ("asset",), None),
    "steersman_layer_cosine": (Histogram, ("layer",), COSINES),
    "steersman_answer_entropy": (Histogram, (), NATS),
    "steersman_conflict": (Histogram, (), VALUES),
    "steersman_replays": (Counter, ("outcome",), None),
    "steersman_norm_outliers": (Counter, ("layer",), None),
    "steersman_detector_score": (Histogram, ("detector",), VALUES),
    "steersman_detector_answers": (Counter, ("detector", "outcome"), None),
    "steersman_dosage_limited": (Counter, ("asset", "action"), None),
    "steersman_plans_resident": (Gauge, (), None),
    "steersman_plan_build_seconds": (Histogram, (), Histogram.DEFAULT_BUCKETS),
    "steersman_store_assets": (Gauge, ("kind",), None),
    "steersman_store_errors": (Counter, ("reason",), None),
    "steersman_actions": (Counter, ("policy", "outcome"), None),
    "steersman_action_seconds": (Histogram, ("policy",), Histogram.DEFAULT_BUCKETS),
    "steersman_action_saturation": (Counter, ("policy",), None),
    "steersman_monitor_lag_seconds": (Gauge, (), None),
    "vllm:request_success": (Counter, ("model_name", "engine", "finished_reason"), None),
    "vllm:num_requests_running": (Gauge, ("model_name", "engine"), None),
    "vllm:num_requests_waiting": (Gauge, ("model_name", "engine"), None),
    "vllm:prompt_tokens": (Counter, ("model_name", "engine"), None),
    "vllm:generation_tokens": (Counter, ("model_name", "engine"), None),
    "vllm:kv_cache_usage_perc": (Gauge, ("model_name", "engine"), None),
    "vllm:e2e_request_latency_seconds": (Histogram, ("model_name", "engine"), Histogram.DEFAULT_BUCKETS),
    "vllm:time_to_first_token_seconds": (Histogram, ("model_name", "engine"), Histogram.DEFAULT_BUCKETS),
    "vllm:inter_token_latency_seconds": (Histogram, ("model_name", "engine"), Histogram.DEFAULT_BUCKETS),
}
"""Each metric's name without ``_total``, its type, labels and buckets."""


class Page:
    """The metrics and what happens to them."""

    def __init__(self, seed: int = 0) -> None:
        self.registry = CollectorRegistry()
        self.random = random.Random(seed)
        self.metrics: dict[str, Any] = {}
        for name, (kind, labels, buckets) in METRICS.items():
            options = {} if buckets is None else {"buckets": buckets}
            self.metrics[name] = kind(name, "As in the server.", labels, registry=self.registry, **options)

    def step(self) -> None:
        """A little traffic: a few requests, of which some go wrong in every way that there is."""
        for outcome, times in (("steered", 6), ("refused", 1), ("failed", 1), ("cancelled", 1)):
            self._count("requests", times, outcome)
        for reason in ("asset_not_found", "store_unavailable"):
            self._count("store_errors", 1, reason)
        self._set("plans_resident", self.random.randint(3, 9))
        self._set("monitor_lag_seconds", 40 + self.random.random())
        self._set("store_assets", 4, "vector")
        self._set("store_assets", 1, "profile")
        self._see("plan_build_seconds", self.random.lognormvariate(-4, 1))
        self._see("answer_entropy", self.random.gammavariate(2, 0.6))
        self._see("conflict", self.random.gauss(0.5, 2))
        for outcome, times in (("done", 4), ("failed", 1)):
            self._count("replays", times, outcome)
        for outcome, times in (("usual", 8), ("unusual", 2), ("unscored", 1)):
            self._count("detector_answers", times, "odd", outcome)
        for _ in range(10):
            self._see("detector_score", self.random.gauss(1, 2), "odd")
        for asset in ASSETS:
            self._asset(asset)
        for number, layer in enumerate(LAYERS):
            self._layer(number, layer)
        for policy in POLICIES:
            self._count("actions", 5, policy, "ok")
            self._count("actions", 1, policy, "failed")
            self._count("action_saturation", self.random.randint(0, 2), policy)
            self._see("action_seconds", self.random.lognormvariate(-2.5, 0.5), policy)
        self._vllm()

    def _asset(self, asset: str) -> None:
        self._count("edited_tokens", self.random.randint(5, 20), asset)
        self._count("gate_decisions", 4, asset)
        self._count("gate_open", self.random.randint(1, 3), asset)
        for action in ("warn", "cap", "refuse"):
            self._count("dosage_limited", 1, asset, action)
        for number, layer in enumerate(LAYERS):
            size = self.random.lognormvariate(-2 if asset == "french" else -0.5, 0.3) * (1 + number / 12)
            self._see("relative_edit_norm", size, asset, layer)

    def _layer(self, number: int, layer: str) -> None:
        for tokens in ("prompt", "generated"):
            for steered in ("yes", "no"):
                norm = 2 ** (number / 2) * self.random.lognormvariate(0, 0.3) * (1.2 if steered == "yes" else 1)
                self._see("activation_norm", norm, layer, tokens, steered)
        self._see("layer_cosine", 1 - self.random.random() * 0.6 / (1 + number), layer)
        self._count("norm_outliers", self.random.randint(0, 2), layer)
        for probe in PROBES:
            self._see("probe_value", self.random.gauss(3 if probe == "sentiment" else -1, 1.5), probe, layer)
            self._see("probe_cosine", self.random.gauss(0.2 if probe == "sentiment" else -0.1, 0.1), probe, layer)

    def _vllm(self) -> None:
        engine = ("tiny", "0")
        for reason in ("stop", "length"):
            self.metrics["vllm:request_success"].labels(*engine, reason).inc(8)
        for name, times in (("prompt_tokens", 150), ("generation_tokens", 40)):
            self.metrics[f"vllm:{name}"].labels(*engine).inc(times)
        for name, value in (("num_requests_running", 7), ("num_requests_waiting", 2), ("kv_cache_usage_perc", 0.4)):
            self.metrics[f"vllm:{name}"].labels(*engine).set(value * (1 + 0.2 * self.random.random()))
        for name, middle in (
            ("e2e_request_latency", 0.0),
            ("time_to_first_token", -2.5),
            ("inter_token_latency", -4.0),
        ):
            self.metrics[f"vllm:{name}_seconds"].labels(*engine).observe(self.random.lognormvariate(middle, 0.5))

    def _one(self, name: str, labels: tuple[str, ...]) -> Any:
        metric = self.metrics[f"steersman_{name}"]
        return metric.labels(*labels) if labels else metric

    def _count(self, name: str, times: float, *labels: str) -> None:
        self._one(name, labels).inc(times)

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._one(name, labels).set(value)

    def _see(self, name: str, value: float, *labels: str) -> None:
        self._one(name, labels).observe(value)


def handler(registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    """Answers as vLLM does, with the text format whatever is asked for.

    prometheus_client's own server would talk OpenMetrics with Prometheus, where release 0.26 writes ``vllm_`` for
    ``vllm:``.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = generate_latest(registry)
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # Prometheus was ended while it asked
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: a line for every scrape helps nobody."""

    return Handler


@contextmanager
def exporting() -> Iterator[str]:
    """Serves the page at ``/metrics``, with traffic all the time; gives its ``host:port``."""
    page, end = Page(), threading.Event()

    def go_on() -> None:
        while not end.wait(STEP_SECONDS):
            page.step()

    page.step()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(page.registry)) as server:
        threads = [threading.Thread(target=go_on), threading.Thread(target=server.serve_forever)]
        for thread in threads:
            thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            end.set()
            server.shutdown()
            for thread in threads:
                thread.join()
