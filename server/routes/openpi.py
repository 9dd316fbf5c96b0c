"""``WS /`` and ``GET /healthz``: openpi's protocol, so that its robots connect by changing an address.

The first frame is metadata. Then each binary frame is an observation in msgpack with arrays, and is answered by one. An
error is a text frame, after which the connection is closed with 1011. Frames are read one ahead: a robot that goes away
cancels what is being done for it, unless it has sent its next observation already. Besides openpi's there is one more
message, ``{"session": {"steering", "unnorm_key"}}``, which sets what holds for the observations after it, as the query
does when the robot connects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.responses import PlainTextResponse, Response
from starlette.websockets import WebSocketDisconnect

from steersman.clients import arrays
from steersman.server import access
from steersman.server.answers import dumps, failure
from steersman.server.policies.robots import Robots, robots_of
from steersman.server.routes.observations import Defaults, openpi, unpacked
from steersman.server.state import state_of
from steersman.steering.errors import (
    EngineUnsteered,
    InvalidRequest,
    PayloadTooLarge,
    RateLimited,
    SteeringError,
    StoreError,
)

FAILED = 1011  # the closing code after an error
T = TypeVar("T")
logger = logging.getLogger(__name__)
router = APIRouter()


@router.get("/healthz")
async def healthz() -> Response:
    """openpi's health check."""
    return PlainTextResponse("OK\n")


@router.websocket("/")
async def connect(socket: WebSocket) -> None:
    try:
        access.robot(socket)
        robots = robots_of(socket.app)
        metadata = robots.metadata()
        defaults = Defaults.from_query(socket.query_params.multi_items())
        await robots.check(defaults.steering, defaults.unnorm_key)  # at once, and not at the first observation
        with robots.session():
            await socket.accept()
            await _Session(socket, robots, defaults).serve(metadata)
    except SteeringError as error:  # before the connection was accepted
        _count(socket, error)
        await socket.send_denial_response(failure(error))


def attach(app: FastAPI) -> None:
    app.include_router(router)


class _Session:
    """One robot's connection."""

    def __init__(self, socket: WebSocket, robots: Robots, defaults: Defaults) -> None:
        self.socket = socket
        self.robots = robots
        self.defaults = defaults
        self._receiving: asyncio.Task[Any] | None = None
        self._rate = robots.state.settings.max_robot_rate
        self._allowed, self._last = float(self._rate), monotonic()  # observations that may come at once; as of when

    async def serve(self, metadata: dict[str, Any]) -> None:
        """Answers observations until the robot goes away, or an error."""
        try:
            await self.socket.send_bytes(arrays.pack(metadata))
            previous = None
            while True:
                started = perf_counter()
                frame = await self._frame()
                answer = await self._while_connected(self._answer(frame, previous))
                await self.socket.send_bytes(arrays.pack(answer))
                previous = perf_counter() - started
        except WebSocketDisconnect:
            return
        except SteeringError as error:
            _count(self.socket, error)
            await self._fail(error)
        except Exception:
            logger.exception("an observation could not be answered")
            await self._fail(EngineUnsteered("the server failed to answer this observation"))
        finally:
            if self._receiving is not None:
                self._receiving.cancel()

    async def _answer(self, frame: bytes, previous: float | None) -> dict[str, Any]:
        started = perf_counter()
        data = await asyncio.to_thread(unpacked, frame, "observation")
        if isinstance(data, dict) and "session" in data:
            if len(data) != 1:
                raise InvalidRequest("must be alone in its message", "session")
            changed = await asyncio.to_thread(self.defaults.changed, data["session"])
            try:
                await self.robots.check(changed.steering, changed.unnorm_key)
            except SteeringError as error:
                if (error.param or "").startswith(("steering", "unnorm_key")):  # and not the server's default profile
                    error.param = f"session.{error.param}"
                raise
            self.defaults = changed
            return {"session": {"steering": self.defaults.steering, "unnorm_key": self.defaults.unnorm_key}}
        with self.robots.metrics.acting():
            cameras = self.robots.policy.cameras
            asked = await asyncio.to_thread(openpi, data, self.robots.limits, cameras, self.defaults)
            acted = await self.robots.act(asked.observation, asked.steering, asked.ignored)
        timing = {"infer_ms": 1e3 * (perf_counter() - started)}
        if previous is not None:
            timing["prev_total_ms"] = 1e3 * previous
        told = {"actions": acted.actions, **acted.about()}
        return {**told, "policy_timing": {"infer_ms": acted.timing["engine_ms"]}, "server_timing": timing}

    async def _frame(self) -> bytes:
        """The next observation. Raises RateLimited for one that comes too soon."""
        message = await self._receive()
        self._receiving = None
        _check_connected(message)
        now = monotonic()
        self._allowed = min(self._rate, self._allowed + (now - self._last) * self._rate)
        self._last = now
        if self._allowed < 1:
            raise RateLimited(f"at most {self._rate} observations a second (--steering-max-robot-rate)")
        self._allowed -= 1
        frame = message.get("bytes")
        if frame is None:
            raise InvalidRequest("observations are binary frames, in msgpack", "observation")
        limit = self.robots.state.settings.max_body_mb
        if len(frame) > limit << 20:
            raise PayloadTooLarge(f"the frame is larger than {limit} MiB (--steering-max-body-mb)", "observation")
        return bytes(frame)

    def _receive(self) -> asyncio.Task[Any]:
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self.socket.receive())
        return self._receiving

    async def _while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` comes to. Raises WebSocketDisconnect, and it is cancelled, when the robot goes away first."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._receive()), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                _check_connected(self._receive().result())
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))  # it lets go of its plan

    async def _fail(self, error: SteeringError) -> None:
        with suppress(RuntimeError, WebSocketDisconnect):  # the robot may have gone meanwhile
            await self.socket.send_text(dumps(error.body()).decode())
            await self.socket.close(FAILED, error.code)


def _count(socket: WebSocket, error: SteeringError) -> None:
    """As the handler of HTTP's errors does."""
    if isinstance(error, StoreError):
        state_of(socket.app).metrics.store_failed(error)


def _check_connected(message: Any) -> None:
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
