"""The real Meta-World, where it is installed (extra ``robots``)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from steersman.clients.simulators import metaworld
from steersman.clients.simulators.metaworld import SIZE, TASKS, VIEWS, MetaWorld

if find_spec("metaworld") is None:
    pytest.skip("Meta-World is not installed: pip install 'steersman[robots]'", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=TASKS)
def robot(request: pytest.FixtureRequest) -> Iterator[MetaWorld]:
    return MetaWorld(request.param)


@pytest.fixture(scope="module")
def reach() -> MetaWorld:
    return MetaWorld("reach-v3")


def test_a_seed_is_an_episode(robot: MetaWorld) -> None:
    seen = []
    for seed in (7, 8, 7):
        robot.reset(seed)
        for _ in range(3):
            robot.act(robot.expert())
        seen.append((robot.observe(), robot.measure()))
    (first, measured), (other, _), (again, again_measured) = seen
    np.testing.assert_allclose(first.state, again.state, atol=1e-9)
    np.testing.assert_allclose(measured.position, again_measured.position, atol=1e-9)
    assert np.abs(first.pictures["top"].astype(int) - again.pictures["top"]).max() <= 1
    assert any((first.pictures[view] != other.pictures[view]).any() for view in VIEWS)


def test_the_expert_succeeds(robot: MetaWorld) -> None:
    succeeded = 0
    for seed in range(3):
        robot.reset(seed)
        for _ in range(150):
            robot.act(robot.expert())
            if robot.measure().success:
                succeeded += 1
                break
    assert succeeded >= 2, "Meta-World's own experts fail now and then"


def test_what_a_policy_sees(reach: MetaWorld) -> None:
    reach.reset(0)
    seen = reach.observe()
    assert list(seen.pictures) == list(VIEWS)
    assert all(p.shape == (SIZE, SIZE, 3) and p.dtype == np.uint8 for p in seen.pictures.values())
    np.testing.assert_array_equal(seen.state[:3], reach.measure().position)
    assert reach.film().shape == (metaworld.FILM, metaworld.FILM, 3)


def test_the_goal_can_be_told_from_the_pictures(reach: MetaWorld) -> None:
    """Without it no policy could succeed: where the ball's pixels are gives its place, linearly, to two centimetres."""
    places, goals = [], []
    for seed in range(30):
        reach.reset(seed)
        pictures = reach.observe().pictures
        places.append([*_ball(pictures["side"], 32), *_ball(pictures["top"], 0, 36), 1.0])
        goals.append(reach._env._target_pos)
    a, b = np.array(places), np.array(goals)
    fitted = np.linalg.lstsq(a[:20], b[:20], rcond=None)[0]
    assert np.abs(a[20:] @ fitted - b[20:]).max() < 0.02


def _ball(picture: np.ndarray, left: int, bottom: int = SIZE) -> np.ndarray:
    """The centre of what is bright red, right of ``left`` and above ``bottom``, where the arm is not at the start."""
    x = picture.astype(int)
    red = (x[..., 0] > 170) & (x[..., 1] < 60) & (x[..., 2] < 60)
    red[:, :left] = False
    red[bottom:] = False
    assert red.any(), "the ball is not to be seen"
    return np.argwhere(red).mean(axis=0)


def test_the_axes_are_the_hands(reach: MetaWorld) -> None:
    for axis in range(3):
        reach.reset(1)
        before = reach.measure().position
        for _ in range(10):
            reach.act(np.eye(4)[axis])
        moved = reach.measure().position - before
        assert moved[axis] > 0.04
        assert np.abs(np.delete(moved, axis)).max() < 0.02


def test_it_renders_beside_triton_and_leaves_quietly() -> None:
    """Where Mesa's LLVM is loaded before Triton's, the process dies."""
    code = (
        "from steersman.clients.simulators.metaworld import MetaWorld\n"
        "robot = MetaWorld('reach-v3'); robot.reset(0); robot.observe(); robot.film()\n"
        "import torch._dynamo"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "Exception ignored" in done.stderr) == (0, False), done.stderr


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"reach-v3.*not 'dance'"):
        MetaWorld("dance")
