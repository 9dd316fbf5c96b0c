"""A stored vector in plain arrays: its rows, random directions as long as they are, and a new version of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.clients.calibration_rules import CalibrationError

Row = NDArray[np.float32]  # [d]


@dataclass(frozen=True)
class VectorAsset:
    ref: str  # name@version
    whole: Mapping[str, Any]  # the asset as JSON
    rows: Mapping[int, Row]  # by layer

    @classmethod
    def of(cls, ref: str, whole: Mapping[str, Any]) -> VectorAsset:
        """Raises CalibrationError unless it is of kind vector, with one direction per layer."""
        if whole["kind"] != "vector":
            raise CalibrationError(f"{ref} is of kind {whole['kind']}; wanted: vector", "vector")
        array = decode(whole["tensors"]["vectors"])
        if array.ndim != 2:
            message = f"{ref} is a subspace of {array.shape[1]} directions; wanted: one per layer"
            raise CalibrationError(message, "vector")
        return cls(ref, whole, dict(zip(whole["layers"], array, strict=True)))

    def edit(self, layer: int, scale: float) -> dict[str, Any]:
        """The intervention that adds it at one layer."""
        return {"op": "add", "vector": self.ref, "layers": [layer], "scale": scale}

    def random_edit(self, layer: int, scale: float, seed: int) -> dict[str, Any]:
        """The same with a direction drawn from all, each as likely, of the norm that the vector has there."""
        row = self.rows[layer]
        drawn = np.random.default_rng([seed, layer]).standard_normal(len(row))
        drawn *= np.linalg.norm(row.astype(np.float64)) / np.linalg.norm(drawn)
        vector = {"inline": {**encode(drawn[None].astype(np.float32)), "layers": [layer]}}
        return {**self.edit(layer, scale), "vector": vector, "site": self.whole["site"]}

    def recommending(
        self, layer: int, scale: float, how: str, evidence: Mapping[str, Any], under: str = "calibration"
    ) -> dict[str, Any]:
        """A new version, as JSON: this layer alone, with the scale and how it was found."""
        return {
            **self.whole,
            "layers": [layer],
            "recommended": {"scale": scale, "how": how},
            "provenance": {**self.whole.get("provenance", {}), under: dict(evidence)},
            "tensors": {"vectors": encode(self.rows[layer][None])},
        }


def encode(array: Row) -> dict[str, Any]:
    data = np.ascontiguousarray(array, "<f4").tobytes()
    return {"dtype": "float32", "shape": [*array.shape], "data": base64.b64encode(data).decode()}


def decode(tensor: Mapping[str, Any]) -> NDArray[np.float32]:
    """A tensor of an asset's JSON form, in float32."""
    raw = base64.b64decode(tensor["data"])
    if tensor["dtype"] == "bfloat16":  # the upper half of a float32
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        array = wide.view(np.float32)
    else:
        array = np.frombuffer(raw, {"float32": "<f4", "float16": "<f2"}[tensor["dtype"]]).astype(np.float32)
    return array.reshape(tensor["shape"])
