"""Activations that take a dictionary's whole encoder: TopK, matching pursuit, and inputs normalised token by token.

A plan names the dictionary by its content and stays small; the engine's workers open it in their own store and hold
its encoder in memory for as long as a plan uses it (`server/engine/encoders.py`). What one token costs is
:meth:`FeatureEncode.cost`. The activations of all rows of a pass that share a plan come out of one matrix product, so a
TopK feature within rounding of the k-th largest may be in or out depending on how many rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steersman.steering import dictionaries
from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.rows import RowFile


@dataclass(frozen=True)
class Encoder:
    """A dictionary's encoder, in memory."""

    meta: DictionaryMeta
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, asset: Asset) -> Encoder:
        meta = dictionaries.dictionary(asset)
        return cls(meta, {name: asset.tensors[name] for name in dictionaries.encoder_tensors(meta)})


@dataclass
class FeatureEncode:
    """The activations of some features: what :class:`~steersman.kernels.program.Block` calls ``encode``."""

    ref: str  # name@version
    sha256: str  # of the dictionary's content
    indices: tuple[int, ...]
    features: int  # of the dictionary
    width: int  # of what it reads
    rounds: int  # products with all the features, at most
    nbytes: int  # of the encoder, in the dictionary's own dtype
    encoder: Encoder | None = field(default=None, compare=False, repr=False)  # None: not loaded here

    @classmethod
    def of(cls, asset: Asset, indices: Sequence[int]) -> FeatureEncode:
        """For a dictionary that `dictionaries.takes_all`; not loaded yet."""
        meta = dictionaries.dictionary(asset)
        features, width = asset.shapes["decoder"]
        rounds = (meta.max_iterations or width) if meta.architecture == "matching_pursuit" else 1
        nbytes = sum(_nbytes(asset, name) for name in dictionaries.encoder_tensors(meta))
        return cls(asset.ref, asset.sha256, tuple(indices), features, width, rounds, nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, k] float32 for x [n, d]."""
        if self.encoder is None:
            raise RuntimeError(f"the encoder of {self.ref} has not been loaded")
        found = dictionaries.activations(self.encoder.meta, self.encoder.tensors, self.features, x)
        return found[:, list(self.indices)]

    def cost(self) -> dict[str, Any]:
        """What it takes, as answers say it."""
        return {
            "dictionary": self.ref,
            "features": self.features,
            "multiply_adds_per_token": self.rounds * self.features * self.width,
            "bytes_per_worker": self.nbytes,
        }

    def to_json(self) -> list[Any]:
        return [self.ref, self.sha256, list(self.indices), self.features, self.width, self.rounds, self.nbytes]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> FeatureEncode:
        ref, sha256, indices, *sizes = data
        return cls(ref, sha256, tuple(indices), *sizes)


def _nbytes(asset: Asset, name: str) -> int:
    tensors = asset.tensors
    dtype = tensors.specs[name].dtype if isinstance(tensors, RowFile) else tensors[name].dtype
    return math.prod(asset.shapes[name]) * int(dtype.itemsize)
