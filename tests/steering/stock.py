"""A store of assets for the small model, good ones and bad ones."""

from pathlib import Path
from typing import Any

import torch

from steersman.steering import spec
from steersman.steering.assets import Asset
from steersman.steering.plan import Plan
from steersman.steering.resolve import Resolver
from steersman.steering.store import Store
from tests.steering.library import D_FF, LAYERS, D, asset, noise, vector

AFFINE = {"R": noise(2, 3, D), "A": noise(2, 3, D, seed=1), "b": noise(2, 3)}
STORED = (
    vector("v", noise(2, D), [1, 3], recommended={"scale": 6.0}, tokens={"generated": True, "last": 1}),
    vector("plane", noise(2, 2, D), [1, 3]),
    vector("zero", torch.zeros(2, D), [1, 3]),
    vector("mid", noise(LAYERS, D), range(LAYERS), site="resid_mid"),
    vector("wide", noise(1, D_FF), [1], site="mlp_post"),
    vector("huge", torch.full((1, D), 3e38), [1]),
    vector("odd-tokens", noise(1, D), [1], tokens={"nearby": 3}),
    asset("cluster", "neurons", neurons=[[1, 3], [1, 19], [2, 0]], tokens="generated"),
    asset("far", "neurons", neurons=[[1, D_FF]]),
    asset("map", "affine", AFFINE, layers=[0, 2], tokens="prompt"),
    asset("wide-map", "affine", {k: v[:1] for k, v in AFFINE.items()}, layers=[1], site="attn_z"),
    asset("calm", "profile", steering={"interventions": [{"op": "add", "vector": "v", "scale": 2}]}),
    asset("nested", "profile", steering={"profile": "calm"}),
    asset("broken", "profile", steering={"interventions": [{"op": "add", "vector": "v", "scale": "2"}]}),
    asset("many", "profile", steering={"interventions": [{"op": "add", "vector": "v"}] * 60}),
    asset("stale", "profile", steering={"interventions": [{"op": "add", "vector": "gone"}]}),
)


def foreign(name: str, **model: Any) -> Asset:
    """A vector made for another model."""
    own = vector(name, noise(1, D), [1])
    return Asset(own.meta.model_copy(update={"model": own.meta.model.model_copy(update=model)}), own.tensors)


def stock(folder: Path, *more: Asset) -> Store:
    store = Store(folder)
    for each in (*STORED, *more):
        store.add(each)
    return store


def solve(resolver: Resolver, *interventions: dict[str, Any], **fields: Any) -> Plan:
    return resolver.resolve(spec.parse({"interventions": list(interventions), **fields}))
