"""A server in trouble: a tiny policy under every kind of request that the dashboards and alerts speak of.

Text, steered and not, with probes and gates; edits beyond the limit; requests that are refused, that fail on a damaged
asset and whose client goes away; actions, some of them beyond what the robot may do.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.clients.robot import HttpRobot
from tests.e2e.server import Server, serve
from tests.e2e.steered import upload
from tests.models.tiny_llava import SIZE, build_llava, without_torchvision

LIMIT = 0.5  # of the relative norm
WATCHED = "mood"
DAMAGED = "torn"
VECTORS = ("calm", "bold", "even", "sometimes", "always", "never", WATCHED, "truth", DAMAGED)
THRESHOLDS = {WATCHED: 2.0}
"""By probe, of a Prometheus: one that many of its readings exceed."""
OPTIONS = [
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--steering-monitor-sample", "1",
    "--steering-monitor-interval", "0.5", "--steering-max-relative-norm", str(LIMIT),
    "--steering-monitor-probes", WATCHED, "--steering-max-action-delta", "0.05",
]  # fmt: skip
PERIOD = 90.0  # seconds in which the traffic swells and ebbs
GATES = {
    "sometimes": {"vector": "truth", "layer": 1, "measure": "projection", "above": 0.0},
    "always": {"vector": "truth", "layer": 1, "measure": "projection", "above": -1e6, "over": "last_prompt"},
    "never": {"vector": "truth", "layer": 1, "measure": "projection", "above": 1e6, "over": "prompt_mean"},
}


@contextmanager
def serving(tmp: Path) -> Iterator[Server]:
    """The policy behind the real server, with vectors in its store, one of them damaged; no request has come yet."""
    with serve(build_llava(tmp / "llava"), tmp, OPTIONS, without_torchvision(tmp / "site")) as server:
        model = server.http.get("/v1/steering/model").json()
        about = {"id": model["model"], "n_layers": model["n_layers"], "d_model": model["d_model"]}
        layers = list(range(model["n_layers"]))
        generator = torch.Generator().manual_seed(3)
        for name in VECTORS:
            metadata = {"kind": "vector", "name": name, "site": "resid_post", "layers": layers, "model": about}
            upload(server, metadata, {"vectors": torch.randn(len(layers), model["d_model"], generator=generator)})
        (damaged,) = (server.store / DAMAGED).glob("*/tensors.safetensors")
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        yield server


@contextmanager
def traffic(server: Server) -> Iterator[None]:
    """Requests all the time. Raises afterwards what went otherwise than it should."""
    end = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(_go_on, server, end)
        try:
            yield
        finally:
            end.set()
        going.result()


def _go_on(server: Server, end: threading.Event) -> None:
    chance, started = random.Random(1), time.monotonic()
    with HttpRobot(server.url, timeout=60) as robot:
        while not end.is_set():
            tide = 0.5 - 0.5 * math.cos(2 * math.pi * (time.monotonic() - started) / PERIOD)
            _round(server, chance, tide)
            _act(robot, chance)
            end.wait(0.6 * (1 - tide))


def _round(server: Server, chance: random.Random, tide: float) -> None:
    """One of every kind of request. ``tide``: 0 to 1, how long they are and how strongly they are steered."""

    def prompt() -> list[int]:
        return [1, *(chance.randrange(8, 500) for _ in range(chance.randint(4, 30)))]

    calm = {"op": "add", "vector": "calm", "relative": "norm", "scale": (1 + round(6 * tide)) / 20, "layers": [1, 2]}
    bold = {"op": "add", "vector": "bold", "relative": "norm", "scale": 0.9, "layers": [2], "tokens": "generated"}
    gated = [{"op": "add", "vector": v, "scale": 0.1, "layers": [2], "when": gate} for v, gate in GATES.items()]
    served: list[Any] = [
        None,
        {"interventions": [calm, {"op": "ablate", "vector": "even"}], "probes": [{"vector": "truth"}]},
        {"interventions": [bold]},
        {"interventions": gated},
    ]
    for steering in served:
        server.complete(prompt(), steering, max_tokens=chance.randint(4, 8 + round(20 * tide)))
    asked = {"model": server.model, "prompt": prompt(), "max_tokens": 200, "ignore_eos": True}
    for name, status in (("nobody", 404), (DAMAGED, 500)):
        response = server.post("/v1/completions", {**asked, "steering": {"interventions": [{**calm, "vector": name}]}})
        assert response.status_code == status, response.text
    stream = {**asked, "stream": True, "steering": {"interventions": [calm]}}
    with server.http.stream("POST", "/v1/completions", json=stream) as response:
        assert next(response.iter_lines()).startswith("data: ")  # and the client goes away


def _act(robot: HttpRobot, chance: random.Random) -> None:
    picture = np.random.default_rng(chance.randrange(1 << 30)).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    steering = {"interventions": [{"op": "add", "vector": "calm", "relative": "norm", "scale": 0.2, "layers": [1]}]}
    for asked in (None, steering):
        robot.act({"front": picture}, "pick up the red block", steering=asked)
