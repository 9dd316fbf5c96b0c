"""The steered OpenAI routes around a handler that stands in for vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from starlette.requests import Request

from steersman.server.engine.frontend import Frontend, Ticket
from steersman.server.engine.intake import FIELD
from steersman.server.routes import openai
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
