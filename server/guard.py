"""ASGI middleware: bodies have a limit, and ``steering`` is refused where no route would read it.

vLLM's request models accept unknown fields, so a ``steering`` object sent to a route that knows nothing of
it would be dropped in silence. Every body is read here, as a whole, and then given on: raised any deeper, the
refusal would be taken for a broken body.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steersman.server.answers import failure
from steersman.steering.errors import InvalidRequest, PayloadTooLarge, SteeringError

STEERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/actions", "/act")
OURS = "/v1/steering/"
DRAINED = 4  # times the limit: so much of a body that is too large is read before the connection is given up


class Guard:
    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(receive)
            path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
            if path.rstrip("/") not in STEERED and not path.startswith(OURS):
                _refuse_steering(body, _content_type(scope))
        except SteeringError as error:
            await failure(error)(scope, receive, send)
        else:
            await self.app(scope, _given_on(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone."""
        parts: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            more = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self.limit:  # a client that is still sending would not read an answer
                parts.clear()
                if size > DRAINED * self.limit:
                    break
            else:
                parts.append(message.get("body", b""))
        if size > self.limit:
            raise PayloadTooLarge(f"the body is larger than {self.limit >> 20} MiB (--steering-max-body-mb)", "body")
        return b"".join(parts)


def _given_on(body: bytes | None, receive: Receive) -> Receive:
    messages: list[Message] = []
    if body is not None:
        messages.append({"type": "http.request", "body": body, "more_body": False})

    async def given() -> Message:
        return messages.pop() if messages else await receive()

    return given


def _content_type(scope: Scope) -> bytes:
    return next((bytes(value) for name, value in scope["headers"] if name == b"content-type"), b"")


def _refuse_steering(body: bytes | None, content_type: bytes) -> None:
    for param in _asked(body or b"", content_type):
        known = ", ".join(STEERED[:3])
        raise InvalidRequest(f"this route does not steer; these do: {known}", param)


def _asked(body: bytes, content_type: bytes) -> list[str]:
    """The fields that ask for steering."""
    if content_type.startswith(b"multipart/"):
        return ["steering"] if b'name="steering"' in body else []
    if b"steer" not in body and b"\\u" not in body and b"\0" not in body:  # escaped, or not in UTF-8
        return []
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        return []
    return [path for path, found in _places(data) if found is not None]


def _places(data: Any) -> list[tuple[str, Any]]:
    if not isinstance(data, dict):
        return []
    places = [("steering", data.get("steering"))]
    if isinstance(extra := data.get("vllm_xargs"), dict):
        places += [(f"vllm_xargs.{key}", extra.get(key)) for key in ("steering", "steersman")]
    return places
