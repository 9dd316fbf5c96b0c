"""Wrapping a model's layers so that a :class:`~steersman.server.engine.runtime.Runtime` sees every site.

``forward`` of a decoder layer, and of the few children that make or read a site, is replaced on the
instance, after the weights are loaded and before anything is traced. Traced by torch.compile, a wrapper leaves one
call of the custom op ``steersman::edit`` per site, which writes into the activation and is opaque to the compiler.

The contract with vLLM and torch: modules call ``self.forward``, which may be set on an instance; the
activation that a hook receives is not read again in its old form by anybody else. From 0.32 a layer with
``requires_unquantized_input`` is never given what an activation function has already quantized for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steersman.server.engine.layers import Kinds, LayerSites, Linear, find_sites
from steersman.server.engine.resident import Shard
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place
from steersman.steering.sites import Site

_runtime: Runtime | None = None
_places: list[Place] = []


def _edit(x: Tensor, residual: Tensor | None, index: int) -> None:
    """Edits ``x`` in place at the ``index``-th hooked place."""
    if _runtime is not None and _runtime.live and _places[index] in _runtime.wanted:
        _runtime.apply(_places[index], x, residual)


def _fake(x: Tensor, residual: Tensor | None, index: int) -> None:
    return None


# Not torch.library.custom_op, whose Python costs several times what an unsteered place may.
_library = torch.library.Library("steersman", "FRAGMENT")
_library.define("edit(Tensor(a!) x, Tensor? residual, int index) -> ()")
_library.impl("edit", _edit, dispatch_key="CompositeExplicitAutograd")
_library._register_fake("edit", _fake)


Touch = Callable[..., None]
"""``touch(x, residual=None)``: lets the runtime edit one place."""


def eager_touch(runtime: Runtime, place: Place) -> Touch:
    """For layers that Python runs: where nothing is steered it costs one look at a flag."""

    def touch(x: Tensor, residual: Tensor | None = None) -> None:
        if runtime.live and place in runtime.wanted:
            runtime.apply(place, x, residual)

    return touch


def traced_touch(place: Place) -> Touch:
    """For layers that torch.compile traces."""
    index = len(_places)
    _places.append(place)

    def touch(x: Tensor, residual: Tensor | None = None) -> None:
        torch.ops.steersman.edit(x, residual, index)

    return touch


def install(
    layers: Iterable[tuple[int, nn.Module]],
    d_model: int,
    runtime: Runtime,
    sites: frozenset[Site] = frozenset(Site),
    *,
    traced: bool = False,
    kinds: Kinds | None = None,
) -> tuple[dict[Site, dict[int, int]], dict[Place, Shard]]:
    """Hooks the given (index, layer) pairs at ``sites``; ``traced``: torch.compile will trace them.

    ``kinds``: of what the layers are made; vLLM's where that is not said.
    Returns each site's width by layer, and the places of which this rank holds only a part.
    """
    global _runtime
    _runtime = runtime
    make = traced_touch if traced else partial(eager_touch, runtime)
    widths: dict[Site, dict[int, int]] = {site: {} for site in Site}
    shards: dict[Place, Shard] = {}
    for index, layer in layers:
        found = find_sites(layer, d_model, kinds)
        hooked = {site: width for site, width in _widths(found, d_model).items() if site in sites}
        for site, width in hooked.items():
            widths[site][index] = width
        for site, linear in ((Site.ATTN_Z, found.attn_z), (Site.MLP_POST, found.mlp_post)):
            if site in hooked and linear is not None and linear.stop - linear.start != linear.width:
                shards[Place(index, site)] = Shard(linear.start, linear.stop, linear.width)
        _hook_layer(layer, found, {site: make(Place(index, site)) for site in hooked})
    return {site: w for site, w in widths.items() if w}, shards


def _widths(found: LayerSites, d_model: int) -> dict[Site, int]:
    """The sites that exist in a layer, with their widths."""
    out = {Site.RESID_PRE: d_model, Site.RESID_POST: d_model}
    if found.attn_out:
        out[Site.ATTN_OUT] = d_model
    if found.mlp_out:
        out[Site.MLP_OUT] = d_model
    if found.mid_norm or found.mid_adder:
        out[Site.RESID_MID] = d_model
    if found.attn_z:
        out[Site.ATTN_Z] = found.attn_z.width
    if found.mlp_post:
        out[Site.MLP_POST] = found.mlp_post.width
    return out


def _hook_layer(layer: nn.Module, found: LayerSites, touch: Mapping[Site, Touch]) -> None:
    def linear(site: Site, at: Linear | None) -> None:
        if site in touch and at is not None:
            at.module.requires_unquantized_input = True
            _before_first(at.module, touch[site])

    linear(Site.ATTN_Z, found.attn_z)
    linear(Site.MLP_POST, found.mlp_post)
    if Site.ATTN_OUT in touch and found.attn_out:
        _after(found.attn_out.module, touch[Site.ATTN_OUT])
    if Site.MLP_OUT in touch and found.mlp_out:
        _after(found.mlp_out.module, touch[Site.MLP_OUT])
    base: _Base | None = None
    if Site.RESID_MID in touch:
        if found.mid_norm is not None:
            _before_pair(found.mid_norm, touch[Site.RESID_MID])
        elif found.mid_adder is not None:
            base = _Base()
            _after_with(found.mid_adder.module, touch[Site.RESID_MID], base)
    _around(layer, touch.get(Site.RESID_PRE), touch.get(Site.RESID_POST), base)


class _Base:
    """The stream that entered a layer, kept while the layer runs, for a resid_mid that no one tensor holds."""

    stream: Tensor | None = None


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward


def _around(layer: nn.Module, pre: Touch | None, post: Touch | None, base: _Base | None) -> None:
    inner = layer.forward
    names = list(inspect.signature(inner).parameters)
    at_hidden = names.index("hidden_states")
    at_residual = names.index("residual") if "residual" in names else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[at_hidden]
        residual = None
        if at_residual is not None:
            residual = args[at_residual] if len(args) > at_residual else kwargs.get("residual")
        if pre is not None:
            pre(hidden, residual)
        if base is not None:
            base.stream = hidden if residual is None else hidden + residual
        out = inner(*args, **kwargs)
        if base is not None:
            base.stream = None
        if post is not None:
            if isinstance(out, tuple):
                post(out[0], out[1] if at_residual is not None else None)
            else:
                post(out)
        return out

    _replace(layer, forward)


def _after(module: nn.Module, touch: Touch) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        touch(out[0] if isinstance(out, tuple) else out)
        return out

    _replace(module, forward)


def _after_with(module: nn.Module, touch: Touch, base: _Base) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        touch(out[0] if isinstance(out, tuple) else out, base.stream)
        return out

    _replace(module, forward)


def _before_first(module: nn.Module, touch: Touch) -> None:
    inner = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        touch(x)
        return inner(x, *args, **kwargs)

    _replace(module, forward)


def _before_pair(norm: nn.Module, touch: Touch) -> None:
    inner = norm.forward

    def forward(x: Tensor, residual: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        touch(x, residual)
        return inner(x, residual, *args, **kwargs)

    _replace(norm, forward)
