"""Small clients for robots: over HTTP (``/v1/actions``) and over openpi's WebSocket.

Pictures are uint8 [height, width, 3]. Every call has a deadline. What a robot does when one passes is its own to
decide, and safest is to hold still.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from socket import SHUT_RDWR
from threading import Event, Timer
from typing import Any, Self
from urllib.parse import urlencode

import httpx
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from steersman.clients import arrays
from steersman.clients.sdk import SteersmanError


@dataclass(frozen=True)
class Actions:
    """One answer."""

    actions: NDArray[np.float64]  # [chunk, dims], in the robot's units
    about: dict[str, Any]  # token_ids, strays, saturated, ignored, times, and the steering report if it was steered


class HttpRobot:
    """``HttpRobot("http://localhost:8000").act({"front": picture}, "pick up the cup")``."""

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        *,
        api_key: str | None = None,
        timeout: float = 5.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """``timeout``: seconds for each of connecting, sending and waiting."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def act(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        instruction: str,
        *,
        state: NDArray[np.floating[Any]] | None = None,
        unnorm_key: str | None = None,
        seed: int | None = None,
        steering: Mapping[str, Any] | None = None,
    ) -> Actions:
        """``seed``: of the noise that a π0 begins from.

        Raises SteersmanError for what the server refuses, httpx.TimeoutException when the deadline passes."""
        given = {"state": state, "unnorm_key": unnorm_key, "seed": seed, "steering": steering}
        asked = {
            "images": dict(images),
            "instruction": instruction,
            **{k: v for k, v in given.items() if v is not None},
        }
        headers = {"content-type": "application/msgpack"}
        response = self._http.post("/v1/actions", content=arrays.pack(asked), headers=headers)
        if response.status_code >= 400:
            raise _refused(response.status_code, response.content)
        about = response.json()
        return Actions(np.array(about.pop("actions"), np.float64), about)


class SocketRobot:
    """openpi's protocol: one connection, one observation at a time, keys as openpi's robots name them.

    ``metadata`` is what the server says of its policy. ``steering`` holds for the connection until :meth:`session`
    changes it; an observation's own ``steering`` key goes before it.
    """

    def __init__(
        self,
        url: str = "ws://localhost:8000",
        *,
        api_key: str | None = None,
        timeout: float = 5.0,
        steering: Mapping[str, Any] | None = None,
        unnorm_key: str | None = None,
    ) -> None:
        """``timeout``: seconds for one action, from sending to the answer, and for connecting and for closing.

        Raises SteersmanError where the server refuses the connection.
        """
        query = {"steering": json.dumps(steering)} if steering is not None else {}
        if unnorm_key is not None:
            query["unnorm_key"] = unnorm_key
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._timeout = timeout
        self._open = ExitStack()
        try:
            self._socket = self._open.enter_context(
                connect(
                    f"{url.rstrip('/')}/?{urlencode(query)}",
                    additional_headers=headers,
                    compression=None,
                    max_size=None,
                    open_timeout=timeout,
                    close_timeout=timeout,
                )
            )
        except InvalidStatus as error:
            raise _refused(error.response.status_code, bytes(error.response.body or b"")) from None
        try:
            self.metadata: dict[str, Any] = self._exchange(None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def infer(self, observation: Mapping[str, Any]) -> Actions:
        """Raises SteersmanError for what the server refuses, after which it has closed the connection.

        Raises TimeoutError when the deadline passes; the connection is closed then, as the late answer would be taken
        for the next one's.
        """
        about = self._exchange(dict(observation))
        return Actions(np.array(about.pop("actions"), np.float64), about)

    def session(self, **defaults: Any) -> dict[str, Any]:
        """Sets ``steering`` or ``unnorm_key`` for the observations to come; None takes them back. What holds now."""
        found: dict[str, Any] = self._exchange({"session": defaults})["session"]
        return found

    def _exchange(self, message: Mapping[str, Any] | None) -> dict[str, Any]:
        """Sends, where there is a message, and waits for the answer, both within one deadline."""
        expired, frame = Event(), None

        def cut() -> None:  # sending has no deadline of its own, and a handshake of closing might have none to shake
            expired.set()
            with suppress(OSError):
                self._socket.socket.shutdown(SHUT_RDWR)

        timer = Timer(self._timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            if message is not None:
                self._socket.send(arrays.pack(message))
            frame = self._socket.recv()
        except ConnectionClosed as error:
            if not expired.is_set():
                raise SteersmanError(0, f"the server has closed the connection: {error}") from None
        finally:
            timer.cancel()
        if frame is None or expired.is_set():
            self.close()
            raise TimeoutError(f"no answer within {self._timeout:g} seconds")
        if isinstance(frame, str):
            raise _refused(0, frame.encode())
        found: dict[str, Any] = arrays.unpack(frame)
        return found


def _refused(status: int, body: bytes) -> SteersmanError:
    """The server's error; ``status`` 0 where it came over a WebSocket."""
    try:
        error = json.loads(body)["error"]
        return SteersmanError(status, error["message"], error.get("code"), error.get("param"))
    except (ValueError, KeyError, TypeError):  # not every answer is the server's own
        return SteersmanError(status, body[:500].decode(errors="replace"))
