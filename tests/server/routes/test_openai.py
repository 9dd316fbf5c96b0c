"""The steered OpenAI routes around handlers that stand in for vLLM's: what they add, and that every ticket is freed."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.testclient import TestClient
from starlette.background import BackgroundTask
from starlette.requests import Request

from steersman.server.engine.frontend import Frontend, Ticket, TicketKey
from steersman.server.engine.intake import FIELD, Refused
from steersman.server.routes import openai
from steersman.steering.errors import InvalidRequest
from steersman.steering.tokens import Prompt, Selection
from tests.server.fakes import Workers, client, frontend, reporting
from tests.steering.library import D, inline, noise

ADD = {"interventions": [{"op": "add", "vector": inline(noise(D)), "layers": [1]}]}
BODY = {"model": "m", "prompt": "hi", "max_tokens": 1}
CHUNK = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
FINAL = b'data: {"choices":[{"index":0,"text":"b","finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


class Server:
    """The application, and what vLLM's completion handler saw and does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.workers = Workers()
        self.frontend: Frontend = frontend(folder, self.workers, **settings)
        reporting(self.workers, self.frontend)
        self.http: TestClient = client(self.frontend)
        self.seen: list[Any] = []
        self.answer: Callable[[Any], Any] = lambda request: JSONResponse({"choices": []})
        for module, name in (
            (openai.completion, "create_completion"),
            (openai.chat, "create_chat_completion"),
            (openai.responses, "create_responses"),
        ):
            monkeypatch.setattr(module, name, self.handle)

    async def handle(self, request: Any, raw: Request) -> Any:
        self.seen.append(request)
        if (ticket := self.ticket(request)) is not None:
            paths = [step.path for step in ticket.plan.steps]
            ticket.selections.append(Selection.build(ticket.plan.selectors, Prompt(range(4)), paths))
        return self.answer(request)

    def ticket(self, request: Any) -> Ticket | None:
        key = (request.vllm_xargs or {}).get(FIELD)
        return self.frontend.tickets[key] if key else None

    def post(self, steering: Any = ADD, path: str = "/v1/completions", **body: Any) -> Any:
        about = {"messages": []} if "chat" in path else {"input": "hi"} if "responses" in path else {"prompt": "hi"}
        given = {} if steering is None else {"steering": steering}
        return self.http.post(path, json={"model": "m", **about, **given, **body})

    def streams(self, *events: bytes, kind: str = "text/event-stream") -> None:
        async def content() -> AsyncIterator[bytes]:
            for event in events:
                yield event

        self.answer = lambda request: StreamingResponse(content(), media_type=kind)

    def count(self, outcome: str) -> float:
        metrics = self.http.app.state.steersman.metrics  # type: ignore[attr-defined]
        return float(metrics.requests.labels(outcome)._value.get())

    def idle(self) -> bool:
        return not self.frontend.tickets and all(pin.users == 0 for pin in self.frontend._pins.values())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def events(text: str) -> list[Any]:
    """Every event's JSON; fails unless the text is a stream of well-formed events."""
    out = []
    assert text.endswith("\n\n")
    for event in text.removesuffix("\n\n").split("\n\n"):
        lines = event.split("\n")
        assert all(line.startswith(("data: ", "event: ", ":")) for line in lines), event
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        if data and data[0] != "[DONE]":
            out.append(json.loads(data[0]))
    return out


# -- whole answers ----------------------------------------------------------------------------------


def test_a_request_without_steering_is_vllms_alone(server: Server) -> None:
    for steering in ({}, {"steering": None}):
        answer = server.http.post("/v1/completions", json={**BODY, **steering})
        assert answer.json() == {"choices": []}
    assert server.seen[0].vllm_xargs is None
    assert not server.workers.calls
    assert server.count("steered") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_the_answer_gets_a_report_and_vllm_a_ticket(server: Server, path: str) -> None:
    answer = server.post(path=path)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == []
    assert answer.json()["steering"]["interventions"][0]["tokens"] == 3
    assert isinstance(server.seen[0].vllm_xargs[FIELD], TicketKey)
    assert server.seen[0].steering is None
    assert server.count("steered") == 1
    assert server.idle()


