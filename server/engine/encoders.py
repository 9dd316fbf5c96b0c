"""Dictionaries' encoders on a worker, for plans whose features take the whole of one.

A worker opens the store that it is told of as the HTTP process is; over several machines that must be a shared one.
On a GPU, and where tensor-parallel ranks hold a part of a site each, such plans are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from weakref import WeakValueDictionary

from steersman.steering.assets import Asset
from steersman.steering.encoders import Encoder
from steersman.steering.errors import AssetCorrupt, FeatureUnreadable
from steersman.steering.plan import Place, Plan


class Encoders:
    """Encoders by their dictionary's content; each is held while a plan that it was given to is."""

    def __init__(self, get: Callable[[str], Asset], shards: Collection[Place], on_cpu: bool) -> None:
        """``get``: opens an asset by its ref. ``shards``: places of which this rank has a part."""
        self._get = get
        self._shards = shards
        self._on_cpu = on_cpu
        self._held: WeakValueDictionary[str, Encoder] = WeakValueDictionary()

    def load(self, plan: Plan) -> None:
        """Gives the plan's features their encoders. Raises what the store raises, and FeatureUnreadable."""
        for place, encode in plan.encodes:
            where = f"{encode.ref} takes its whole encoder for every token"
            if not self._on_cpu:
                raise FeatureUnreadable(f'{where}, which only the CPU engine does; mode "add" needs none')
            if place in self._shards:
                raise FeatureUnreadable(f"{where}, and each tensor-parallel rank has a part of {place.site.value}")
            encoder = self._held.get(encode.sha256)
            if encoder is None:
                asset = self._get(encode.ref)
                if asset.sha256 != encode.sha256:
                    raise AssetCorrupt(f"{encode.ref} is another dictionary in the worker's store")
                encoder = self._held[encode.sha256] = Encoder.of(asset)
            encode.encoder = encoder
