"""A server in trouble: a tiny policy under every kind of request that the dashboards and alerts speak of.

Text, steered and not, with probes and gates; questions about pictures; edits beyond the limit; requests that are
refused, that fail on a damaged asset and whose client goes away; actions, some of them beyond what the robot may do.
"""

from __future__ import annotations

import base64
import io
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
from PIL import Image

from steersman.clients.robot import HttpRobot
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.store import Store
from tests.e2e.server import Server, serve
from tests.e2e.steered import upload
from tests.models.tiny_llava import IMAGE, PATCHES, SIZE, build_llava, without_torchvision

LIMIT = 0.5  # of the relative norm
WATCHED = "mood"
DAMAGED = "torn"
VECTORS = ("calm", "bold", "even", "sometimes", "always", "never", WATCHED, "truth", DAMAGED)
THRESHOLDS = {WATCHED: 2.0}
"""By probe, of a Prometheus: one that many of its readings exceed."""
DETECTOR, BASELINE = "odd", "usual"
OPTIONS = [
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--steering-monitor-sample", "1",
    "--steering-monitor-interval", "0.5", "--steering-max-relative-norm", str(LIMIT),
    "--steering-monitor-probes", WATCHED, "--steering-max-action-delta", "0.05",
    "--steering-norm-baseline", BASELINE, "--steering-detector", DETECTOR,
]  # fmt: skip
BOLD = {"op": "add", "vector": "bold", "relative": "norm", "scale": 0.9, "layers": [2], "tokens": "generated"}
PERIOD = 90.0  # seconds in which the traffic swells and ebbs
GATES = {
    "sometimes": {"vector": "truth", "layer": 1, "measure": "projection", "above": 0.0},
    "always": {"vector": "truth", "layer": 1, "measure": "projection", "above": -1e6, "over": "last_prompt"},
    "never": {"vector": "truth", "layer": 1, "measure": "projection", "above": 1e6, "over": "prompt_mean"},
}


@contextmanager
def serving(tmp: Path) -> Iterator[Server]:
    """The policy behind the real server, with vectors in its store, one of them damaged; no request has come yet."""
    folder = build_llava(tmp / "llava")
    for asset in what_is_usual(folder):
        Store(tmp / "store").add(asset)
    with serve(folder, tmp, OPTIONS, without_torchvision(tmp / "site")) as server:
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


@torch.no_grad()
def what_is_usual(folder: Path) -> list[Asset]:
    """A baseline and a detector, by Hugging Face's model. Unusual is a mean norm at layer 2 as ``bold`` makes it."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    layers, chance = model.model.language_model.layers, random.Random(2)
    logs: list[list[torch.Tensor]] = [[] for _ in layers]
    for layer, own in zip(layers, logs, strict=True):
        layer.register_forward_hook(lambda _, __, out, own=own: own.append(_stream(out).norm(dim=-1).log().flatten()))
    for seed in range(20):
        pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        ids = [1, *[IMAGE] * PATCHES, *(chance.randrange(8, 500) for _ in range(60))]
        model(input_ids=torch.tensor([ids]), pixel_values=pixels)
    seen = [torch.cat(own) for own in logs]
    about = {"id": folder.name, "n_layers": len(layers), "d_model": model.config.text_config.hidden_size}
    baseline = {
        "counts": [len(x) for x in seen],
        "mean": [float(x.mean()) for x in seen],
        "deviation": [float(x.std()) for x in seen],
    }
    norms = seen[2].exp()
    detector = {
        "features": ["norm:2.mean", "answer_entropy.mean", "evidence_entropy.mean"],
        "center": [float(norms.mean()), 3.0, 0.3],
        "spread": [float(norms.std()) / 2, 100.0, 100.0],
        "weights": [1.0],
        "means": [[0.0] * 3],
        "covariance": "diag",
        "covariances": [[1.0] * 3],
        "threshold": 1.5 * math.log(2 * math.pi) + 2.5**2 / 2,  # 2.5 deviations
    }
    made = ((BASELINE, "baseline", baseline), (DETECTOR, "detector", detector))
    return [Asset(parse_metadata({"name": n, "kind": kind, "model": about, **fields})) for n, kind, fields in made]


def _stream(out: Any) -> torch.Tensor:
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


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
            _look(server, chance)
            _act(robot, chance)
            end.wait(0.6 * (1 - tide))


def _round(server: Server, chance: random.Random, tide: float) -> None:
    """One of every kind of request. ``tide``: 0 to 1, how long they are and how strongly they are steered."""

    def prompt() -> list[int]:
        return [1, *(chance.randrange(8, 500) for _ in range(chance.randint(4, 30)))]

    calm = {"op": "add", "vector": "calm", "relative": "norm", "scale": (1 + round(6 * tide)) / 20, "layers": [1, 2]}
    gated = [{"op": "add", "vector": v, "scale": 0.1, "layers": [2], "when": gate} for v, gate in GATES.items()]
    served: list[Any] = [
        None,
        {"interventions": [calm, {"op": "ablate", "vector": "even"}], "probes": [{"vector": "truth"}]},
        {"interventions": [BOLD]},
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


def _look(server: Server, chance: random.Random) -> None:
    """Asks about a picture, and how much the answer is the picture's."""
    png = io.BytesIO()
    Image.fromarray(_scene(chance)).save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is in the picture"}]
    asked = {"model": server.model, "messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    steering = {"interventions": [BOLD], "signals": ["conflict"]}
    response = server.post("/v1/chat/completions", {**asked, "steering": steering})
    assert response.status_code == 200, response.text


def _scene(chance: random.Random) -> Any:
    return np.random.default_rng(chance.randrange(1 << 30)).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def _act(robot: HttpRobot, chance: random.Random) -> None:
    picture = _scene(chance)
    steering = {"interventions": [{"op": "add", "vector": "calm", "relative": "norm", "scale": 0.2, "layers": [1]}]}
    for asked in (None, steering):
        robot.act({"front": picture}, "pick up the red block", steering=asked)
