"""Activations that take more than one product: TopK, matching pursuit, and inputs normalised token by token.

A plan names the dictionary by its content and stays small; the engine's workers open it in their own store and hold
its encoder in memory for as long as a plan uses it (`server/engine/encoders.py`). What one token costs is
:meth:`FeatureEncode.cost`.

A token's activations are the same, to the bit, whatever it is encoded beside and in however many parts: those that are
asked for are exact sums (`steering/exact.py`). Which features are among the k largest, or the largest of a pursuit, is
first looked up in a plain product; what that leaves open, by the bound on its error, the exact sums of the few features
in question decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from steersman.steering import dictionaries
from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.errors import AssetCorrupt
from steersman.steering.exact import PART, Products
from steersman.steering.pursuit import pursue
from steersman.steering.rows import RowFile, take

AT_ONCE: Final = 1 << 25  # activations in memory, of a part of the tokens


@dataclass(frozen=True)
class Encoder:
    """The encoders of some features of a dictionary, or of all, in memory."""

    meta: DictionaryMeta
    tensors: Mapping[str, Tensor]  # a row or a number for each of the features, and b_dec

    @classmethod
    def of(cls, asset: Asset, indices: Sequence[int] | None = None, device: torch.device | str = "cpu") -> Encoder:
        """Of these features, or of all. Raises AssetCorrupt for numbers that are not finite."""
        meta = dictionaries.dictionary(asset)
        found = {}
        for name in dictionaries.encoder_tensors(meta):
            whole = name == "b_dec" or indices is None
            tensor = asset.tensors[name] if whole else take(asset.tensors, name, indices or ())
            if not all(torch.isfinite(part).all() for part in tensor.split(PART)):
                raise AssetCorrupt(f"{asset.ref}: {name} holds NaN or infinity")
            found[name] = tensor.to(device)
        return cls(meta, found)

    @cached_property
    def products(self) -> Products:
        return Products(self.tensors[dictionaries.encoder_tensors(self.meta)[0]])

    def __call__(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """[n, k] float32, the activations of the features of these ``rows`` for x [n, d], each row of x by itself."""
        z = dictionaries.encoder_input(self.meta, self.tensors, x)
        at_once = max(AT_ONCE // len(self.products.rows), 1)
        chosen = torch.as_tensor(rows, device=z.device)
        if self.meta.architecture == "matching_pursuit":
            return torch.cat([pursue(part, self.products, self.meta)[:, chosen] for part in z.split(at_once)])
        numbers = {
            name: tensor[chosen] for name, tensor in self.tensors.items() if tensor.dim() == 1 and name != "b_dec"
        }
        found = dictionaries.activated(self.meta, numbers, self.products.dots(z, chosen))
        if self.meta.architecture == "topk":
            in_question = torch.nonzero((found > 0).any(dim=1))[:, 0]  # no other row has what could be chosen
            for part in in_question.split(at_once):
                found[part] *= self._among_largest(z[part], found[part], chosen)
        return found.float()

    def _among_largest(self, z: Tensor, found: Tensor, chosen: Tensor) -> Tensor:
        """[n, len(chosen)] whether they are among the k largest of all, given their own ``found`` [n, len(chosen)]."""
        assert self.meta.k is not None
        bias = self.tensors["b_enc"]
        p, bound = self.products.fast(z, bias)
        last = p.topk(min(self.meta.k, p.shape[1]), dim=1).values.amin(dim=1).double()
        sure = found > (last + bound)[:, None]
        for row in torch.nonzero(((found > 0) & ((found - last[:, None]).abs() <= bound[:, None])).any(dim=1))[:, 0]:
            beyond = p[row].double() - last[row]
            inside, close = beyond > 2 * bound[row], torch.nonzero(beyond.abs() <= 2 * bound[row])[:, 0]
            exact = self.products.dots(z[row][None], close)[0] + bias[close].double()
            order = exact.sort(descending=True, stable=True).indices  # of equal ones the first
            inside[close[order[: min(self.meta.k, len(inside)) - int(inside.sum())]]] = True
            sure[row] = inside[chosen]
        return sure


@dataclass
class FeatureEncode:
    """The activations of some features: what :class:`~steersman.kernels.program.Block` calls ``encode``."""

    ref: str  # name@version
    sha256: str  # of the dictionary's content
    indices: tuple[int, ...]
    whole: bool  # whether it takes all the dictionary's features
    features: int  # that it takes
    width: int  # of what it reads
    rounds: int  # products with all these features, at most
    nbytes: int  # of the encoder, in the dictionary's own dtype
    encoder: Encoder | None = field(default=None, compare=False, repr=False)  # None: not loaded here

    @classmethod
    def of(cls, asset: Asset, indices: Sequence[int]) -> FeatureEncode:
        """For a dictionary that `dictionaries.takes_encode`; not loaded yet."""
        meta = dictionaries.dictionary(asset)
        features, width = asset.shapes["decoder"]
        whole = dictionaries.takes_all(meta)
        taken = features if whole else len(indices)
        rounds = (meta.max_iterations or width) if meta.architecture == "matching_pursuit" else 1
        nbytes = sum(
            _nbytes(asset, name) * (1 if name == "b_dec" else taken) // (1 if name == "b_dec" else features)
            for name in dictionaries.encoder_tensors(meta)
        )
        return cls(asset.ref, asset.sha256, tuple(indices), whole, taken, width, rounds, nbytes)

    @property
    def key(self) -> tuple[object, ...]:
        """What is held for it: the same for encodes that share an encoder."""
        return (self.sha256, *(() if self.whole else self.indices))

    def plus(self, other: FeatureEncode) -> FeatureEncode:
        """Both in one, of the same dictionary."""
        indices = (*self.indices, *other.indices)
        if self.whole:
            return replace(self, indices=indices)
        return replace(self, indices=indices, features=len(indices), nbytes=self.nbytes + other.nbytes)

    def load(self, asset: Asset, device: torch.device) -> Encoder:
        return Encoder.of(asset, None if self.whole else self.indices, device)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, k] float32 for x [n, d]."""
        if self.encoder is None:
            raise RuntimeError(f"the encoder of {self.ref} has not been loaded")
        return self.encoder(x, self.indices if self.whole else range(len(self.indices)))

    def cost(self) -> dict[str, Any]:
        """What it takes, as answers say it."""
        return {
            "dictionary": self.ref,
            "features": self.features,
            "multiply_adds_per_token": self.rounds * self.features * self.width,
            "bytes_per_worker": self.nbytes,
        }

    def to_json(self) -> list[Any]:
        sizes = [self.whole, self.features, self.width, self.rounds, self.nbytes]
        return [self.ref, self.sha256, list(self.indices), *sizes]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> FeatureEncode:
        ref, sha256, indices, *sizes = data
        return cls(ref, sha256, tuple(indices), *sizes)


def _nbytes(asset: Asset, name: str) -> int:
    tensors = asset.tensors
    dtype = tensors.specs[name].dtype if isinstance(tensors, RowFile) else tensors[name].dtype
    return math.prod(asset.shapes[name]) * int(dtype.itemsize)
