"""Making a ``baseline`` asset: which norms are usual at each layer, from what known-good traffic showed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from steersman.kernels.moments import Moments
from steersman.steering.asset_fields import ModelRef
from steersman.steering.assets import Asset
from steersman.steering.detectors import BaselineMeta
from steersman.steering.errors import InvalidRequest

MIN_TOKENS: Final = 1000
"""Fewer sampled tokens at a layer say too little of how its norms spread."""


def seen_between(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]], n_layers: int) -> Moments:
    """What all workers have seen between two readings of ``GET /v1/steering/norms``; a new one, all that it has."""
    known = {str(w["worker"]): Moments.from_json(w) for w in before}
    total = Moments.none(n_layers)
    for worker in after:
        now = Moments.from_json(worker)
        total = total.plus(now.since(known.get(str(worker["worker"]), Moments.none(n_layers))))
    return total


def make_baseline(name: str, model: ModelRef, seen: Moments, description: str = "") -> Asset:
    """The asset. Raises InvalidRequest where a layer was seen too seldom or does not vary."""
    few = [i for i, n in enumerate(seen.count) if n < MIN_TOKENS]
    if few:
        raise InvalidRequest(
            f"layer {few[0]} was seen in {int(seen.count[few[0]])} tokens, wanted: at least {MIN_TOKENS}; send more, "
            "or let statistics look at more passes (--steering-monitor-sample 1)",
            "counts",
        )
    flat = [i for i, d in enumerate(seen.deviation) if not d > 0]
    if flat:
        raise InvalidRequest(f"all norms at layer {flat[0]} are the same: nothing can be usual there", "deviation")
    meta = BaselineMeta(
        name=name,
        kind="baseline",
        model=model,
        description=description,
        counts=tuple(int(n) for n in seen.count),
        mean=tuple(seen.mean.tolist()),
        deviation=tuple(seen.deviation.tolist()),
    )
    return Asset(meta)
