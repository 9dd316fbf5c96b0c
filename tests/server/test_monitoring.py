"""Workers' statistics on their way into Prometheus: each counted once, whatever the workers and the calls do."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from steersman.kernels.statistics import (
    COSINE_BOUNDS,
    ENTROPY_BOUNDS,
    NORM_BOUNDS,
    PROBE_BOUNDS,
    PROBE_COSINE_BOUNDS,
    RELATIVE_BOUNDS,
)
from steersman.server import monitoring as module
from steersman.server.engine.monitor import OTHER, Monitor
from steersman.server.engine.owners import Scheduled
from steersman.server.live.feed import Feed
from steersman.server.monitoring import MAX_NAMES, LayerMetrics, Monitoring
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import AssetKindMismatch, ModelMismatch
from steersman.steering.plan import Plan
from steersman.steering.sites import Site
from tests.server.fakes import frontend
from tests.steering.library import REF, WIDTHS, D, asset, noise, vector

USUAL = asset("usual", "baseline", counts=[1000] * 4, mean=[0.5, 1.0, 1.5, 2.0], deviation=[0.1] * 4)


def counts(bounds: tuple[float, ...], **at: int) -> list[int]:
    """By bucket: ``b2=5`` are five in the third."""
    out = [0] * (len(bounds) + 1)
    for name, n in at.items():
        out[int(name[1:])] = n
    return out


def answer(worker: str = "w", number: int = 1, **changes: Any) -> dict[str, Any]:
    names = (
        "activation_norm layer_cosine answer_entropy relative_edit_norm probe_value probe_cosine gates norm_outliers"
    )
    empty: dict[str, Any] = {name: [] for name in names.split()}
    return {"worker": worker, "number": number, **empty, "passes": 1, "errors": 0, **changes}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> LayerMetrics:
    return LayerMetrics(registry)


def monitoring(
    tmp_path: Path, metrics: LayerMetrics, rpc: Any, interval: float = 0.1, busy: Callable[[], bool] = lambda: True
) -> Monitoring:
    made = frontend(tmp_path)
    made._rpc = rpc
    return Monitoring(made, metrics, interval, busy=busy)


def test_what_a_worker_says_is_what_is_shown(registry: CollectorRegistry, metrics: LayerMetrics) -> None:
    told = answer(
        activation_norm=[[3, 0, counts(NORM_BOUNDS, b4=2), 1.5, 0.8], [3, 3, counts(NORM_BOUNDS, b5=1), 1.75, 1.75]],
        layer_cosine=[[3, counts(COSINE_BOUNDS, b6=3), 2.7]],
        answer_entropy=[[counts(ENTROPY_BOUNDS, b7=4), 5.0]],
        relative_edit_norm=[["calm", 2, counts(RELATIVE_BOUNDS, b6=2), 0.15]],
        probe_cosine=[["v", 2, counts(PROBE_COSINE_BOUNDS, b13=3), 0.5]],
        probe_value=[["dictionary#7", 2, counts(PROBE_BOUNDS, b0=1, b23=1), -20.0]],
        gates=[["calm", 7, 3]],
        norm_outliers=[[3, 2]],
        errors=1,
    )
    metrics.take(told)
    metrics.take({**told, "number": 2})
    text = generate_latest(registry).decode()
    for line in (
        'activation_norm_bucket{layer="3",le="1.0",steered="no",tokens="prompt"} 4.0',
        'activation_norm_bucket{layer="3",le="0.5",steered="no",tokens="prompt"} 0.0',
        'activation_norm_sum{layer="3",steered="yes",tokens="generated"} 3.5',
        'activation_norm_max{layer="3"} 1.75',
        'layer_cosine_bucket{layer="3",le="0.95"} 6.0',
        'layer_cosine_sum{layer="3"} 5.4',
        "answer_entropy_sum 10.0",
        "answer_entropy_count 8.0",
        'relative_edit_norm_bucket{asset="calm",layer="2",le="0.1"} 4.0',
        'relative_edit_norm_count{asset="calm",layer="2"} 4.0',
        'probe_value_bucket{layer="2",le="-1000.0",probe="dictionary#7"} 2.0',
        'probe_value_bucket{layer="2",le="+Inf",probe="dictionary#7"} 4.0',
        'probe_cosine_bucket{layer="2",le="0.1",probe="v"} 0.0',
        'probe_cosine_bucket{layer="2",le="0.2",probe="v"} 6.0',
        'gate_decisions_total{asset="calm"} 14.0',
        'gate_open_total{asset="calm"} 6.0',
        'norm_outliers_total{layer="3"} 4.0',
        "monitor_passes_total 2.0",
        "monitor_errors_total 2.0",
    ):
        assert f"steersman_{line}\n" in text, line


def test_outliers_of_every_layer_begin_at_zero() -> None:
    registry = CollectorRegistry()
    LayerMetrics(registry, layers=3)
    found = [registry.get_sample_value("steersman_norm_outliers_total", {"layer": str(i)}) for i in range(4)]
    assert found == [0.0, 0.0, 0.0, None]


def test_a_workers_own_words_are_understood(registry: CollectorRegistry, metrics: LayerMetrics) -> None:
    worker = Monitor(2, 1)
    worker.enter("r", 1)
    worker.begin([Scheduled("r", 0, 0, 3)], {})
    worker.end([])
    metrics.take(worker.drain("http", {}))
    assert registry.get_sample_value("steersman_monitor_passes_total") == 1


def test_names_are_capped_in_each_metric(registry: CollectorRegistry, metrics: LayerMetrics) -> None:
    names = [f"a{i}" for i in range(MAX_NAMES + 30)]
    told = answer(
        relative_edit_norm=[[n, layer, counts(RELATIVE_BOUNDS, b1=1), 0.1] for n in names for layer in (1, 2)],
        probe_value=[
            *([n, 1, counts(PROBE_BOUNDS, b1=1), 0.1] for n in reversed(names)),
            [OTHER, -1, counts(PROBE_BOUNDS, b0=5), 0.0],
        ],
        gates=[[n, 2, 1] for n in names],
    )  # fmt: skip
    for number in (1, 2):
        metrics.take({**told, "number": number})
    for metric, label, series in (
        ("relative_edit_norm_count", "asset", 2 * MAX_NAMES + 1),
        ("probe_value_count", "probe", MAX_NAMES + 1),
        ("gate_open_total", "asset", MAX_NAMES + 1),
    ):
        found = [s for f in registry.collect() for s in f.samples if s.name == f"steersman_{metric}"]
        assert len(found) == series, metric
        assert len({s.labels[label] for s in found}) == MAX_NAMES + 1
    value = registry.get_sample_value
    assert value("steersman_relative_edit_norm_count", {"asset": OTHER, "layer": "all"}) == 2 * 30 * 2
    assert value("steersman_probe_value_count", {"probe": OTHER, "layer": "all"}) == 2 * (30 + 5)
    assert value("steersman_gate_decisions_total", {"asset": OTHER}) == 2 * 30 * 2


def test_each_answer_counts_once(tmp_path: Path, registry: CollectorRegistry, metrics: LayerMetrics) -> None:
    """Two engines, one with a rank that does not count; one answer comes twice; a worker is replaced."""
    asked: list[dict[str, int]] = []
    script = [
        [answer("a", 1), None, answer("b", 1)],
        [answer("a", 1), None, answer("b", 2)],
        [answer("a", 2), None, answer("new", 1)],
    ]

    async def rpc(method: str, holder: str, received: dict[str, int]) -> list[Any]:
        assert method == "steersman_statistics"
        asked.append(received)
        return script[len(asked) - 1]

    async def run() -> None:
        made = monitoring(tmp_path, metrics, rpc)
        for _ in script:
            await made.read()

    asyncio.run(run())
    assert registry.get_sample_value("steersman_monitor_passes_total") == 5
    assert asked == [{}, {"a": 1, "b": 1}, {"a": 1, "b": 2}]


def test_what_is_watched_follows_the_store_and_the_workers(
    tmp_path: Path, metrics: LayerMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[list[int]] = []
    workers = ["a"]

    async def rpc(method: str, *args: Any) -> list[Any]:
        if method == "steersman_watch":
            sent.append([read.place.layer for read in Plan.from_bytes(args[0]).probes])
            return [None]
        return [answer(w, number=len(sent) + 10) for w in workers]

    async def run() -> None:
        made = monitoring(tmp_path, metrics, rpc)
        made.frontend.settings = replace(made.frontend.settings, monitor_probes="later, ")
        for _ in range(2):
            await made.read()
        assert sent == []
        made.frontend.store.add(vector("later", noise(2, D), [1, 2]))
        for _ in range(3):
            await made.read()
        assert sent == [[1, 2]]
        made.frontend.store.add(vector("later", noise(1, D), [3]))
        workers.append("b")
        for _ in range(4):
            await made.read()
        assert sent == [[1, 2], [3], [3]]  # again for the one that was not there before
        made.frontend.settings = replace(made.frontend.settings, monitor_probes="wide")
        made.frontend.store.add(vector("wide", noise(1, WIDTHS[Site.MLP_POST]), [1], site="mlp_post"))
        await made.read()
        assert len(sent) == 3

    asyncio.run(run())
    said = [r.message for r in caplog.records if "--steering-monitor-probes" in r.message]
    assert len(said) == 2
    assert "no asset" in said[0]
    assert "of mlp_post" in said[1]


def test_workers_know_the_baseline_before_they_are_read(tmp_path: Path, metrics: LayerMetrics) -> None:
    """And those that come later, too."""
    told: list[str] = []
    workers = ["a"]

    async def rpc(method: str, *args: Any) -> list[Any]:
        told.append(method)
        if method == "steersman_baseline":
            assert args == ([0.5, 1.0, 1.5, 2.0], [0.1] * 4)
            return [None]
        return [answer(w, number=len(told)) for w in workers]

    async def run() -> None:
        made = monitoring(tmp_path, metrics, rpc)
        made.frontend.store.add(USUAL)
        made.baseline = made.frontend.resolver.library.baseline("usual")
        await made.tell_baseline()
        for _ in range(3):
            await made.read()
        workers.append("b")
        for _ in range(3):
            await made.read()

    asyncio.run(run())
    baseline, statistics = "steersman_baseline", "steersman_statistics"
    assert told == [
        baseline, statistics,  # whose answers come from a worker that may have started since
        baseline, statistics, statistics,
        statistics, baseline, statistics, statistics,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 5}, "this server runs"),
        ({"id": "org/Other"}, "was made for org/Other"),
    ],
)
def test_a_baseline_of_another_model_is_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = frontend(tmp_path)
    n = changes.get("n_layers", 4)
    numbers = {"counts": [1000] * n, "mean": [1.0] * n, "deviation": [1.0] * n}
    made.store.add(Asset(parse_metadata({"name": "odd", "kind": "baseline", "model": {**REF, **changes}, **numbers})))
    with pytest.raises(ModelMismatch, match=message):
        made.resolver.library.baseline("odd")
    made.store.add(vector("direction", noise(1, D), [1]))
    with pytest.raises(AssetKindMismatch, match="wanted: baseline"):
        made.resolver.library.baseline("direction")


def test_workers_of_an_idle_server_are_left_alone(tmp_path: Path, metrics: LayerMetrics) -> None:
    in_flight = 0

    async def rpc(*_: Any) -> list[Any]:
        raise AssertionError

    made = monitoring(tmp_path, metrics, rpc, busy=lambda: in_flight > 0)

    def due(looks: int = 4) -> list[bool]:
        return [made.due() for _ in range(looks)]

    assert due() == [True, True, False, False]  # what was there before this process
    made.frontend.begun += 1  # a request that ends before the next look
    assert due() == [True, True, False, False]
    made.frontend.begun += 1
    in_flight = 1
    assert due() == [True] * 4
    in_flight = 0
    assert due() == [True, False, False, False]  # what the last steps counted
    made._failing = True
    assert due(2) == [True] * 2


def test_an_idle_server_is_not_late_and_its_page_goes_on(
    tmp_path: Path, registry: CollectorRegistry, metrics: LayerMetrics
) -> None:
    calls: list[float] = []

    async def rpc(*_: Any) -> list[Any]:
        calls.append(time.monotonic())
        return []

    async def run() -> int:
        made = monitoring(tmp_path, metrics, rpc, 0.05, busy=lambda: False)
        made.live = Feed({"layers": 2}, 0.05, registry)
        task = asyncio.create_task(made.watch())
        await asyncio.sleep(1)
        task.cancel()
        return len(made.live._frames)

    frames = asyncio.run(run())
    assert len(calls) == 2
    assert frames > 5
    assert (registry.get_sample_value("steersman_monitor_lag_seconds") or 0) < 0.2


def test_a_worker_that_hangs_is_seen_as_lag_and_holds_nothing_up(
    tmp_path: Path, registry: CollectorRegistry, metrics: LayerMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK", 0.05)
    calls: list[float] = []

    async def run() -> None:
        free = asyncio.Event()
        free.set()

        async def rpc(*_: Any) -> list[Any]:
            calls.append(time.monotonic())
            await free.wait()
            return [answer(number=len(calls))]

        def lag() -> float:
            started = time.monotonic()
            generate_latest(registry)
            assert time.monotonic() - started < 0.2
            value = registry.get_sample_value("steersman_monitor_lag_seconds")
            assert value is not None
            return value

        task = asyncio.create_task(monitoring(tmp_path, metrics, rpc).watch())
        await asyncio.sleep(0.35)
        assert lag() < 0.25
        free.clear()
        await asyncio.sleep(0.2)
        before = len(calls)
        await asyncio.sleep(0.5)
        assert len(calls) == before  # one call at a time
        assert lag() > 0.45
        free.set()
        await asyncio.sleep(0.35)
        assert lag() < 0.25
        task.cancel()

    asyncio.run(run())
    assert registry.get_sample_value("steersman_monitor_passes_total") in (len(calls), len(calls) - 1)


def test_a_worker_that_dies_is_said_once_and_asked_again(
    tmp_path: Path,
    registry: CollectorRegistry,
    metrics: LayerMetrics,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "TICK", 0.02)
    calls = 0

    async def rpc(*_: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 4:
            return [answer()]
        raise asyncio.CancelledError if calls == 2 else RuntimeError("the engine is dead")

    async def run() -> None:
        task = asyncio.create_task(monitoring(tmp_path, metrics, rpc, 0.1).watch())
        await asyncio.sleep(0.25)
        assert not task.done()
        assert (registry.get_sample_value("steersman_monitor_lag_seconds") or 0) > 0.15
        while calls < 6:
            await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert registry.get_sample_value("steersman_monitor_passes_total") == 1
    said = [r for r in caplog.records if "statistics could not be read" in r.message]
    assert len(said) == 2  # before and after the one that worked
