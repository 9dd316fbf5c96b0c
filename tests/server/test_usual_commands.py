"""``steersman baseline`` and ``steersman detector``, against a server that is a function."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import numpy as np
import pytest

from steersman.clients.sdk import Steersman
from steersman.kernels.moments import Moments
from steersman.server import cli
from steersman.server.commands import remote
from steersman.steering.formats import native

MODEL = {"model": "tiny", "n_layers": 2, "d_model": 8, "fingerprint": None}


class Server:
    """Every chat request shows it 100 tokens more; what is added is kept."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.logs = self.random.normal(9.0, 1.0, (2, 50))  # before anybody recorded
        self.lock = Lock()  # requests come from several threads
        self.asked: list[Any] = []
        self.added: dict[str, Any] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        if path == "/v1/steering/model":
            return httpx.Response(200, json=MODEL)
        if path == "/v1/steering/norms":
            return httpx.Response(200, json={"data": [{"worker": "w", **Moments.of(self.logs).to_json()}]})
        if path == "/v1/chat/completions":
            self.asked.append(json.loads(request.content))
            with self.lock:
                self.logs = np.concatenate([self.logs, self.random.normal(1.0, 0.1, (2, 100))], 1)
            return httpx.Response(200, json={"choices": []})
        if request.method == "POST":
            asset = native.from_json(request.content)
            self.added[asset.name] = asset
            return httpx.Response(201, json={"name": asset.name, "version": asset.version})
        return httpx.Response(200, json=native.to_json(self.added[path.rsplit("/", 1)[-1]]))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    transport = httpx.MockTransport(made)
    monkeypatch.setattr(remote, "client", lambda args: Steersman(args.server, transport=transport))
    return made


def run(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main([*map(str, args)]) == 0
    return capsys.readouterr().out


def test_recording_a_baseline(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(10)))
    out = run(capsys, "baseline", "record", "--name", "usual", "--prompts", prompts, "--max-tokens", 3)
    asset = server.added["usual"]
    assert out == f"{asset.ref}\n"
    assert asset.meta.counts == (1000, 1000)
    assert asset.meta.mean == pytest.approx(server.logs[:, 50:].mean(1).tolist(), rel=1e-9)
    assert asset.meta.deviation == pytest.approx(server.logs[:, 50:].std(1).tolist(), rel=1e-6)
    assert sorted(a["messages"][0]["content"] for a in server.asked) == sorted(f"prompt {i}" for i in range(10))
    assert {(a["model"], a["max_tokens"]) for a in server.asked} == {("served", 3)}


def test_too_little_traffic_is_no_baseline(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["baseline", "record", "--name", "usual", "--seconds", "0"]) == 1
    assert "layer 0 was seen in 0 tokens, wanted: at least 1000" in capsys.readouterr().err
    assert not server.added


@pytest.fixture
def good(tmp_path: Path) -> Callable[[int], Path]:
    def write(n: int) -> Path:
        random, file = np.random.default_rng(1), tmp_path / "good.jsonl"
        signals = [{"answer_entropy": {"mean": float(x)}} for x in random.normal(2.0, 0.5, n)]
        file.write_text("".join(json.dumps({"signals": s}) + "\n" for s in signals))
        return file

    return write


def test_fitting_and_scoring(
    server: Server, good: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    options = ["--features", "answer_entropy.mean", "--components", 1]
    out = run(capsys, "detector", "fit", good(100), "--name", "odd", *options)
    assert out == f"{server.added['odd'].ref}\n"
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"signals": {"answer_entropy": {"mean": x}}}) + "\n" for x in (2.0, 9.0)))
    usual, unusual = map(json.loads, run(capsys, "detector", "score", "odd", new).splitlines())
    assert usual["unusual"] is False
    assert unusual["unusual"] is True
    assert unusual["score"] > server.added["odd"].meta.threshold > usual["score"]


def test_what_is_no_feature_is_said_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["detector", "collect", "--prompts", "x", "--features", "answer_entropy.median"])
    assert "'answer_entropy.median' is no feature" in capsys.readouterr().err
