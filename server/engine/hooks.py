"""Wrapping a model's layers so that a :class:`~steersman.server.engine.runtime.Runtime` sees every site.

``forward`` of a decoder layer, and of the few children that make or read a site, is replaced on the
instance, after the weights are loaded and before anything is traced. Traced by torch.compile, a wrapper leaves one
call of the custom op ``steersman::edit`` per site, which writes into the activation and is opaque to the compiler, and
in the place of a norm that the kernel makes (:func:`fuse`) one of ``steersman::edit_and_norm``. Where Python runs the
layers, wrappers are on them only for the passes that need them (:class:`Switch`).

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

from steersman.server.engine.fusion import FusedNorm
from steersman.server.engine.layers import Kinds, LayerSites, Linear, find_sites
from steersman.server.engine.resident import Shard
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place
from steersman.steering.sites import Site

_runtime: Runtime | None = None
_places: list[Place] = []
_norms: list[FusedNorm] = []


def _edit(x: Tensor, residual: Tensor | None, index: int) -> None:
    """Edits ``x`` in place at the ``index``-th hooked place."""
    if _runtime is not None and _runtime.live and _places[index] in _runtime.wanted:
        _runtime.apply(_places[index], x, residual)


def _fake(x: Tensor, residual: Tensor | None, index: int) -> None:
    return None


def _edit_and_norm(x: Tensor, residual: Tensor, index: int) -> None:
    """Makes the ``index``-th fused norm in place, with an edit where this pass has one there."""
    norm = _norms[index]
    if _runtime is None or _runtime.device is None:
        raise RuntimeError("norms are fused and there is no kernel to make them")
    if not (_runtime.live and _runtime.normalise(norm, x, residual)):
        _runtime.device.normalise(norm, x.view(-1, x.shape[-1]), residual.view(-1, x.shape[-1]))


def _fake_norm(x: Tensor, residual: Tensor, index: int) -> None:
    return None


# Not torch.library.custom_op, whose Python costs several times what an unsteered place may.
_library = torch.library.Library("steersman", "FRAGMENT")
_library.define("edit(Tensor(a!) x, Tensor? residual, int index) -> ()")
_library.impl("edit", _edit, dispatch_key="CompositeExplicitAutograd")
_library._register_fake("edit", _fake)
_library.define("edit_and_norm(Tensor(a!) x, Tensor(b!) residual, int index) -> ()")
_library.impl("edit_and_norm", _edit_and_norm, dispatch_key="CompositeExplicitAutograd")
_library._register_fake("edit_and_norm", _fake_norm)


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
    runtime.switch = None if traced else Switch()
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
        before = {module: module.__dict__.get("forward") for module in layer.modules()}
        wrapped = _hook_layer(layer, found, {site: make(Place(index, site)) for site in hooked})
        if runtime.switch is not None:
            for module, needing in wrapped.items():
                runtime.switch.add(module, before[module], [Place(index, site) for site in needing])
    return {site: w for site, w in widths.items() if w}, shards


def fuse(runtime: Runtime, norms: Iterable[FusedNorm], *, traced: bool = False) -> None:
    """Lets the kernel make these norms, of layers that :func:`install` has hooked."""
    make = traced_touch if traced else partial(eager_touch, runtime)
    _norms[:] = norms
    for norm in _norms:
        if runtime.switch is not None:
            runtime.switch.leave_on(norm.module)
        norm.module.__dict__.pop("forward", None)  # what touches resid_mid there comes before the norm, as now
        _replace(norm.module, _always(norm) if norm.always else _where_edited(norm, runtime))
        if norm.places[0].site is Site.RESID_MID:
            _before_pair(norm.module, make(norm.places[0]))


def _always(norm: FusedNorm) -> Callable[..., Any]:
    inner, index = norm.module.forward, norm.index

    def forward(x: Tensor, residual: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if residual is None or args or kwargs:
            return inner(x, residual, *args, **kwargs)
        torch.ops.steersman.edit_and_norm(x, residual, index)
        return x, residual

    return forward


def _where_edited(norm: FusedNorm, runtime: Runtime) -> Callable[..., Any]:
    inner = norm.module.forward

    def forward(x: Tensor, residual: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if runtime.live and residual is not None and not (args or kwargs) and runtime.normalise(norm, x, residual):
            return x, residual
        return inner(x, residual, *args, **kwargs)

    return forward


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


def _hook_layer(layer: nn.Module, found: LayerSites, touch: Mapping[Site, Touch]) -> dict[nn.Module, list[Site]]:
    """Wraps a layer and its children; for each that is wrapped, the sites that need it."""
    wrapped: dict[nn.Module, list[Site]] = {
        layer: [site for site in (Site.RESID_PRE, Site.RESID_POST) if site in touch]
    }

    def at(site: Site, module: nn.Module) -> nn.Module:
        wrapped.setdefault(module, []).append(site)
        return module

    def linear(site: Site, found: Linear | None) -> None:
        if site in touch and found is not None:
            found.module.requires_unquantized_input = True
            _before_first(at(site, found.module), touch[site])

    linear(Site.ATTN_Z, found.attn_z)
    linear(Site.MLP_POST, found.mlp_post)
    if Site.ATTN_OUT in touch and found.attn_out:
        _after(at(Site.ATTN_OUT, found.attn_out.module), touch[Site.ATTN_OUT])
    if Site.MLP_OUT in touch and found.mlp_out:
        _after(at(Site.MLP_OUT, found.mlp_out.module), touch[Site.MLP_OUT])
    base: _Base | None = None
    if Site.RESID_MID in touch:
        if found.mid_norm is not None:
            _before_pair(at(Site.RESID_MID, found.mid_norm), touch[Site.RESID_MID])
        elif found.mid_adder is not None:
            base = _Base()
            _after_with(at(Site.RESID_MID, found.mid_adder.module), touch[Site.RESID_MID], base)
            at(Site.RESID_MID, layer)
    _around(layer, touch.get(Site.RESID_PRE), touch.get(Site.RESID_POST), base)
    return wrapped


class _Base:
    """The stream that entered a layer, kept while the layer runs, for a resid_mid that no one tensor holds."""

    stream: Tensor | None = None


class Switch:
    """Wrappers of modules that Python runs, which are on them only for passes that want one of their places.

    So a pass without edits runs stock code, and others pay for what they edit.
    """

    def __init__(self) -> None:
        self._bare: dict[nn.Module, Callable[..., Any] | None] = {}  # the instance's own forward, if it had one
        self._wrapped: dict[nn.Module, Callable[..., Any]] = {}
        self._needing: dict[Place, list[nn.Module]] = {}
        self._on: set[nn.Module] = set()

    def add(self, module: nn.Module, bare: Callable[..., Any] | None, places: Iterable[Place]) -> None:
        """A module that has been wrapped, and so is on: for ``places``."""
        self._bare[module], self._wrapped[module] = bare, module.__dict__["forward"]
        self._on.add(module)
        for place in places:
            self._needing.setdefault(place, []).append(module)

    def leave_on(self, module: nn.Module) -> None:
        """The module's wrapper is not ours any more."""
        for modules in self._needing.values():
            if module in modules:
                modules.remove(module)
        self._on.discard(module)

    def __call__(self, wanted: Iterable[Place]) -> None:
        needed = {module for place in wanted for module in self._needing.get(place, ())}
        for module in self._on - needed:
            if (bare := self._bare[module]) is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = bare
        for module in needed - self._on:
            module.__dict__["forward"] = self._wrapped[module]
        self._on = needed


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
