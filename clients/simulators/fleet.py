"""Several robots at once, each in a process of its own, so that a server has more than one of them in a batch."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial

from steersman.clients.simulators import watchdog
from steersman.clients.simulators.episode import Episode, Limits, run
from steersman.clients.simulators.metaworld import MetaWorld
from steersman.clients.simulators.simulator import Simulator
from steersman.clients.simulators.study import Steering

_simulator: Simulator  # of a robot's process


@dataclass(frozen=True)
class Order:
    """One episode that is wanted."""

    arm: str
    seed: int
    steering: Steering | None
    film: bool = False


@dataclass(frozen=True)
class Fleet:
    """``robots`` of one task, all asking the server at ``url``."""

    task: str
    url: str
    robots: int
    limits: Limits
    deadline: float  # seconds

    def run(self, orders: Sequence[Order], seconds: float = float("inf")) -> Iterator[tuple[Order, Episode]]:
        """Episodes as they are done, begun in the order given, hardly one after ``seconds``. Raises what one raises."""
        end = time.monotonic() + seconds
        context = multiprocessing.get_context("spawn")  # a simulator's pictures do not survive a fork
        with ProcessPoolExecutor(self.robots, context, _start, (self.task,)) as pool:
            running = {pool.submit(_episode, self, order): order for order in orders}
            try:
                for future in as_completed(running):
                    if not future.cancelled():
                        yield running[future], future.result()
                    if time.monotonic() > end:
                        for waiting in running:
                            waiting.cancel()
            finally:
                pool.shutdown(cancel_futures=True)


def _start(task: str) -> None:
    global _simulator
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's software renderer: the other robots have the other cores
    _simulator = MetaWorld(task)


def _episode(fleet: Fleet, order: Order) -> Episode:
    connect = partial(watchdog.link, fleet.url, steering=order.steering, api_key=None, timeout=fleet.deadline)
    asking = watchdog.Watchdog(connect, fleet.deadline)
    try:
        return run(_simulator, asking, order.seed, fleet.limits, film=order.film)
    finally:
        asking.close()
