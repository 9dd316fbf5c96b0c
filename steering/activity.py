"""Which features of a dictionary are most active on a few tokens, in bounded memory however many features there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.dictionaries import activations, dictionary, encoder_tensors
from steersman.steering.errors import AssetCorrupt, FeatureUnreadable
from steersman.steering.rows import take

FEATURES: Final = 4096  # whose encoder is in memory at once
TOKENS: Final = 1024  # whose activations of these features are in memory at once
MAX_WHOLE: Final = 1 << 30  # bytes of a dictionary that cannot be taken in parts


def most_active(asset: Asset, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """([n, k] int64, [n, k] float32): of each row of x [n, d] the features of the largest activations, largest first.

    k is ``count``, or less where there are not so many features or not so many stay active (topk). Of a ``linear``
    dictionary, whose activations may be negative, the largest in size. A feature of activation 0 may be among them: it
    is not active.
    Raises FeatureUnreadable for directions without an encoder, and where the encoder must be in memory as a whole and
    is too large for that; AssetCorrupt for numbers that are not finite.
    """
    meta = dictionary(asset)
    if meta.architecture == "basis":
        raise FeatureUnreadable(f"{asset.ref} has directions only and no encoder")
    features, width = asset.shapes["decoder"]
    count, at_once = min(count, features, meta.k or features), FEATURES
    if meta.architecture == "matching_pursuit":  # each feature's activation depends on all the others
        if 4 * features * width > MAX_WHOLE:
            raise FeatureUnreadable(f"{asset.ref} pursues {features} features at once, too many to encode here")
        at_once = features
    best = torch.zeros(len(x), count)
    index = torch.zeros(len(x), count, dtype=torch.int64)
    for first in range(0, features, at_once):
        part = range(first, min(first + at_once, features))
        tensors = _part(asset, meta, part)
        step = max(TOKENS * FEATURES // len(part), 1)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            found = activations(meta, tensors, len(part), x[rows])
            if not torch.isfinite(found).all():
                raise AssetCorrupt(f"{asset.ref}: its encoder gives NaN or infinity")
            values = torch.cat([best[rows], found], dim=1)
            numbers = torch.cat([index[rows], torch.arange(part.start, part.stop).expand(len(found), -1)], dim=1)
            chosen = values.abs().topk(count, dim=1).indices
            best[rows], index[rows] = values.gather(1, chosen), numbers.gather(1, chosen)
    return index, best


def _part(asset: Asset, meta: DictionaryMeta, part: range) -> Mapping[str, Tensor]:
    """What encoding needs, of these features alone. Of topk, the k largest of all are among the k of their parts."""
    try:
        return {
            name: asset.tensors[name] if name == "b_dec" else take(asset.tensors, name, part)
            for name in encoder_tensors(meta)
        }
    except OSError as error:
        raise AssetCorrupt(f"{asset.ref}: its encoder cannot be read: {error}") from error