def test_as_text_in_vllm_xargs(server: Server) -> None:
    answer = server.post(None, vllm_xargs={"steering": json.dumps(ADD), "other": 1})
    assert answer.json()["steering"] == server.post().json()["steering"]
    assert server.seen[0].vllm_xargs["other"] == 1


@pytest.mark.parametrize(
    ("report", "fields"),
    [
        ("none", {"plan"}),
        ("summary", {"plan", "interventions"}),
        ("layers", {"plan", "interventions"}),
        (None, {"plan", "interventions"}),
    ],
)
def test_reports_say_as_much_as_is_asked(server: Server, report: str | None, fields: set[str]) -> None:
    found = server.post({**ADD, **({"report": report} if report else {})}).json()["steering"]
    assert set(found) == fields
    if report != "none":
        assert ("by_layer" in found["interventions"][0]) == (report == "layers")


def test_the_rest_of_the_answer_is_left_as_it_is(server: Server) -> None:
    ran = []
    body = b'{"id":"x", "odd":  1e400,"text":"\\u00e9"}'

    def answer(request: Any) -> Response:
        response = Response(body, media_type="application/json", background=BackgroundTask(ran.append, 1))
        response.headers.append("x-load", "a")
        response.headers.append("x-load", "b")
        return response

    server.answer = answer
    found = server.post()
    assert found.content.startswith(body[:-1] + b',"steering":{')
    assert found.headers.get_list("x-load") == ["a", "b"]
    assert int(found.headers["content-length"]) == len(found.content)
    assert ran == [1]


def test_an_edit_that_was_not_made_is_an_error(server: Server) -> None:
    server.workers.reports = lambda key: []
    answer = server.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_unsteered")
    assert server.count("failed") == 1
    assert server.idle()


# -- tickets are freed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "outcome"), [(400, "refused"), (404, "refused"), (500, "failed"), (503, "failed")])
def test_when_vllm_refuses(server: Server, status: int, outcome: str) -> None:
    server.answer = lambda request: JSONResponse({"error": {"message": "no"}}, status)
    answer = server.post()
    assert (answer.status_code, answer.json()) == (status, {"error": {"message": "no"}})
    assert server.count(outcome) == 1
    assert server.idle()


def test_when_the_handler_raises(server: Server) -> None:
    def fail(request: Any) -> Any:
        raise RuntimeError("boom")

    server.answer = fail
    assert server.post().status_code == 500
    assert server.count("failed") == 1
    assert server.idle()


def test_when_the_client_has_gone(server: Server) -> None:
    server.answer = lambda request: None
    server.post()
    assert server.count("cancelled") == 1
    assert server.idle()


def test_when_the_workers_cannot_be_reached(server: Server) -> None:
    server.workers.fail = RuntimeError("gone")
    assert server.post().status_code == 500
    assert not server.seen
    assert server.idle()


def test_when_the_report_cannot_be_had(server: Server) -> None:
    def fail(request: Any) -> Any:
        server.workers.fail = RuntimeError("gone")
        return JSONResponse({"choices": []})

    server.answer = fail
    assert server.post().json()["error"]["code"] == "engine_unsteered"
    assert server.idle()


