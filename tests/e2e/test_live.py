"""The live page's events from a real server: the numbers of ``/metrics``, and an end when the server stops."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, random_assets
from tests.e2e.test_monitoring import samples, value
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
KEY = {"Authorization": "Bearer sesame"}
OPTIONS = [*WIDE, "--steering-monitor-sample", "1", "--steering-monitor-interval", "0.2", "--api-key", "sesame"]
PROMPT = [1, 40, 51, 62, 73, 84]
NEW = 5
STEERING = {
    "interventions": [{"op": "add", "vector": "resid_post", "relative": "norm", "scale": 0.25, "layers": [1]}],
    "probes": [{"vector": "resid_post", "layers": [2]}],
}


class Viewer(threading.Thread):
    """Reads events until the stream ends."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.hello: dict[str, Any] = {}
        self.frames: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("GET", self.server.url + "/steering/live/events", headers=KEY, timeout=30) as response:
            name = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: ") and name == "hello":
                    self.hello = json.loads(line.removeprefix("data: "))
                elif line.startswith("data: ") and name == "frame":
                    self.frames.append(json.loads(line.removeprefix("data: ")))

    def connected(self) -> "Viewer":
        """Once every later frame is going to be seen."""
        deadline = time.monotonic() + 20
        while not self.hello:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    def sum(self, count: Any) -> int:
        return sum(count(frame) for frame in list(self.frames))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tiny_model("llama")
    with serve(path, tmp_path_factory.mktemp("live"), OPTIONS, env=DEVELOPER, forked=True) as running:
        running.http.headers.update(KEY)
        random_assets(Oracle(path, {}), running)
        yield running


def test_frames_are_what_metrics_count(server: Server) -> None:
    viewer = Viewer(server).connected()
    for steering in (None, STEERING, STEERING):
        server.complete(PROMPT, steering, max_tokens=NEW)
    fed = 3 * (len(PROMPT) + NEW - 1)
    deadline = time.monotonic() + 20
    while viewer.sum(lambda f: f["tokens"][0]) < fed or viewer.sum(lambda f: f["requests"][0]) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = samples(server)
    layers = viewer.hello["layers"]
    assert (viewer.hello["every"], viewer.hello["interval"], layers) == (1, 0.2, 4)
    assert viewer.sum(lambda f: f["tokens"][0]) == fed
    assert viewer.sum(lambda f: f["tokens"][1]) == 2 * fed // 3
    assert viewer.sum(lambda f: f["requests"][0]) == 3
    assert viewer.sum(lambda f: f["requests"][1]["steered"]) == value(found, "requests_total", outcome="steered") == 2
    assert {layer for f in viewer.frames for layer, *_ in f["norms"]} == set(range(layers))
    for layer in range(layers):
        largest = max(most for f in viewer.frames for at, _, most in f["norms"] if at == layer)
        mean = [value for f in viewer.frames for at, value, _ in f["norms"] if at == layer]
        assert 0 < max(mean) <= largest
    edits = [(layer, mean) for f in viewer.frames for layer, mean in f["edits"]]
    assert edits
    assert edits == [(1, pytest.approx(0.25, rel=1e-3))] * len(edits)
    read = viewer.sum(lambda f: sum(n for name, layer, _, n in f["probes"] if (name, layer) == ("resid_post", 2)))
    assert read == value(found, "probe_value_count", probe="resid_post", layer=2) == 2 * fed // 3
    outside = httpx.get(server.url + "/steering/live/events")
    assert outside.status_code == 401


def test_the_server_stops_with_a_page_open(server: Server) -> None:
    viewer = Viewer(server).connected()
    deadline = time.monotonic() + 20
    while not viewer.frames:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.process.send_signal(signal.SIGINT)
    viewer.join(15)
    assert not viewer.is_alive()
    server.process.wait(15)
