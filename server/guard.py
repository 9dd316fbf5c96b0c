"""ASGI middleware: bodies have a limit, and ``steering`` is refused where no route would read it.

vLLM's request models accept unknown fields, so a ``steering`` object sent to a route that knows nothing of
it would be dropped in silence. Steered routes are let through; the bodies of other POSTs are read here first.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steersman.steering.errors import InvalidRequest, PayloadTooLarge, SteeringError

STEERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/actions")
OURS = ("/v1/steering/", "/act")


class Guard:
    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        try:
            self._check_length(scope)
            path = scope["path"].rstrip("/")
            if path in STEERED or scope["path"].startswith(OURS):
                receive = self._limited(receive)
            else:
                receive = await self._unsteered(receive)
            await self.app(scope, receive, send)
        except SteeringError as error:  # raised by the limit before anything was sent
            await JSONResponse(error.body(), error.status)(scope, receive, send)

    def _check_length(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.limit:
                raise self._too_large()

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self.limit >> 20} MiB (--steering-max-body-mb)")

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.limit:
                    raise self._too_large()
            return message

        return counting

    async def _unsteered(self, receive: Receive) -> Receive:
        """Reads the whole body, refuses it if it asks for steering, and gives it on."""
        messages: list[Message] = []
        body = bytearray()
        while True:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if len(body) > self.limit:
                raise self._too_large()
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        if b'"steering"' in body and _asks(bytes(body)):
            known = ", ".join(STEERED[:3])
            raise InvalidRequest(f"this route does not steer; these do: {known}", "steering")
        messages.reverse()

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again


def _asks(body: bytes) -> bool:
    try:
        data: Any = json.loads(body)
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("steering") is not None
