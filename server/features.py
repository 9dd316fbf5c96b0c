"""The features of a dictionary that are most active on a text, computed by the served model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from steersman.server.captures import capture
from steersman.server.state import SteeringState
from steersman.steering.activity import most_active
from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.errors import FeatureUnreadable, InvalidRequest, SteeringError, located
from steersman.steering.labels import Labels
from steersman.steering.plan import Place
from steersman.steering.sites import Site


async def active_on(state: SteeringState, ref: str, text: str, limit: int) -> dict[str, Any]:
    """At most ``limit`` features of each token of ``text``, the most active first, and of the whole text.

    The activations are those of the bare model where the dictionary reads. Raises SteeringError, whose param is ``ref``
    or ``active_on``.
    """
    with located("ref"):
        asset, meta = await asyncio.to_thread(state.frontend.resolver.library.dictionary, ref)
        place = Place(meta.layer, _site(asset, meta))
        state.frontend.model.width(place.site, place.layer)
    if state.engine is None:
        raise InvalidRequest("this server takes no activations of texts", "active_on")
    try:
        found = await capture(state, [text], [place.site], [place.layer])
    except SteeringError as error:
        error.param = "active_on"  # whatever the capture calls it
        raise
    (prompt,) = found.prompts
    x = torch.from_numpy(prompt.rows[place].copy())
    with located("ref"):
        index, values = await asyncio.to_thread(most_active, asset, x, limit)
        labels = await asyncio.to_thread(lambda: Labels(asset).of(set(index[values != 0].tolist())))
    tokenizer = state.frontend.tokenizer
    tokens = [
        {
            "position": position,
            "id": token,
            "token": str(tokenizer.decode([token], skip_special_tokens=False)),
            "features": [{**one, "label": labels.get(one["index"])} for one in _active(index[row], values[row])],
        }
        for row, (position, token) in enumerate(zip(prompt.positions, prompt.token_ids, strict=True))
    ]
    return {
        "object": "list",
        "dictionary": asset.ref,
        "layer": place.layer,
        "site": place.site.value,
        "data": _strongest(tokens, limit),
        "tokens": tokens,
    }


def _site(asset: Asset, meta: DictionaryMeta) -> Site:
    name = meta.read_site or meta.site
    if name not in list(Site):
        raise FeatureUnreadable(f"{asset.ref} reads {name}, which is no site that this server captures")
    return Site(name)


def _active(index: Tensor, values: Tensor) -> list[dict[str, Any]]:
    pairs = zip(index.tolist(), values.tolist(), strict=True)
    return [{"index": i, "activation": value} for i, value in pairs if value]


def _strongest(tokens: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The features of the largest activation at any token, with the first position of it.

    One that is not among its token's ``limit`` largest has as many others before it, so none is missed.
    """
    best: dict[int, dict[str, Any]] = {}
    for token in tokens:
        for one in token["features"]:
            known = best.get(one["index"])
            if known is None or abs(one["activation"]) > abs(known["activation"]):
                best[one["index"]] = {**one, "position": token["position"]}
    return sorted(best.values(), key=lambda one: -abs(one["activation"]))[:limit]
