"""A small model, and assets and inline vectors for it."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.steering import spec
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.directions import Library
from steersman.steering.errors import UnknownAsset
from steersman.steering.plan import Plan
from steersman.steering.resolve import Resolver
from steersman.steering.sites import ModelInfo, Site

LAYERS, D, HEADS, D_HEAD, D_FF = 4, 8, 2, 6, 20
WIDTHS = dict.fromkeys(Site, D) | {Site.ATTN_Z: HEADS * D_HEAD, Site.MLP_POST: D_FF}
MODEL = ModelInfo(
    "org/Tiny",
    "TinyForCausalLM",
    LAYERS,
    D,
    HEADS,
    D_HEAD,
    {site: dict.fromkeys(range(LAYERS), width) for site, width in WIDTHS.items()},
)
REF = {"id": "org/tiny", "n_layers": LAYERS, "d_model": D}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def asset(name: str, kind: str, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> Asset:
    return Asset(parse_metadata({"name": name, "kind": kind, "model": REF, **fields}), tensors or {})


def vector(name: str, vectors: Tensor, layers: Sequence[int], **fields: Any) -> Asset:
    return asset(name, "vector", {"vectors": vectors}, layers=list(layers), **fields)


def inline(
    vectors: Tensor, layers: Sequence[int] | None = None, dtype: str = "float32", **fields: Any
) -> dict[str, Any]:
    data = vectors.to(getattr(torch, dtype)).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    about: dict[str, Any] = {"dtype": dtype, "shape": list(vectors.shape), "data": base64.b64encode(data).decode()}
    if layers is not None:
        about["layers"] = list(layers)
    return {"inline": {**about, **fields}}


class Shelf:
    """Assets by name, the one added last; for what has nothing to do with the store."""

    def __init__(self, *assets: Asset) -> None:
        self.assets = {a.name: a for a in assets}

    def get(self, ref: str) -> Asset:
        if ref not in self.assets:
            raise UnknownAsset(f"no asset '{ref}'")
        return self.assets[ref]


def resolve(data: object, *assets: Asset, model: ModelInfo = MODEL) -> Plan:
    return Resolver(Library(Shelf(*assets), model)).resolve(spec.parse(data))


def plan_of(*interventions: Mapping[str, Any], model: ModelInfo = MODEL, **fields: Any) -> Plan:
    return resolve({"interventions": list(interventions), **fields}, model=model)
