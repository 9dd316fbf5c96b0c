"""Meta-World's tasks of the Sawyer arm (extra ``robots``), rendered off screen.

An action is (dx, dy, dz, gripper): motions of the hand in [-1, 1], 1 a command of one centimetre, and the fingers'
effort. The state is the place of the tool's centre between the fingers (m) and their opening (0 to 1).
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from steersman.clients.simulators.simulator import Floats, Measured, Picture, Seen

SIZE = 64  # pixels, of the policy's pictures
FILM = 240  # pixels, of those for people


@dataclass(frozen=True)
class View:
    """A camera on a sphere around the workspace, angles in degrees, distance in metres."""

    azimuth: float
    elevation: float
    distance: float


REACH_GAIN = 5.0  # commands for each metre of error, so that 20 cm and more are full speed
CENTRE = (0.0, 0.75, 0.17)  # metres
VIEWS = {"side": View(180, -25, 0.85), "top": View(90, -89, 0.9)}  # one sees y and height, the other x and y
FILM_VIEW = View(-140, -25, 1.1)
INSTRUCTIONS = {
    "reach-v3": "reach the red ball",
    "push-v3": "push the puck to the goal",
    "drawer-open-v3": "open the drawer",
}
TASKS = tuple(INSTRUCTIONS)


class MetaWorld:
    """One task. ``moves`` and the rest are as ``simulator.Simulator`` says."""

    moves = np.array([True, True, True, False])

    def __init__(self, task: str) -> None:
        """Raises ValueError for a task that is none of ``TASKS``, ImportError where Meta-World is not installed."""
        if task not in INSTRUCTIONS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
        if sys.platform == "linux":  # without a screen; mujoco reads it when it is imported
            os.environ.setdefault("MUJOCO_GL", "egl")
        with suppress(ImportError):
            importlib.import_module("triton")  # after Mesa's LLVM, which the first picture loads, it ends the process
        try:
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            raise ImportError(f"Meta-World is missing ({error}): pip install 'steersman[robots]'") from None
        self.name, self.instruction = task, INSTRUCTIONS[task]
        self._mujoco = mujoco
        self._env: Any = ALL_V3_ENVIRONMENTS[task]()
        self._env._set_task_called = True  # tasks are drawn by seed below, not from Meta-World's own lists
        self._env._freeze_rand_vec = False
        self._env._partially_observable = False
        self._env.seeded_rand_vec = True
        self._env.max_path_length = sys.maxsize
        self.seconds = float(self._env.dt)
        _plain(self._env.model)
        self._eyes = {size: mujoco.Renderer(self._env.model, size, size) for size in (SIZE, FILM)}
        for eye in self._eyes.values():
            atexit.register(eye.close)  # left to the interpreter's end, they complain
        self._measured: Measured | None = None
        scripts: Any = ENV_POLICY_MAP
        self._script: Any = None if task == "reach-v3" else scripts[task]()

    def reset(self, seed: int) -> None:
        self._env.seed(seed)
        self._env.reset()
        self._mujoco.mj_forward(self._env.model, self._env.data)  # or the goal is drawn where it was before
        self._look(self._env._get_obs(), np.zeros(4))

    def observe(self) -> Seen:
        pictures = {name: self._render(SIZE, view) for name, view in VIEWS.items()}
        opening = self._env._get_curr_obs_combined_no_goal()[3]
        return Seen(pictures, np.array([*self._env.tcp_center, opening], np.float64))

    def act(self, action: Floats) -> None:
        asked = np.clip(np.asarray(action, np.float64), -1, 1)
        self._look(self._env.step(asked)[0], asked)

    def measure(self) -> Measured:
        assert self._measured is not None, "reset comes first"
        return self._measured

    def film(self) -> Picture:
        return self._render(FILM, FILM_VIEW)

    def expert(self) -> Floats:
        """[4], what a scripted expert does here, who knows where everything is.

        For reach-v3 it is our own, which brings the tool's centre to the goal: Meta-World's brings the hand's body
        there, and the tool stops half a centimetre short of missing.
        """
        if self._script is None:
            error = np.array(self._env._target_pos) - self._env.tcp_center
            return np.append(np.clip(REACH_GAIN * error, -1, 1), 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says at every step that its actions will be clipped
            asked = self._script.get_action(self._env._get_obs())
        return np.clip(np.asarray(asked, np.float64), -1, 1)

    def _look(self, observation: Floats, action: Floats) -> None:
        found = self._env.evaluate_state(observation, action)[1]
        place = np.array(self._env.tcp_center, np.float64)
        self._measured = Measured(place, float(found["obj_to_target"]), bool(found["success"]))

    def _render(self, size: int, view: View) -> Picture:
        camera = self._mujoco.MjvCamera()
        camera.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        camera.azimuth, camera.elevation, camera.distance = view.azimuth, view.elevation, view.distance
        camera.lookat[:] = CENTRE
        eye = self._eyes[size]
        eye.update_scene(self._env.data, camera)
        picture: Picture = eye.render()
        return picture.copy()


def _plain(model: Any) -> None:
    """Without shadows and reflections, which are nine tenths of the time that a software renderer takes."""
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
