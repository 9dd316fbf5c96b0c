"""Several robots at once, in processes of their own, do what each does alone."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.clients.simulators.episode import Limits, run
from steersman.clients.simulators.fleet import Fleet, Order
from steersman.clients.simulators.watchdog import Watchdog
from tests.clients.simulators.point import Guide, Point

LIMITS = Limits(20)
ORDERS = [Order(f"up {up}", seed, {"up": up}, film=seed == 0) for up in (0.0, 0.5) for seed in range(3)]


def test_each_episode_is_that_of_a_robot_alone() -> None:
    found = list(Fleet(Point, Guide, 2, LIMITS, 30).run(ORDERS))
    assert sorted((order.arm, order.seed) for order, _ in found) == [(order.arm, order.seed) for order in ORDERS]
    for order, episode in found:
        alone = run(Point(), Watchdog(lambda order=order: Guide(order.steering), 30), order.seed, LIMITS)
        np.testing.assert_array_equal(episode.positions, alone.positions)
        assert (episode.seed, episode.edited) == (order.seed, alone.edited)
        assert len(episode.frames) == (20 if order.film else 0)


def test_time_that_is_over_ends_it() -> None:
    many = [Order("up", seed, {"up": 0.0}) for seed in range(40)]
    found = list(Fleet(Point, Guide, 1, LIMITS, 30).run(many, seconds=0.0))
    assert [order.seed for order, _ in found] == [0, 1], "one, and the next in line"


def test_what_a_robot_raises_is_raised() -> None:
    with pytest.raises(KeyError, match="up"):
        list(Fleet(Point, Guide, 1, LIMITS, 30).run([Order("bad", 0, {"down": 1.0})]))
