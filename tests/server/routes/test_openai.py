"""What the steered OpenAI routes add to vLLM's answers, and that every ticket is freed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from steersman.server.engine.frontend import TicketKey
from steersman.server.engine.intake import FIELD, Refused
from steersman.server.routes import openai
from steersman.steering.errors import InvalidRequest
from tests.server.routes.stand_in import ADD, BODY, DONE, Server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


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
