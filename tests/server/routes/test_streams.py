"""Streams: the report in the last event, errors as events, and clients that go away."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse
from starlette.requests import Request

from steersman.server.reports import Reports
from steersman.server.routes import openai
from tests.server.fakes import reporting
from tests.server.routes.stand_in import ADD, BODY, CHUNK, DONE, FINAL, USAGE, Client, Server, events
from tests.steering.library import D, inline, noise


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


# -- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [[CHUNK, FINAL], [FINAL], [CHUNK, FINAL, USAGE], [FINAL, CHUNK, FINAL], [b": ping\n\n", FINAL, b": ping\n\n"]],
)
def test_the_last_event_of_a_stream_has_the_report(server: Server, sent: list[bytes]) -> None:
    server.streams(*sent, DONE)
    answer = server.post(stream=True)
    assert answer.status_code == 200
    assert answer.text.endswith(DONE.decode())
    found = events(answer.text)
    expected = events(b"".join(sent).decode())
    assert [{k: v for k, v in event.items() if k != "steering"} for event in found] == expected
    assert ["steering" in event for event in found] == [False] * (len(expected) - 1) + [True]
    assert found[-1]["steering"]["interventions"][0]["tokens"] == 3
    assert server.count("steered") == 1
    assert server.idle()


LIVE = {"probes": [{"vector": inline(noise(D)), "layers": [1]}], "stream_probes": True}


NOTHING: dict[str, Any] = {"positions": [9], "columns": [], "values": [[]]}
WHOLE = {"probes": NOTHING, "edits": NOTHING}  # of a report of every token


def live(server: Server, monkeypatch: pytest.MonkeyPatch, news: list[list[int]]) -> None:
    """From now on the probes have read these positions when they are asked, one list for each time."""
    parts = iter(news)

    async def probed(self: Reports, ticket: Any, seen: dict[str, int]) -> list[dict[str, Any]]:
        assert server.frontend.tickets, "the workers have forgotten the request"
        positions = next(parts)
        return [{"choice": 0, "positions": positions, "probes": []}] if positions else []

    monkeypatch.setattr(Reports, "probed", probed)


@pytest.mark.parametrize("report", ["summary", "none", "tokens"])
def test_chunks_tell_what_probes_have_read(server: Server, monkeypatch: pytest.MonkeyPatch, report: str) -> None:
    live(server, monkeypatch, [[0, 1], [], [2], [3]])
    reporting(server.workers, server.frontend, tokens=[WHOLE])
    server.streams(CHUNK, b": ping\n\n", CHUNK, CHUNK, FINAL, DONE)
    found = events(server.post({**LIVE, "report": report}, stream=True).text)
    told = [[s["positions"] for s in e.get("steering", {}).get("sequences", ())] for e in found]
    assert told == [[[0, 1]], [], [[2]], [[9] if report == "tokens" else [3]]]
    assert ["plan" in e.get("steering", {}) for e in found] == [False] * 3 + [True]
    assert [e["choices"] for e in found] == [e["choices"] for e in events((3 * CHUNK + FINAL).decode())]
    assert server.idle()


def test_chunks_are_left_alone_where_nobody_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    live(server, monkeypatch, [])
    server.streams(CHUNK, FINAL, DONE)
    assert "steering" not in events(server.post({"probes": LIVE["probes"]}, stream=True).text)[0]


@pytest.mark.parametrize(
    ("steering", "body", "param"),
    [
        (LIVE, {}, "steering.stream_probes"),
        ({**ADD, "stream_probes": True}, {"stream": True}, "steering.stream_probes"),
        ({"probes": [{"vector": inline(noise(D)), "layers": "0-3"}] * 64, "report": "tokens"}, {}, None),
        ({"probes": [{"vector": inline(noise(D)), "layers": 1}] * 65}, {}, "steering.probes"),
    ],
)
def test_what_cannot_be_told(server: Server, steering: Any, body: dict[str, Any], param: str | None) -> None:
    reporting(server.workers, server.frontend, tokens=[WHOLE])
    answer = server.post(steering, **body)
    assert answer.status_code == (400 if param else 200), answer.text
    assert not param or answer.json()["error"]["param"] == param
    assert server.idle()


def test_more_numbers_than_a_worker_keeps(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.server.engine.frontend.MAX_TRACED", 5)
    reporting(server.workers, server.frontend, tokens=[WHOLE])
    probes = {"probes": [{"vector": inline(noise(D)), "layers": "0-3"}]}
    assert server.post({**ADD, **probes, "report": "tokens"}).status_code == 200
    answer = server.post({**probes, "interventions": ADD["interventions"] * 2, "report": "tokens"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering.report"
    assert "6 numbers for each token" in answer.json()["error"]["message"]


def test_a_stream_with_an_edit_beyond_the_limit_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, monkeypatch, max_relative_norm=0.5, dosage="refuse")
    reporting(server.workers, server.frontend, over=[[0, 1, 3, 0.8]])
    assert server.post().status_code == 400
    server.streams(CHUNK, FINAL, DONE)
    error = events(server.post(stream=True).text)[-1]["error"]
    assert (error["code"], error["param"]) == ("dosage_exceeded", "steering.interventions[0]")
    assert server.count("refused") == 2
    limited = server.http.app.state.steersman.metrics.dosage  # type: ignore[attr-defined]
    assert limited.labels("inline", "refuse")._value.get() == 6


def test_events_that_quote_the_end_are_not_the_end(server: Server) -> None:
    quoting = b'data: {"choices":[{"text":"\\"finish_reason\\":\\"stop\\" data: [DONE]"}]}\n\n'
    server.streams(quoting, FINAL, DONE)
    found = events(server.post(stream=True).text)
    assert "steering" not in found[0]
    assert "steering" in found[1]


def test_a_responses_stream_ends_with_its_own_event(server: Server) -> None:
    created = b'event: response.created\ndata: {"sequence_number":0}\n\n'
    completed = b'event: response.completed\ndata: {"sequence_number":1,"response":{}}\n\n'
    server.streams(created, completed)
    answer = server.post(path="/v1/responses", stream=True)
    assert answer.text.startswith(created.decode())
    assert "event: response.completed\n" in answer.text
    assert events(answer.text)[1]["steering"]["interventions"][0]["tokens"] == 3
    assert server.idle()


def test_an_edit_that_was_not_made_ends_the_stream_with_an_error(server: Server) -> None:
    server.workers.reports = lambda key: []
    server.streams(CHUNK, FINAL, DONE)
    found = events(server.post(stream=True).text)
    assert found[-1]["error"]["code"] == "engine_unsteered"
    completed = b'event: response.completed\ndata: {"sequence_number":1}\n\n'
    server.streams(completed)
    answer = server.post(path="/v1/responses", stream=True)
    assert answer.text.startswith("event: error\n")
    error = events(answer.text)[0]
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "engine_unsteered", 2)
    assert error["message"] == error["error"]["message"]
    assert server.count("failed") == 2
    assert server.idle()


def test_a_stream_with_vllms_own_error_is_passed_on(server: Server) -> None:
    server.streams(CHUNK, b'data: {"error":{"message":"engine"}}\n\n', DONE)
    assert events(server.post(stream=True).text)[-1] == {"error": {"message": "engine"}}
    assert server.count("failed") == 1
    assert server.idle()


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_breaks(server: Server, begun: bool) -> None:
    async def content() -> AsyncIterator[bytes]:
        if begun:
            yield CHUNK
        raise RuntimeError("boom")

    server.answer = lambda request: StreamingResponse(content())
    answer = server.post(stream=True)
    if begun:
        assert answer.status_code == 200
        assert "boom" in events(answer.text)[-1]["error"]["message"]
    else:
        assert answer.status_code == 500
    assert server.count("failed") == 1
    assert server.idle()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_client_that_goes_away_in_a_stream(server: Server, before: int) -> None:
    closed = []

    async def content() -> AsyncIterator[bytes]:
        try:
            for _ in range(before):
                yield CHUNK
            await asyncio.sleep(60)
            yield FINAL
        finally:
            closed.append(True)

    server.answer = lambda request: StreamingResponse(content())

    async def run() -> None:
        visitor = Client(server)
        task = asyncio.create_task(visitor.ask())
        while len(visitor.sent) < (before + 1 if before else 0) or not server.seen:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert len(server.frontend.tickets) == 1
        visitor.gone.set()
        await asyncio.wait_for(task, 5)
        assert closed == [True]  # not when the garbage is collected

    asyncio.run(run())
    assert server.count("cancelled") == 1
    assert server.idle()


@pytest.mark.parametrize("when", ["preparing", "handling", "starting"])
def test_a_request_that_is_cancelled(server: Server, when: str) -> None:
    original = server.handle

    async def hanging(request: Any, raw: Any) -> Any:
        if when == "handling":
            await asyncio.sleep(60)
        return await original(request, raw)

    async def content() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield FINAL

    async def run(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(openai.completion, "create_completion", hanging)
        if when == "preparing":

            async def never(*args: Any) -> Any:
                await asyncio.sleep(60)

            server.frontend._rpc = never
        server.answer = lambda request: StreamingResponse(content())
        task = asyncio.create_task(Client(server).ask())
        await asyncio.sleep(0.3)
        assert len(server.frontend.tickets) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(run(monkeypatch))
    assert not server.frontend.tickets
    assert server.count("cancelled") == 1


def test_a_stream_that_nobody_reads(server: Server) -> None:
    """The response was made, and then dropped: by another middleware, or because the connection broke."""

    async def run() -> None:
        async def content() -> AsyncIterator[bytes]:
            yield CHUNK
            yield FINAL

        server.answer = lambda request: StreamingResponse(content())
        visitor = Client(server)
        raw = Request({"type": "http", "app": server.http.app, "headers": []}, visitor.receive)
        visitor.asked = True
        request = openai.SteeredCompletionRequest(**BODY, steering=ADD, stream=True)
        response = await openai._serve(request, raw, openai.completion.create_completion, {})
        assert len(server.frontend.tickets) == 1
        del response
        gc.collect()
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert server.idle()
