"""The robots' clients keep their deadlines, whatever the other end does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.http11 import Request
from websockets.server import ServerProtocol

from steersman.clients import arrays
from steersman.clients.robot import SocketRobot
from steersman.clients.sdk import SteersmanError

DEADLINE = 0.3  # seconds
LATE = 2.0


@contextmanager
def deaf(*frames: bytes) -> Iterator[str]:
    """The address of a server that shakes hands, sends ``frames`` and never reads again, not even a closing frame."""
    done = threading.Event()

    def serve() -> None:
        end, _ = listener.accept()
        with end:
            protocol = ServerProtocol()
            while not (requests := [e for e in protocol.events_received() if isinstance(e, Request)]):
                protocol.receive_data(end.recv(4096))
            protocol.send_response(protocol.accept(requests[0]))
            for frame in frames:
                protocol.send_binary(frame)
            for data in protocol.data_to_send():
                end.sendall(data)
            done.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            done.set()
            thread.join(10)


METADATA = arrays.pack({"policy": "openvla"})


@pytest.mark.parametrize("size", [4, 4096], ids=["waiting", "sending"])
def test_a_deadline_holds_while_sending_waiting_and_closing(size: int) -> None:
    seen: dict[str, Any] = {"image": np.zeros((size, size, 3), np.uint8), "prompt": "go"}
    with deaf(METADATA) as url:
        robot = SocketRobot(url, timeout=DEADLINE)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            robot.infer(seen)
        with pytest.raises(SteersmanError, match="closed the connection"):
            robot.infer({"prompt": "go"})  # a late answer is not taken for the next one's
        robot.close()
        assert time.monotonic() - started < LATE


def test_a_server_that_says_nothing_is_left_in_time() -> None:
    with deaf() as url:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            SocketRobot(url, timeout=DEADLINE, steering={"profile": "calm"})
        assert time.monotonic() - started < LATE
