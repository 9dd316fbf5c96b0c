"""Signals and the detector's score in the answers of steered requests."""

import math
from pathlib import Path
from typing import Any

import pytest

from steersman.steering.signals import summary
from tests.server.fakes import reporting
from tests.server.routes.stand_in import ADD, DONE, FINAL, Server
from tests.server.test_detection import detector


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def told(server: Server, steering: Any) -> Any:
    answer = server.post(steering)
    assert answer.status_code == 200, answer.text
    return answer.json()["steering"]


def test_signals_go_to_the_engine_and_come_back(server: Server) -> None:
    seen = []
    reporting(server.workers, server.frontend, signals={"norm:3": {**summary([2.0, math.inf]), "values": [2.0, None]}})
    stood_in = server.answer

    def answer(request: Any) -> Any:
        ticket = server.ticket(request)
        assert ticket is not None
        seen.append(ticket.signals)
        return stood_in(request)

    server.answer = answer
    found = told(server, {**ADD, "signals": ["norm:3", "answer_entropy"]})
    assert seen == [{"norm:3": 3, "answer_entropy": None}]
    signals = {"tokens": 2, "first": 2.0, "last": None, "mean": None, "max": None, "values": [2.0, None]}
    assert found["signals"] == [{"choice": 0, "signals": {"norm:3": signals}}]
    assert [w.split(":")[0] for w in found["warnings"]] == ["signal answer_entropy is not known of every token"]
    assert "detector" not in found


def test_every_steered_answer_is_scored(server: Server) -> None:
    server.frontend.use_detector(server.frontend.store.add(detector("answer_entropy.mean")))
    least = 0.5 * math.log(2 * math.pi)
    for mean, value, unusual in ((1.0, least, False), (9.0, least + 8, True)):
        reporting(server.workers, server.frontend, signals={"answer_entropy": summary([mean])})
        for steering in (ADD, {}):
            score = told(server, steering)["detector"]["answers"]
            assert score == [{"choice": 0, "score": pytest.approx(value), "unusual": unusual}]
    reporting(server.workers, server.frontend)
    assert told(server, {})["detector"]["answers"][0]["missing"] == ["answer_entropy.mean"]
    assert "detector" not in told(server, {"report": "none"})
    assert "steering" not in server.post(None).json()
    server.streams(FINAL, DONE)
    assert b'"detector"' in server.post({}, stream=True).content
