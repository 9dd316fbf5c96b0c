"""What the server answers to a capture: numpy arrays of activations, and what they are of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load


@dataclass(frozen=True)
class Capture:
    about: dict[str, Any]
    """``model``, ``sites`` (the layers of each), ``reduce``, ``plan``, and ``prompts`` with their ``token_ids`` and the
    selected ``positions``."""
    arrays: dict[str, NDArray[np.float32]]
    """By name: ``{prompt}.{site}.{layer}``, or ``{site}.{layer}`` where tokens were reduced."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Capture:
        size = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["capture"])
        return cls(about, load(data))

    def rows(self, site: str, layer: int, prompt: int | None = None) -> NDArray[np.float32]:
        """[positions, width] of one prompt; without ``prompt`` [prompts, width], of a capture that was reduced."""
        return self.arrays[f"{site}.{layer}" if prompt is None else f"{prompt}.{site}.{layer}"]
