"""``/steering/live``: a page that shows what every layer does, and the events that it draws.

The page is one file and holds no data, so anybody may load it. The events want the server's API key where there is
one; the page asks its reader for it. They are server-sent events: ``hello`` (the server and the last frames),
``frame`` (see :mod:`steersman.server.live.feed`), ``lag`` (the workers do not answer). With monitoring off there is
one ``hello``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from steersman.server import access
from steersman.server.answers import dumps
from steersman.server.live import feed
from steersman.server.state import state_of

PAGE = Path(feed.__file__).parent / "live.html"
TICK = 1.0  # seconds between two looks at whether the server stops
BEAT = 10.0  # seconds after which a silent stream says that it is there
PATIENCE = 30.0  # seconds in which a viewer must take an event
NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OFF = b"event: hello\ndata: " + dumps({"monitor": "off"}) + b"\n\n"

router = APIRouter(prefix="/steering/live")


@router.get("", response_class=HTMLResponse)
async def page() -> Response:
    """The live page: layers by time, edit sizes, probes."""
    content = await asyncio.to_thread(PAGE.read_bytes)
    about = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return HTMLResponse(content, headers=about)


@router.get("/events")
async def events(raw: Request) -> Response:
    """What the live page draws, as server-sent events."""
    access.robot(raw)
    live = state_of(raw.app).live
    if live is None:
        return Response(OFF, media_type="text/event-stream", headers=NO_STORE)
    return _Stream(live, raw.app.state)


def attach(app: FastAPI) -> None:
    app.include_router(router)


class _Stream(StreamingResponse):
    """One viewer's events, until it goes, falls behind, or the server stops, which waits for open answers."""

    def __init__(self, live: feed.Feed, state: Any) -> None:
        super().__init__((), media_type="text/event-stream", headers=NO_STORE)
        self.live = live
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises TooManySessions before anything is sent."""

        async def patient(message: Message) -> None:
            async with asyncio.timeout(PATIENCE):
                await send(message)

        with self.live.viewing() as viewer:
            async with aclosing(self._events(viewer)) as self.body_iterator:
                try:
                    await super().__call__(scope, receive, patient)
                except (TimeoutError, ClientDisconnect):
                    return  # nobody is there to be told

    async def _events(self, viewer: feed.Viewer) -> AsyncGenerator[bytes, None]:
        yield viewer.hello
        silent = 0.0
        while not viewer.dropped and not self._stopping():
            try:
                event = await asyncio.wait_for(viewer.waiting.get(), TICK)
            except TimeoutError:
                silent += TICK
                if silent < BEAT:
                    continue
                event = b": nothing new\n\n"
            silent = 0.0
            yield event

    def _stopping(self) -> bool:
        """Whether uvicorn's server, which vLLM keeps here, has been told to exit."""
        return bool(getattr(getattr(self._state, "server", None), "should_exit", False))