@pytest.mark.parametrize("raising", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_when_a_prompt_cannot_be_steered(server: Server, raising: bool, stream: bool) -> None:
    """vLLM raises what the intake raised, or makes an answer of its own of it, perhaps in a stream."""

    def refuse(request: Any) -> Any:
        error = InvalidRequest("no roles here", "steering.interventions[0].tokens.roles")
        ticket = server.ticket(request)
        assert ticket is not None
        ticket.selections.clear()

        async def content() -> AsyncIterator[bytes]:
            if not raising:
                yield b": ping\n\n"
            ticket.refused = error
            if raising:
                raise Refused(error)
            yield b'data: {"error":{"message":"no"}}\n\n'
            yield DONE

        if stream:
            return StreamingResponse(content())
        ticket.refused = error
        if raising:
            raise Refused(error)
        return JSONResponse({"error": {}}, 400)

    server.answer = refuse
    answer = server.post(stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering.interventions[0].tokens.roles"
    assert server.count("refused") == 1
    assert server.count("failed") == server.count("cancelled") == server.count("steered") == 0
    assert server.idle()


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


class Client:
    """An ASGI client of a stream that hangs, which goes away: while it waits for the start, or in its middle."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self.asked = False

    async def receive(self) -> Any:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": json.dumps({**BODY, "steering": ADD, "stream": True}).encode()}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def ask(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "http_version": "1.1",
        }
        headers = [(b"content-type", b"application/json")]
        await self.server.http.app({**scope, "headers": headers}, self.receive, self.send)  # type: ignore[operator]


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
        gc.collect()
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert closed == [True]
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


# -- refused before anything is done ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steering": {"interventions": 3}}, "steering.interventions"),
        ({"steering": "calm"}, "steering"),
        ({"steering": []}, "steering"),
        ({"steering": ADD, "vllm_xargs": {"steering": "{}"}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steering": "{"}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steering": "[" * 100_000}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steering": 3}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steering": "steersman-ticket:abc"}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steersman": "x"}}, "vllm_xargs.steersman"),
        ({"vllm_xargs": {"steersman": "x", "steering": json.dumps(ADD)}}, "vllm_xargs.steersman"),
        ({"steering": ADD, "use_beam_search": True}, "steering"),
        ({"steering": {"interventions": [{"op": "add", "vector": "gone"}]}}, "steering.interventions[0].vector"),
    ],
)
def test_bad_requests_never_reach_vllm(server: Server, body: dict[str, Any], param: str) -> None:
    answer = server.http.post("/v1/completions", json={**BODY, **body})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == param
    assert not server.seen
    assert server.count("refused") == 1
    assert server.idle()


def test_another_requests_ticket_is_of_no_use(server: Server) -> None:
    """Even a client that knew the key of a ticket in use could not name it."""
    stolen = []

    def answer(request: Any) -> Any:
        stolen.append(str(request.vllm_xargs[FIELD]))
        inner = server.http.post("/v1/completions", json={**BODY, "vllm_xargs": {"steering": stolen[0]}})
        assert inner.status_code == 400
        return JSONResponse({"choices": []})

    async def handle(request: Any, raw: Any) -> Any:
        ticket = server.ticket(request)
        assert ticket is not None
        return await asyncio.to_thread(answer, request)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(openai.completion, "create_completion", handle)
        assert server.post().status_code == 200
    assert stolen


def test_a_body_nested_too_deeply(server: Server) -> None:
    deep = b'{"model":"m","prompt":"hi","steering":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    answer = server.http.post("/v1/completions", content=deep, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")


# -- the default profile ----------------------------------------------------------------------------


def test_the_default_profile_steers_what_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, monkeypatch, default_profile="calm")
    assert server.post(None).json()["steering"]["interventions"][0]["assets"][0].startswith("v@")
    assert server.post({"default": False}).json()["steering"]["interventions"] == []
    assert len(server.post(ADD).json()["steering"]["interventions"]) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_what_cannot_be_steered_must_opt_out_of_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    server = Server(tmp_path, monkeypatch, default_profile="calm")
    odd = {"background": True} if "responses" in path else {"use_beam_search": True}
    refused = server.post(None, path, **odd)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steering")
    assert server.post({"default": False}, path, **odd).status_code == 200
    assert server.seen[0].vllm_xargs is None
    assert server.idle()


def test_a_default_profile_that_breaks_is_said_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, monkeypatch, default_profile="stale")
    answer = server.post(None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "asset_not_found")
    assert answer.json()["error"]["param"] == "default.profile.interventions[0].vector"
    assert server.post({"default": False}).status_code == 200
    errors = server.http.app.state.steersman.metrics.store_errors  # type: ignore[attr-defined]
    assert errors.labels("asset_not_found")._value.get() == 1
