"""The live page's routes: who may watch, and that nobody who goes, stalls or stays leaves anything behind."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from steersman.server.live import feed as feeds
from steersman.server.routes import live as module
from tests.server.live.watched import answer, application, feed, served, until

EVENTS = "/steering/live/events"


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    response = TestClient(application(tmp_path, feed(), key="k")).get("/steering/live")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.findall(r"https?:|//\w+\.\w+|@import|url\(", response.text)
    assert "innerHTML" not in response.text  # names of assets are text
    assert len(response.content) < 30_000


def test_monitoring_off_is_said_and_takes_no_place(tmp_path: Path) -> None:
    response = TestClient(application(tmp_path, None)).get(EVENTS)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text == 'event: hello\ndata: {"monitor":"off"}\n\n'


def test_events_need_the_servers_key(tmp_path: Path) -> None:
    live = feed()
    with served(application(tmp_path, live, key="k")) as run:
        for header in (None, "Bearer wrong", "Basic k", "k"):
            given = {"Authorization": header} if header else {}
            with httpx.stream("GET", run.url + EVENTS, headers=given) as response:
                assert response.status_code == 401
                assert json.loads(response.read())["error"]["code"] == "unauthorized"
            assert not live.viewers


def test_events_come_and_a_viewer_that_goes_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MAX_VIEWERS", 1)
    live = feed()
    live.take(answer(passes=3))
    live.publish()
    with served(application(tmp_path, live, key="k")) as run, httpx.Client(base_url=run.url) as http:
        key = {"Authorization": "Bearer k"}
        for _ in range(2):  # there is room again
            with http.stream("GET", EVENTS, headers=key) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                assert response.headers["cache-control"] == "no-store"
                lines = response.iter_lines()
                assert next(lines) == "event: hello"
                hello = json.loads(next(lines).removeprefix("data: "))
                assert hello["frames"][0]["passes"] == 3
                full = http.get(EVENTS, headers=key)
                assert full.status_code == 503
                assert full.json()["error"]["code"] == "too_many_sessions"
                assert "1 pages" in full.json()["error"]["message"]
            until(lambda: not live.viewers)


def test_a_server_that_stops_does_not_wait_for_viewers(tmp_path: Path) -> None:
    live = feed()
    with served(application(tmp_path, live)) as run, httpx.Client(base_url=run.url, timeout=10) as http:
        with http.stream("GET", EVENTS) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: hello"
            run.server.should_exit = True
            rest = list(lines)  # ends, and ends well
        assert rest[1:] == [""]
        run.thread.join(5)
        assert not run.thread.is_alive()
    assert not live.viewers


def test_a_silent_stream_says_that_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK", 0.05)
    monkeypatch.setattr(module, "BEAT", 0.1)
    with served(application(tmp_path, feed())) as run, httpx.stream("GET", run.url + EVENTS) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(7)][3:] == [": nothing new", "", ": nothing new", ""]


@pytest.mark.parametrize("version", ["2.3", "2.4"])  # of ASGI: they differ in how a client's going is told
def test_a_viewer_that_takes_nothing_loses_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    live = feed()
    app = application(tmp_path, live)
    stuck = asyncio.Event()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            stuck.set()
            await asyncio.Event().wait()

    async def run() -> None:
        about = {"asgi": {"spec_version": version}, "query_string": b"", "headers": [], "http_version": "1.1"}
        scope = {**about, "type": "http", "method": "GET", "path": EVENTS}
        async with asyncio.timeout(5):
            call = asyncio.create_task(app(scope, receive, send))
            await stuck.wait()
            assert len(live.viewers) == 1
            await call
        assert not live.viewers
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
