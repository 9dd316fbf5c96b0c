"""Which kernel edits rows on a device.

``STEERSMAN_KERNEL``: ``auto`` (the fastest that works there), ``cuda``, ``triton``, or ``host``: none, plain torch
between the layers, which no CUDA graph can hold.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import torch

logger = logging.getLogger(__name__)

VARIABLE = "STEERSMAN_KERNEL"
BY_SPEED = ("cuda", "triton")
"""In the order in which ``auto`` tries them."""


def choose(device: torch.device, asked: str | None = None, width: int = 1) -> Any | None:
    """The ``edit`` function for ``device``; None for ``host``, and on a CPU, which has kernels of its own.

    width: of the widest rows that it will be given.
    Raises ValueError for an unknown name and RuntimeError when a kernel was asked for by name and does not work.
    """
    asked = asked or os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", "host", *BY_SPEED):
        raise ValueError(f"{VARIABLE}={asked}: must be auto, host, {' or '.join(BY_SPEED)}")
    if asked == "host" or (device.type == "cpu" and asked == "auto"):
        return None
    failures = []
    for name in BY_SPEED if asked == "auto" else (asked,):
        try:
            return _prepared(name, device, width)
        except Exception as error:  # whatever a driver, a compiler or a missing package raises
            failures.append(f"{name}: {error}")
    if asked != "auto":
        raise RuntimeError(f"{VARIABLE}={asked} does not work on {device}: {failures[0]}")
    logger.warning("no kernel works on %s (%s); edits run on the host, without graphs", device, "; ".join(failures))
    return None


def and_norm(edit: Any) -> Any:
    """The ``edit_and_norm`` of the kernel whose ``edit`` this is."""
    return importlib.import_module(edit.__module__).edit_and_norm


def _prepared(name: str, device: torch.device, width: int) -> Any:
    module = importlib.import_module(f"steersman.kernels.{name}_edit")
    module.prepare(device, width)
    return module.edit
