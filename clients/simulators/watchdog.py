"""A policy behind a deadline: an answer comes in time, or it is none.

What asks runs in a thread of its own, so that the deadline holds whatever the network does. After one that passed,
the connection is dropped and made anew: an answer that comes late must not be taken for the next one's.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from steersman.clients.robot import Actions, HttpRobot, SocketRobot
from steersman.clients.simulators.simulator import Seen

OPENPI_CAMERAS = ("observation/image", "observation/wrist_image")  # openpi's names, in the order that it has them in


class NoAnswer(Exception):
    """The server has let several deadlines pass in a row."""


class Link(Protocol):
    """A connection to a policy. ``ask`` raises SteersmanError for what the server refuses."""

    def ask(self, seen: Seen, instruction: str) -> Actions: ...

    def close(self) -> None: ...


class HttpLink:
    def __init__(self, url: str, *, steering: Mapping[str, Any] | None, api_key: str | None, timeout: float) -> None:
        self._robot = HttpRobot(url, api_key=api_key, timeout=timeout)
        self._steering = steering

    def ask(self, seen: Seen, instruction: str) -> Actions:
        return self._robot.act(seen.pictures, instruction, state=seen.state, steering=self._steering)

    def close(self) -> None:
        self._robot.close()


class SocketLink:
    def __init__(self, url: str, *, steering: Mapping[str, Any] | None, api_key: str | None, timeout: float) -> None:
        self._robot = SocketRobot(url, api_key=api_key, timeout=timeout, steering=steering)

    def ask(self, seen: Seen, instruction: str) -> Actions:
        if len(seen.pictures) > len(OPENPI_CAMERAS):
            raise ValueError(f"openpi's protocol names {len(OPENPI_CAMERAS)} cameras, not {len(seen.pictures)}")
        pictures = dict(zip(OPENPI_CAMERAS, seen.pictures.values(), strict=False))
        return self._robot.infer({**pictures, "observation/state": seen.state, "prompt": instruction})

    def close(self) -> None:
        self._robot.close()


def link(url: str, *, steering: Mapping[str, Any] | None, api_key: str | None, timeout: float) -> Link:
    """``http(s)://`` goes to ``/v1/actions``, ``ws(s)://`` to openpi's WebSocket. Raises ValueError for other URLs."""
    scheme = url.partition("://")[0]
    kinds: Mapping[str, Callable[..., Link]] = {
        "http": HttpLink,
        "https": HttpLink,
        "ws": SocketLink,
        "wss": SocketLink,
    }
    if scheme not in kinds:
        raise ValueError(f"the server's URL must begin with http://, https://, ws:// or wss://, not {url!r}")
    return kinds[scheme](url, steering=steering, api_key=api_key, timeout=timeout)


@dataclass(frozen=True)
class Answer:
    actions: Actions
    seconds: float  # from asking to having it


class Watchdog:
    """Asks through links that ``connect`` makes; ``seconds`` for each answer, connecting included."""

    def __init__(self, connect: Callable[[], Link], seconds: float, patience: int = 10) -> None:
        """``patience``: how many deadlines may pass in a row."""
        self._connect, self._seconds, self._patience = connect, seconds, patience
        self._link: Link | None = None
        self._missed = 0  # in a row

    def ask(self, seen: Seen, instruction: str) -> Answer | None:
        """None where the deadline has passed. Raises NoAnswer when patience is at its end, and what the link raises."""
        started = time.monotonic()
        found: queue.SimpleQueue[tuple[Link | None, Actions | Exception]] = queue.SimpleQueue()
        threading.Thread(target=self._fetch, args=(self._link, seen, instruction, found), daemon=True).start()
        self._link = None
        try:
            link, answer = found.get(timeout=self._seconds)
        except queue.Empty:
            threading.Thread(target=_drop, args=(found,), daemon=True).start()
            self._miss()
            return None
        if isinstance(answer, Exception):
            _close(link)
            if not isinstance(answer, (TimeoutError, httpx.TimeoutException)):
                raise answer
            self._miss()
            return None
        self._link, self._missed = link, 0
        return Answer(answer, time.monotonic() - started)

    def close(self) -> None:
        _close(self._link)
        self._link = None

    def _fetch(self, link: Link | None, seen: Seen, instruction: str, found: queue.SimpleQueue[Any]) -> None:
        try:
            link = link or self._connect()
            found.put((link, link.ask(seen, instruction)))
        except Exception as error:  # it is raised where the answer is waited for
            found.put((link, error))

    def _miss(self) -> None:
        self._missed += 1
        if self._missed >= self._patience:
            raise NoAnswer(f"{self._missed} times in a row no answer within {self._seconds:g} seconds")


def _drop(found: queue.SimpleQueue[tuple[Link | None, Any]]) -> None:
    """Waits for an answer that nobody wants any more, and closes what it came through."""
    _close(found.get()[0])


def _close(link: Link | None) -> None:
    if link is not None:
        link.close()
