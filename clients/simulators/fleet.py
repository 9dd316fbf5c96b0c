"""Several robots at once, each in a process of its own, so that a server has more than one of them in a batch."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice

from steersman.clients.simulators.episode import Episode, Limits, run
from steersman.clients.simulators.simulator import Simulator
from steersman.clients.simulators.study import Steering
from steersman.clients.simulators.watchdog import Link, Watchdog

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
    """``make`` and ``connect`` are called in the robots' processes, so they must be such as can be pickled."""

    make: Callable[[], Simulator]
    connect: Callable[[Steering | None], Link]
    robots: int
    limits: Limits
    deadline: float  # seconds, for an answer

    def run(self, orders: Sequence[Order], seconds: float = float("inf")) -> Iterator[tuple[Order, Episode]]:
        """Episodes as they are done, begun in the order given; after ``seconds`` only those next in line are done.

        Raises what one raises.
        """
        end = time.monotonic() + seconds
        context = multiprocessing.get_context("spawn")  # a simulator's pictures do not survive a fork
        waiting = iter(orders)
        with ProcessPoolExecutor(self.robots, context, _start, (self.make,)) as pool:
            running = {pool.submit(_episode, self, order): order for order in islice(waiting, 2 * self.robots)}
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in [f for f in running if f in done]:
                        yield running.pop(future), future.result()
                    more = 2 * self.robots - len(running) if time.monotonic() < end else 0
                    running |= {pool.submit(_episode, self, order): order for order in islice(waiting, more)}
            finally:
                pool.shutdown(cancel_futures=True)


def _start(make: Callable[[], Simulator]) -> None:
    global _simulator
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's software renderer: the other robots have the other cores
    _simulator = make()


def _episode(fleet: Fleet, order: Order) -> Episode:
    watchdog = Watchdog(partial(fleet.connect, order.steering), fleet.deadline)
    try:
        return run(_simulator, watchdog, order.seed, fleet.limits, film=order.film)
    finally:
        watchdog.close()
