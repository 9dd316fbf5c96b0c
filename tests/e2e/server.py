"""A real ``steersman serve`` in a process of its own, for tests that talk HTTP to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.forked import Forked

START_SECONDS = 300


@dataclass
class Server:
    """A running server. ``http`` has its address; ``log`` is what it printed."""

    http: httpx.Client
    process: subprocess.Popen[bytes] | Forked
    log: Path
    store: Path
    model: str = "tiny"

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def complete(self, prompt: Any, steering: Any = None, **body: Any) -> dict[str, Any]:
        """One greedy completion that must succeed. ``prompt``: text or token ids."""
        asked = {"model": self.model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **body}
        if steering is not None:
            asked["steering"] = steering
        response = self.post("/v1/completions", asked)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def rpc_stats(self) -> str:
        return self.http.get("/metrics").text


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def serve(
    model: Path,
    tmp: Path,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    name: str = "tiny",
    command: Sequence[str] | None = None,
    forked: bool = False,
) -> Iterator[Server]:
    """Starts a server and ends it, with whatever it started.

    command: Python's arguments, for another server. forked: not as a user does, but soon (see ``forked.py``); the
    environment then matters only where nothing reads it while it imports.
    """
    port, log, store = free_port(), tmp / "server.log", tmp / "store"
    if command is None:
        command = ["-m", "steersman.server.cli", "serve", str(model), "--steering-store", str(store)]
    command = [*command, "--port", str(port), "--served-model-name", name, *options]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    variables = {**os.environ, **variables}
    process: subprocess.Popen[bytes] | Forked
    if not forked:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=variables, process_group=0
            )
    else:
        process = Forked.start(command[2:], variables, log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
            _wait(http, process, log)
            yield Server(http, process, log, store, name)
    finally:
        _end(process)


def _wait(http: httpx.Client, process: subprocess.Popen[bytes] | Forked, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if http.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}")


def _end(process: subprocess.Popen[bytes] | Forked) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with suppress(ProcessLookupError):  # its engine and workers are in its process group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)
