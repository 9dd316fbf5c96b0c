"""The loop: chunks, holding still, what is counted and measured."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from steersman.clients.robot import Actions
from steersman.clients.simulators import episode
from steersman.clients.simulators.episode import METRICS, Episode, Limits
from steersman.clients.simulators.simulator import Seen
from steersman.clients.simulators.watchdog import Watchdog
from tests.clients.simulators.point import CHUNK, NEAR, Guide, Point


def fly(point: Point, link: Guide, limits: Limits, seed: int = 3, film: bool = False) -> Episode:
    return episode.run(point, Watchdog(lambda: link, 30), seed, limits, film)


@pytest.mark.parametrize("chunk", [1, 3, CHUNK, None])
def test_as_many_actions_of_each_answer_as_said(chunk: int | None) -> None:
    point, link, steps = Point(), Guide(), 10
    found = fly(point, link, Limits(steps, chunk))
    assert len(point.done) == steps
    assert found.answers == point.looks == len(link.asked) == math.ceil(steps / (chunk or CHUNK))
    assert found.strays == found.answers
    assert len(found.latencies) == found.answers
    assert found.positions.shape == (steps + 1, 3)


def test_the_policy_brings_it_to_the_goal_and_success_is_when_it_was_near_first() -> None:
    point = Point()
    found = fly(point, Guide(), Limits(60))
    assert found.success
    assert found.distance < 1e-9
    distances = np.linalg.norm(found.positions - point.goal, axis=1)
    assert found.succeeded_at == int(np.argmax(distances < NEAR))
    assert found.nearest == pytest.approx(distances.min())
    assert len(point.done) == 60, "an episode goes on after success"


def test_metrics_are_those_of_the_path() -> None:
    point = Point()
    metrics = fly(point, Guide(), Limits(60)).metrics()
    assert list(metrics) == list(METRICS)
    path, at = [np.zeros(3)], np.zeros(3)
    for action in point.done:
        at = at + 0.01 * action[:3]
        path.append(at)
    length = sum(np.linalg.norm(b - a) for a, b in pairwise(path))
    assert metrics["displacement"] == pytest.approx(np.linalg.norm(point.goal))
    assert metrics["mean_height"] == pytest.approx(np.mean([p[2] for p in path]))
    assert metrics["speed"] == pytest.approx(length / (60 * point.seconds))
    early = sum(np.linalg.norm(b - a) for a, b in pairwise(path[:16]))
    assert metrics["early_speed"] == pytest.approx(early / (15 * point.seconds))
    assert metrics["early_speed"] > metrics["speed"], "it arrives and stops"


def test_it_holds_still_while_there_is_no_answer_and_keeps_its_grip() -> None:
    class Pausing(Guide):
        def ask(self, seen: Seen, instruction: str) -> Actions:
            if len(self.asked) in (0, 2):
                self.asked.append(seen)
                raise TimeoutError
            return super().ask(seen, instruction)

        def close(self) -> None:
            pass

    point = Point()
    found = fly(point, Pausing(), Limits(10, chunk=CHUNK))
    assert (found.late, found.answers) == (2, 2)
    np.testing.assert_array_equal(point.done[0], np.zeros(4))  # nothing was asked of the gripper yet
    np.testing.assert_array_equal(point.done[1 + CHUNK], [0, 0, 0, 0.7])
    np.testing.assert_array_equal(found.positions[2 + CHUNK], found.positions[1 + CHUNK])
    assert len(point.done) == 10


def test_edited_tokens_are_counted() -> None:
    assert fly(Point(), Guide({"up": 0.0}), Limits(8)).edited == 2 * 5
    assert fly(Point(), Guide(), Limits(8)).edited == 0


def test_a_film_has_a_frame_for_each_step() -> None:
    assert len(fly(Point(), Guide(), Limits(7), film=True).frames) == 7
    assert not fly(Point(), Guide(), Limits(7)).frames


@pytest.mark.parametrize("bad", [np.zeros((0, 4)), np.zeros((2, 3)), np.zeros(4), np.full((1, 4), np.nan)])
def test_actions_of_another_robot_are_refused(bad: np.ndarray) -> None:
    class Foreign(Guide):
        def ask(self, seen: Seen, instruction: str) -> Actions:
            return Actions(bad, {"strays": 0})

    point = Point()
    with pytest.raises(ValueError, match=r"actions must be finite, \[n, 4\] for point"):
        fly(point, Foreign(), Limits(4))
    assert not point.done
