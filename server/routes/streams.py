"""Streams of server-sent events with the report in the last one.

The contract with vLLM: a chat or completion stream ends with ``data: [DONE]``, and the last chunk of each choice
is the one with a ``finish_reason``, before one without choices if usage is asked for; a responses stream ends with
``response.completed``. An error that comes before the first event is that event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.utils.api_utils import listen_for_disconnect

from steersman.server.answers import dumps
from steersman.server.routes.served import Served, spliced
from steersman.steering.errors import EngineUnsteered, SteeringError

LAST = (b'"finish_reason":"', b'"choices":[]', b"event: response.completed")  # quotes in texts are escaped


class SteeredStream(StreamingResponse):
    """Closes its events when it ends, however it ends: a client may go away while one is being sent."""

    def __init__(self, like: StreamingResponse, first: Iterable[bytes], events: AsyncGenerator[bytes]) -> None:
        super().__init__(_after(first, events), like.status_code, background=like.background)
        self.raw_headers = like.raw_headers
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()


async def steered(response: StreamingResponse, raw: Request, served: Served) -> SteeredStream | None:
    """The stream, which frees the ticket however it ends. None if the client has gone; raises what lets it not start.

    It is begun here, so that a prompt that cannot be steered is still answered by a status. What has been begun is
    closed even if nobody goes on with it, unlike a generator that never ran.
    """
    stream = _stream(aiter(response.body_iterator), served)
    first = asyncio.ensure_future(_first(stream, served))
    gone = asyncio.ensure_future(listen_for_disconnect(raw))
    try:
        await asyncio.wait((first, gone), return_when=asyncio.FIRST_COMPLETED)
        if first.done() and served.ticket.refused is None:
            begun = SteeredStream(response, await first, stream)
            served.streaming = True
            return begun
        await _end(first, stream, served)
        if served.ticket.refused is not None:
            raise served.ticket.refused
        return None
    except BaseException:
        await _end(first, stream, served)
        raise
    finally:
        gone.cancel()


async def _first(stream: AsyncIterator[bytes], served: Served) -> list[bytes]:
    """The events until a prompt has been taken or refused; a responses stream has some before."""
    out = []
    async for data in stream:
        out.append(data)
        if served.ticket.selections or served.ticket.refused is not None:
            break
    return out


async def _after(first: Iterable[bytes], stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    for data in first:
        yield data
    async for data in stream:
        yield data


async def _end(first: asyncio.Future[list[bytes]], stream: AsyncGenerator[bytes], served: Served) -> None:
    first.cancel()
    with suppress(BaseException):
        await first
    await stream.aclose()
    served.state.frontend.finish(served.ticket)  # cancelled before its first step, the stream itself does nothing


async def _stream(events: AsyncIterator[Any], served: Served) -> AsyncGenerator[bytes]:
    """The events; one that may be the last is held back until it is known whether it is."""
    held, data = b"", b""
    outcome = "cancelled"
    try:
        async for event in events:
            data = event.encode() if isinstance(event, str) else bytes(event)
            if data.startswith(b":"):  # a comment, to keep the connection alive
                yield data
                continue
            done = data.startswith(b"data: [DONE]")
            if held:
                if done:
                    held, outcome = await _last(held, served)
                yield held
                held = b""
            elif done:  # after an error
                outcome = "failed"
            if any(mark in data for mark in LAST):
                held = data
            else:
                yield await _with_news(data, served) if served.live else data
        if held:
            held, outcome = await _last(held, served)
            yield held
        elif outcome == "cancelled":  # it ended without an end
            outcome = "failed"
    except Exception as error:  # of a responses stream: the others say it themselves
        if not served.streaming:
            raise  # it can still be answered by a status
        outcome = "failed"
        yield _failure(data, served.ticket.refused or EngineUnsteered(f"the stream broke off: {error}"))
    finally:
        served.state.frontend.finish(served.ticket)
        if served.streaming:  # else the route counts it
            served.state.metrics.count(outcome)
        if hasattr(events, "aclose"):
            await events.aclose()


async def _with_news(event: bytes, served: Served) -> bytes:
    """An event with what probes have read since the one before, if it is an object and there is any."""
    head, mark, rest = event.partition(b"data: ")
    if not rest.rstrip().endswith(b"}") or not (news := await served.news()):
        return event
    return head + mark + spliced(rest, {"sequences": news}) + b"\n\n"


async def _last(event: bytes, served: Served) -> tuple[bytes, str]:
    """The stream's last event with the report, or an error in its place when the edits were not made; the outcome."""
    try:
        news = await served.news() if served.live else []  # before the workers forget the request
        report = await served.report()
    except SteeringError as error:
        return _failure(event, error), "refused" if error.status < 500 else "failed"
    except Exception as error:
        return _failure(event, EngineUnsteered(f"the report could not be made: {error}", "steering")), "failed"
    if news:
        report["sequences"] = report.get("sequences") or news
    head, _, rest = event.partition(b"data: ")
    return head + b"data: " + spliced(rest, report) + b"\n\n", "steered"


def _failure(event: bytes, error: SteeringError) -> bytes:
    """An error event, as streams of the kind that ``event`` belongs to have them."""
    if not event.startswith(b"event: "):
        return b"data: " + dumps(error.body()) + b"\n\n"
    _, _, data = event.partition(b"data: ")
    about = {"code": error.code, "message": error.message, "param": error.param}
    number = json.loads(data).get("sequence_number", 0) + 1
    return (
        b"event: error\ndata: " + dumps({"type": "error", "sequence_number": number, **about, **error.body()}) + b"\n\n"
    )
