"""A live page's server without an engine: Steersman's routes, and a feed that the test fills."""

from __future__ import annotations

import asyncio
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from steersman.kernels.statistics import NORM_BOUNDS, PROBE_BOUNDS, RELATIVE_BOUNDS
from steersman.server.live.feed import Feed
from tests.e2e.server import free_port
from tests.server.fakes import client, frontend

LAYERS = 6


def feed(registry: CollectorRegistry | None = None, interval: float = 2.0, every: int | None = 4) -> Feed:
    return Feed({"model": "m", "layers": LAYERS, "every": every}, interval, registry or CollectorRegistry())


def counted(bounds: Sequence[float], n: int) -> list[int]:
    """``n`` values in the first bucket; a frame has no buckets."""
    return [n] + [0] * len(bounds)


def answer(**changes: Any) -> dict[str, Any]:
    """What a worker says of one pass. ``norms``: [layer, group, tokens, sum, largest]; ``edits``, ``probes``: [name,
    layer, tokens, sum]."""
    norms, edits, probes = (changes.pop(name, ()) for name in ("norms", "edits", "probes"))
    empty: dict[str, Any] = {
        name: [] for name in ("layer_cosine", "probe_cosine", "answer_entropy", "gates", "norm_outliers")
    }
    return {
        **empty,
        "worker": "w",
        "number": 1,
        "passes": 1,
        "errors": 0,
        "activation_norm": [[layer, group, counted(NORM_BOUNDS, n), *rest] for layer, group, n, *rest in norms],
        "relative_edit_norm": [[*key, counted(RELATIVE_BOUNDS, n), total] for *key, n, total in edits],
        "probe_value": [[*key, counted(PROBE_BOUNDS, n), total] for *key, n, total in probes],
        **changes,
    }


def application(folder: Path, live: Feed | None, key: str | None = None) -> FastAPI:
    app = client(frontend(folder)).app
    assert isinstance(app, FastAPI)
    app.state.steersman.live = live
    app.state.args = Namespace(api_key=[key] if key else None)
    return app


@dataclass
class Running:
    """An application's address, its server as vLLM keeps it, and the thread and loop that run it."""

    url: str
    server: uvicorn.Server
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop

    def push(self, live: Feed, *answers: dict[str, Any]) -> None:
        """Makes a frame of what workers say, in the feed's loop."""

        def publish() -> None:
            for told in answers:
                live.take(told)
            live.publish()

        self.loop.call_soon_threadsafe(publish)


@contextmanager
def served(app: FastAPI) -> Iterator[Running]:
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    app.state.server = server
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve()), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(f"http://127.0.0.1:{server.config.port}", server, thread, loop)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"
        loop.close()


def until(met: Callable[[], object], seconds: float = 5.0) -> None:
    """Waits for ``met()``; fails when it takes longer."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)
