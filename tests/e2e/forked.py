"""Servers forked from a process that has everything imported, so that one starts in seconds.

vLLM takes eight seconds of one core to import, and a server is three processes of which each imports it: the HTTP
server, the engine and the worker. Here a launcher, one for each run of the tests, imports it once; ``start`` forks it,
and the fork runs the ``steersman`` command as if the shell had. On the CPU vLLM says that engine and worker are to be
spawned (``CpuPlatform.check_and_update_config`` sets ``VLLM_WORKER_MULTIPROC_METHOD``); in the fork they are forked
too, as they are by default on other platforms. A model's class, at which vLLM looks in one more process
(``registry._run_in_subprocess``), is looked at in the fork.

What a process reads while it imports is the launcher's: servers whose environment matters there (``PYTHONPATH``,
``TRITON_INTERPRET``) have to be started afresh.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTED = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "steersman.server.cli",
    "steersman.server.endpoints",
    "steersman.server.engine.worker",
)


class Forked:
    """A process that the launcher has forked, with what is used here of :class:`subprocess.Popen`."""

    def __init__(self, launcher: _Launcher, pid: int) -> None:
        self.launcher, self.pid = launcher, pid
        self.returncode: int | None = None

    @classmethod
    def start(cls, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Forked:
        """Runs ``steersman ARGUMENTS`` in a process group of its own, which prints into ``log``."""
        launcher = _launcher()
        return cls(launcher, launcher.ask({"start": list(arguments), "env": dict(env), "log": str(log)}))

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.launcher.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked server", timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Launcher:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.e2e.forked", str(theirs.fileno())]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0, env=env)
        theirs.close()
        self._pipe = ours.makefile("rw")
        self._one_at_a_time = threading.Lock()
        atexit.register(process.wait)
        atexit.register(ours.close)
        atexit.register(self._pipe.close)

    def ask(self, question: Mapping[str, Any]) -> Any:
        with self._one_at_a_time:
            self._pipe.write(json.dumps(question) + "\n")
            self._pipe.flush()
            answer = self._pipe.readline()
        if not answer:
            raise RuntimeError("the launcher of servers has ended: see its error above")
        return json.loads(answer)


@cache
def _launcher() -> _Launcher:
    return _Launcher()


# -- the launcher ---------------------------------------------------------------------------------


def _serve(pipe: Any) -> int:
    """Forks until the other end is gone. Returns in a fork as well, with its exit code."""
    for line in pipe:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif answer := os.fork():
            pass
        else:
            pipe.close()
            return _run(question["start"], question["env"], question["log"])
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()
    return 0


def _run(arguments: list[str], env: Mapping[str, str], log: str) -> int:
    from steersman.server.cli import main

    os.setpgid(0, 0)
    for file, numbers, flags in ((os.devnull, (0,), os.O_RDONLY), (log, (1, 2), os.O_WRONLY | os.O_CREAT)):
        descriptor = os.open(file, flags, 0o644)
        for number in numbers:
            os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["steersman", *arguments]
    return main(arguments)


def _import_everything() -> None:
    for name in IMPORTED:
        import_module(name)
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    assert callable(registry._run_in_subprocess)
    registry._run_in_subprocess = lambda look: look()  # the subprocess is there so that CUDA is not started
    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_fork(cls: type, config: Any) -> None:
        check(cls, config)
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_fork)  # type: ignore[assignment]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket(fileno=int(sys.argv[1])).makefile("rw") as pipe:
        _import_everything()
        assert threading.active_count() == 1, threading.enumerate()
        code = _serve(pipe)
    sys.exit(code)
