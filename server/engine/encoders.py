"""Dictionaries' encoders on a worker, for plans that encode tokens.

A worker opens the store that it is told of as the HTTP process is; over several machines that must be a shared one. Of
tensor-parallel ranks each holds the encoder and encodes the whole activation, which they put together.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch

from steersman.steering.assets import Asset
from steersman.steering.encoders import Encoder
from steersman.steering.errors import AssetCorrupt
from steersman.steering.plan import Plan


class Encoders:
    """Encoders by their dictionary's content; each is held while a plan that it was given to is."""

    def __init__(self, get: Callable[[str], Asset], device: torch.device) -> None:
        """``get``: opens an asset by its ref. ``device``: where the activations are."""
        self._get = get
        self._device = device
        self._held: WeakValueDictionary[tuple[object, ...], Encoder] = WeakValueDictionary()

    def load(self, plan: Plan) -> None:
        """Gives the plan's features their encoders. Raises what the store raises."""
        for encoding in plan.encodes:
            encode = encoding.encode
            encoder = self._held.get(encode.key)
            if encoder is None:
                asset = self._get(encode.ref)
                if asset.sha256 != encode.sha256:
                    raise AssetCorrupt(f"{encode.ref} is another dictionary in the worker's store")
                encoder = self._held[encode.key] = encode.load(asset, self._device)
            encode.encoder = encoder
