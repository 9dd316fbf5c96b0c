import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from steersman.server.guard import DRAINED, Guard

LIMIT = 1 << 20


class Inner:
    """The application behind the guard: it keeps the bodies that reach it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def ask(path: str, chunks: Iterable[bytes], method: str = "POST", kind: bytes = b"application/json", root: str = ""):
    """(status, body, how many chunks were read, what reached the application)."""
    inner, sent, read = Inner(), [], 0
    source = iter([*chunks, None])

    async def receive() -> dict[str, Any]:
        nonlocal read
        chunk = next(source, None)
        if chunk is None:
            return {"type": "http.disconnect"}
        read += 1
        return {"type": "http.request", "body": chunk, "more_body": read < len(list(chunks))}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    chunks = list(chunks)
    scope = {"type": "http", "method": method, "path": path, "root_path": root, "headers": [(b"content-type", kind)]}
    asyncio.run(Guard(inner, LIMIT)(scope, receive, send))
    status = sent[0]["status"] if sent else None
    return status, b"".join(m.get("body", b"") for m in sent), read, inner.bodies


def refused(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions/", "/v1/responses", "/v1/steering/resolve"])
def test_steered_routes_get_their_body_untouched(path: str) -> None:
    body = json.dumps({"steering": {"interventions": []}}).encode()
    status, _, _, seen = ask(path, [body[:9], body[9:]])
    assert (status, seen) == (200, [body])


def test_a_root_path_is_not_part_of_the_route() -> None:
    assert ask("/api/v1/completions", [b'{"steering": {}}'], root="/api")[0] == 200
    assert ask("/api/v1/completions", [b'{"steering": {}}'])[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"steering": {}}',
        b'{"model": "m", "steering": {"interventions": [{"op": "add"}]}}',
        b'{"steering": "calm"}',
        b'{"\\u0073teering": {}}',
        '{"steering": {}}'.encode("utf-16"),
        '{"steering": {}}'.encode("utf-32"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/messages", "/tokenize", "/v1/chat/completions/batch", "/v1/embeddings", "/acting"]
)
def test_other_routes_refuse_steering(path: str, body: bytes) -> None:
    status, answer, _, seen = ask(path, [body])
    assert (status, seen) == (400, [])
    assert refused(answer)["param"] == "steering"


@pytest.mark.parametrize("key", ["steering", "steersman"])
def test_other_routes_refuse_it_in_vllm_xargs(key: str) -> None:
    status, answer, _, seen = ask("/v1/messages", [json.dumps({"vllm_xargs": {key: "{}"}}).encode()])
    assert (status, seen) == (400, [])
    assert refused(answer)["param"] == f"vllm_xargs.{key}"


def test_other_routes_refuse_it_in_a_form() -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="steering"\r\n\r\n{}\r\n--b--\r\n'
    assert ask("/v1/audio/transcriptions", [form], kind=b"multipart/form-data; boundary=b")[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "steering wheel"}',
        b'{"steering": null}',
        b'{"tools": [{"properties": {"steering": {"type": "number"}}}]}',
        b'"steering"',
        b'["steering"]',
        b'{"steering": ',
        b'{"steering":' * 50_000,
        b"",
    ],
)
def test_what_asks_for_no_steering_passes(body: bytes) -> None:
    assert ask("/tokenize", [body])[3] == [body]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/steering/assets"])
def test_a_body_has_a_limit(path: str) -> None:
    chunk = b"x" * (LIMIT // 4)
    assert ask(path, [chunk] * 4)[0] == 200
    status, answer, read, seen = ask(path, [chunk] * 5)
    assert (status, read, seen) == (413, 5, [])
    assert refused(answer)["code"] == "payload_too_large"


def test_a_body_without_end_is_not_read_for_ever() -> None:
    status, _, read, _ = ask("/tokenize", [b"x" * LIMIT] * 100)
    assert status == 413
    assert read == DRAINED + 1


def test_a_client_that_goes_away_is_not_answered() -> None:
    inner = Inner()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": []}
    asyncio.run(Guard(inner, LIMIT)(scope, receive, send))
    assert inner.bodies == []


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
def test_methods_without_a_body_pass_unread(method: str) -> None:
    assert ask("/tokenize", [b'{"steering": {}}'], method=method)[0] == 200
