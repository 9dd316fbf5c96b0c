"""The ``vllm.general_plugins`` entry point: it runs in every process of vLLM, perhaps more than once.

It replaces a handful of methods by wrappers that call the original; each module it calls states the contract it
relies on. Nothing changes for requests without steering.

torch.compile's caches are keyed by ``VllmConfig.additional_config`` and not by hooks on instances, so what our
hooks leave in a graph is written there before the model is loaded: a graph made without them, or with others, is
never taken for ours.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import steersman

RPC_METHODS = (
    "model", "load_plan", "reports", "probes", "watch", "statistics", "stats", "captured", "captured_bytes",
    "drop_captured", "norms", "baseline",
)  # fmt: skip
"""Methods of ``WorkerSteering`` that ``collective_rpc`` reaches by ``steersman_<name>``."""


def register() -> None:
    """Patches vLLM for steering. Does nothing the second time."""
    from steersman.server.engine import cache, images, intake

    cache.patch()
    images.patch()
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

        mark_graphs(self.vllm_config)
        load_model(self, *args, **kwargs)
        self.steersman = WorkerSteering(self)

    Worker.load_model = load_and_hook
    for name in RPC_METHODS:
        setattr(Worker, f"steersman_{name}", _forward_to(name))


def mark_graphs(config: Any) -> None:
    """Puts what shapes our part of a compiled graph into the configuration that compile caches are keyed by."""
    from steersman.server.settings import Settings

    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in ("hooks.py", "layers.py"))
    config.additional_config["steersman"] = {
        "version": steersman.__version__,
        "hooks": hashlib.sha256(code).hexdigest(),
        "sites": sorted(Settings.from_env().hooked_sites),
    }


def mark_norms(config: Any, norms: list[list[str]]) -> None:
    """The same for the norms that the kernel makes in all passes, by the places before them; known after loading."""
    config.additional_config["steersman"]["norms"] = norms


def _forward_to(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        return getattr(self.steersman, name)(*args)

    call.__name__ = f"steersman_{name}"
    return call
