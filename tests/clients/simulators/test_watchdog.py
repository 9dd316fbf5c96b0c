"""Answers that come in time, those that do not, and what becomes of the connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from steersman.clients import arrays
from steersman.clients.robot import Actions, HttpRobot
from steersman.clients.sdk import SteersmanError
from steersman.clients.simulators import watchdog
from steersman.clients.simulators.simulator import Seen
from steersman.clients.simulators.watchdog import HttpLink, NoAnswer, Watchdog
from tests.clients.simulators.point import Guide

SEEN = Seen({"side": np.zeros((2, 2, 3), np.uint8)}, np.array([0.1, 0.2, 0.3, 1.0]))


@pytest.fixture
def late() -> Iterator[threading.Event]:
    """Holds answers back; set in the end, so that no thread is left waiting."""
    event = threading.Event()
    yield event
    event.set()


def test_one_connection_serves_all_answers_and_is_closed() -> None:
    made: list[Guide] = []

    def connect() -> Guide:
        made.append(Guide())
        return made[-1]

    dog = Watchdog(connect, 30)
    for _ in range(3):
        answer = dog.ask(SEEN, "go")
        assert answer is not None
        assert answer.seconds >= 0
        assert answer.actions.actions.shape == (4, 4)
    (link,) = made
    assert len(link.asked) == 3
    assert not link.closed.is_set()
    dog.close()
    assert link.closed.is_set()


def test_a_late_answer_is_none_and_never_the_next_ones(late: threading.Event) -> None:
    slow, quick = Guide({"up": 5.0}, late), Guide()
    links = [slow, quick]
    dog = Watchdog(lambda: links.pop(0), 0.2)
    started = time.monotonic()
    assert dog.ask(SEEN, "go") is None
    assert 0.2 <= time.monotonic() - started < 5
    answer = dog.ask(SEEN, "go")
    assert answer is not None
    assert "steering" not in answer.actions.about, "this is the first one's answer"
    late.set()
    assert slow.closed.wait(10), "what is dropped is closed once it answers"
    assert not quick.closed.is_set()


def test_connecting_counts_towards_the_deadline(late: threading.Event) -> None:
    def connect() -> Guide:
        late.wait(30)
        return Guide()

    assert Watchdog(connect, 0.1).ask(SEEN, "go") is None


@pytest.mark.parametrize("error", [TimeoutError("socket"), httpx.ReadTimeout("http")])
def test_the_clients_own_deadlines_count_as_missed(error: Exception) -> None:
    class Impatient(Guide):
        def ask(self, seen: Seen, instruction: str) -> Actions:
            raise error

    link = Impatient()
    assert Watchdog(lambda: link, 30).ask(SEEN, "go") is None
    assert link.closed.is_set()


def test_patience_ends_only_after_misses_in_a_row() -> None:
    answers: list[bool] = [False, False, True, False, False, False]

    class Moody(Guide):
        def ask(self, seen: Seen, instruction: str) -> Actions:
            if not answers.pop(0):
                raise TimeoutError
            return super().ask(seen, instruction)

    dog = Watchdog(Moody, 30, patience=3)
    assert [dog.ask(SEEN, "go") is None for _ in range(5)] == [True, True, False, True, True]
    with pytest.raises(NoAnswer, match="3 times in a row no answer within 30 seconds"):
        dog.ask(SEEN, "go")


def test_what_the_server_refuses_is_raised_not_held() -> None:
    class Refusing(Guide):
        def ask(self, seen: Seen, instruction: str) -> Actions:
            raise SteersmanError(400, "no such neurons", "bad", "steering")

    link = Refusing()
    with pytest.raises(SteersmanError, match="no such neurons"):
        Watchdog(lambda: link, 30).ask(SEEN, "go")
    assert link.closed.is_set()


def test_an_http_link_sends_what_the_route_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, request.headers.get("authorization"), arrays.unpack(request.content)))
        return httpx.Response(200, json={"actions": [[1, 2, 3, 4]], "strays": 0})

    class Local(HttpRobot):
        def __init__(self, url: str, **kwargs: Any) -> None:
            super().__init__(url, transport=httpx.MockTransport(answer), **kwargs)

    monkeypatch.setattr(watchdog, "HttpRobot", Local)
    link = watchdog.link("http://robot", steering={"profile": "calm"}, api_key="key", timeout=3)
    assert isinstance(link, HttpLink)
    found = link.ask(SEEN, "reach")
    link.close()
    assert found.actions.tolist() == [[1, 2, 3, 4]]
    ((path, key, body),) = sent
    assert (path, key) == ("/v1/actions", "Bearer key")
    np.testing.assert_array_equal(body.pop("images")["side"], SEEN.pictures["side"])
    np.testing.assert_array_equal(body.pop("state"), SEEN.state)
    assert body == {"instruction": "reach", "steering": {"profile": "calm"}}


def test_a_socket_link_names_cameras_as_openpi_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Local:
        def __init__(self, url: str, **kwargs: Any) -> None:
            seen.append((url, kwargs))

        def infer(self, observation: Any) -> Actions:
            seen.append(observation)
            return Actions(np.zeros((1, 4)), {"strays": 0})

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setattr(watchdog, "SocketRobot", Local)
    link = watchdog.link("ws://robot", steering={"profile": "calm"}, api_key="key", timeout=3)
    side, top = (np.full((2, 2, 3), i, np.uint8) for i in range(2))
    link.ask(Seen({"side": side, "top": top}, SEEN.state), "reach")
    with pytest.raises(ValueError, match="2 cameras, not 3"):
        link.ask(Seen({"side": side, "top": top, "wrist": top}, SEEN.state), "reach")
    link.close()
    connected, observed, closed = seen
    assert connected == ("ws://robot", {"api_key": "key", "timeout": 3, "steering": {"profile": "calm"}})
    assert observed.pop("prompt") == "reach"
    wanted = {"observation/image": side, "observation/wrist_image": top, "observation/state": SEEN.state}
    assert observed.keys() == wanted.keys()
    assert all(observed[name] is value for name, value in wanted.items())
    assert closed == "closed"


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"http://.*not 'localhost:8000'"):
        watchdog.link("localhost:8000", steering=None, api_key=None, timeout=1)
