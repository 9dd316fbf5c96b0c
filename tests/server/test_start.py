"""What a server's start does with the baseline and the detector that its options name."""

import asyncio
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from steersman.server import endpoints
from steersman.server.endpoints import SteeringEndpoints
from steersman.server.engine.frontend import Frontend
from steersman.server.metrics import Metrics
from steersman.server.monitoring import LayerMetrics
from tests.server.fakes import frontend
from tests.server.test_detection import detector
from tests.steering.library import REF, asset

NUMBERS: dict[str, Any] = {"counts": [1000] * 4, "mean": [0.5, 1.0, 1.5, 2.0], "deviation": [0.1] * 4}


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Frontend, list[tuple[Any, ...]]]:
    """The server's frontend, and what its workers were told before any request could come."""
    calls: list[tuple[Any, ...]] = []

    async def rpc(method: str, *args: Any) -> list[Any]:
        calls.append((method, *args))
        return [None]

    made = frontend(folder, **settings)
    made._rpc = rpc
    made.store.add(asset("usual", "baseline", **NUMBERS))
    made.store.add(asset("elsewhere", "baseline", model={**REF, "id": "org/Other"}, **NUMBERS))
    made.store.add(detector("norm:1.mean"))
    monkeypatch.setattr(Frontend, "_instance", made)
    registry = CollectorRegistry()
    monkeypatch.setattr(endpoints, "Metrics", partial(Metrics, registry))
    monkeypatch.setattr(endpoints, "LayerMetrics", partial(LayerMetrics, registry))
    monkeypatch.setattr(endpoints, "Robots", lambda *_: None)  # whose metrics have no registry but the process's own
    model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=dict))
    unfinished = SimpleNamespace(has_unfinished_requests=lambda: False)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model), output_processor=unfinished)
    asyncio.run(SteeringEndpoints().init_state(engine, SimpleNamespace(), Namespace()))
    return made, calls


def test_workers_and_frontend_know_them_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = start(tmp_path, monkeypatch, norm_baseline="usual", detector="odd")
    assert calls[0] == ("steersman_baseline", NUMBERS["mean"], NUMBERS["deviation"])
    assert made.detector is not None
    assert made.detector.ref == made.store.info("odd").ref


def test_without_options_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = start(tmp_path, monkeypatch)
    assert made.detector is None
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_baseline": "nobody"}, "--steering-norm-baseline: no asset 'nobody'"),
        ({"norm_baseline": "elsewhere"}, "--steering-norm-baseline: elsewhere.* was made for org/Other"),
        ({"norm_baseline": "odd"}, "--steering-norm-baseline: odd.* is of kind detector; wanted: baseline"),
        ({"detector": "usual"}, "--steering-detector: usual.* is of kind baseline; wanted: detector"),
    ],
)
def test_what_does_not_fit_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path, monkeypatch, **settings)
