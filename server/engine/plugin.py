"""The ``vllm.general_plugins`` entry point: it runs in every process of vLLM, perhaps more than once.

It replaces a handful of methods by wrappers that call the original; each module it calls states the contract it
relies on. Nothing changes for requests without steering.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

RPC_METHODS = ("model", "load_plan", "reports", "stats")
"""Methods of ``WorkerSteering`` that ``collective_rpc`` reaches by ``steersman_<name>``."""


def register() -> None:
    """Patches vLLM for steering. Does nothing the second time."""
    from steersman.server.engine import cache, intake

    cache.patch()
    intake.patch()
    _patch_worker()


def _patch_worker() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker, "steersman_model"):
        return
    load_model = Worker.load_model

    @functools.wraps(load_model)
    def load_and_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        from steersman.server.engine.worker import WorkerSteering

        load_model(self, *args, **kwargs)
        self.steersman = WorkerSteering(self)

    Worker.load_model = load_and_hook
    for name in RPC_METHODS:
        setattr(Worker, f"steersman_{name}", _forward_to(name))


def _forward_to(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        return getattr(self.steersman, name)(*args)

    call.__name__ = f"steersman_{name}"
    return call
