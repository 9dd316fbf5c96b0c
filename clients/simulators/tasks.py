"""The tasks of every simulator, by name."""

from __future__ import annotations

from steersman.clients.simulators import libero, metaworld
from steersman.clients.simulators.simulator import Simulator

KNOWN = (*metaworld.TASKS, *(f"{suite}/N" for suite in libero.SUITES))
"""For help texts; N is a task's number."""


def named(task: str) -> str:
    """The same. Raises ValueError for what cannot be a task's name."""
    suite, _, number = task.partition("/")
    if task in metaworld.TASKS or (suite in libero.SUITES and number.isdecimal()):
        return task
    raise ValueError(f"must be one of {', '.join(KNOWN)}, N a number; not {task!r}")


def make(task: str, *, openvla_gripper: bool = False) -> Simulator:
    """Raises ValueError for a task that there is not, ImportError where its simulator is not installed."""
    if named(task) not in metaworld.TASKS:
        return libero.Libero(task, openvla_gripper=openvla_gripper)
    if openvla_gripper:
        raise ValueError("OpenVLA's gripper is translated for LIBERO's tasks alone")
    return metaworld.MetaWorld(task)
