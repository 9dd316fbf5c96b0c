"""Which norms may be made by the launch that edits before them, and whether their bits are then the model's.

Where a layer hands the stream to a norm as two tensors (``resid_mid``, and ``resid_post`` and ``resid_pre`` at the
next layer's first norm or at the model's last one), a kernel's ``edit_and_norm`` stands for two launches. Its edit has
the bits of the kernel's ``edit``. So a pass that is fused and one that is not (because the host reads or edits there
too) give a row the same bits if the kernel's norm has those of the model's. That cannot be told from the sources: it
takes the same roundings (:class:`~steersman.kernels.norms.Form`) and a sum added up in the same order, which a compiler
may choose. So it is tried when the model has been loaded, on its device and with its own norms: :func:`agreeing`.
``--steering-fused-norm`` then decides:

* ``auto``: norms are fused where every bit agreed. Nothing else about a pass changes: neighbours of an edited row, and
  passes without edits, compute what stock vLLM computes.
* ``on``: norms are fused wherever the kernel has them. Where bits did not agree, the kernel is the model's norm at
  these places in *every* pass, edited or not. So no row's bits depend on its neighbours' edits then either, but an
  unsteered row's last bits are no longer stock vLLM's.
* ``off``: none is.

Under torch.compile a norm is code in a graph that all passes share and cannot be left out of one. There the custom op
``steersman::edit_and_norm`` stands in its place for all passes, edited or not, and launches the norm alone where
nothing is edited; what it is tried against is the norm compiled by itself, with the model's settings of inductor.

The contract with vLLM (0.26, 0.32, 0.33): ``RMSNorm`` and ``GemmaRMSNorm`` keep ``weight`` and ``variance_epsilon``,
``RMSNorm`` also ``variance_size_override`` and, from 0.32, ``has_weight``; called with two tensors they return the
normed sum and the sum, and may overwrite both. Since 0.32 their ``forward_native`` calls an operator of ``vllm.ir``,
which ``ir.enable_torch_wrap(False)`` resolves at once. Draft models that read hidden states do so between layers
(``speculative_config``), so that the norms there must stay the model's; passes over the graph that fuse norms with
what is around them (quantization, all-reduce) need vLLM's own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from steersman.kernels.norms import DEFINED, Form
from steersman.kernels.tables import NONE, Tables
from steersman.server.engine.fusion import FusedNorm, Fusion, NormKernel
from steersman.server.engine.layers import LayerSites, find_sites, norm_after
from steersman.steering.plan import Place
from steersman.steering.sites import Site

logger = logging.getLogger(__name__)

ROWS = (300, 64, 3, 1)  # of the batches that norms are tried on: vLLM's own kernel changes its order at 256
SIZES = ((2.0**-10, 1.0), (1.0, 2.0**8), (2.0**6, 1.0))  # of their elements, and of one in 61 beside the others

Pair = tuple[Tensor, Tensor]
Stock = Callable[[Tensor, Tensor], Pair]
Candidate = tuple[nn.Module, tuple[Place, ...]]
"""A norm called with two tensors, and the places whose stream it reads, in the order in which they are edited."""


def candidates(
    model: nn.Module,
    all_layers: nn.ModuleList,
    mine: Sequence[tuple[int, nn.Module]],
    d_model: int,
    hooked: Collection[Site],
    between: bool = True,
) -> list[Candidate]:
    """Norms of this rank's layers that might be fused. To be called before the layers are hooked.

    between: whether those that read what another layer leaves are among them.
    """
    found: list[Candidate] = []
    before: Place | None = None  # where the layer before left the stream
    sites = LayerSites()
    for index, layer in mine:
        sites = find_sites(layer, d_model)
        if sites.pre_norm is not None and before is not None:
            found.append((sites.pre_norm, (before, Place(index, Site.RESID_PRE))))
        if sites.mid_norm is not None:
            found.append((sites.mid_norm, (Place(index, Site.RESID_MID),)))
        before = Place(index, Site.RESID_POST) if between else None
    last = norm_after(model, all_layers)
    if last is not None and sites.pre_norm is not None and before is not None and before.layer == len(all_layers) - 1:
        found.append((last, (before,)))
    calls = Counter(id(norm) for norm, _ in found)
    named = ((norm, tuple(p for p in places if p.site in hooked)) for norm, places in found if calls[id(norm)] == 1)
    return [(norm, places) for norm, places in named if places and form_of(norm) is not None]


def form_of(norm: nn.Module) -> Form | None:
    """The form in which its model's authors define a norm; None for one that the kernels do not have."""
    if type(norm) is GemmaRMSNorm:
        return Form.ONE_MORE
    if type(norm) is RMSNorm and norm.variance_size_override is None:
        return DEFINED
    return None


def decide(
    asked: str,
    found: Sequence[Candidate],
    kernel: NormKernel,
    device: torch.device,
    dtype: torch.dtype,
    compile_options: Mapping[str, Any] | None = None,
) -> Fusion:
    """The norms to be fused, under ``--steering-fused-norm``.

    dtype: of the stream. compile_options: inductor's, where it makes the norms.
    """
    traced = compile_options is not None
    tried: dict[Any, Form | None] = {}
    fusion = Fusion()
    for norm, places in found:
        weight = _weight(norm)
        if weight is not None and weight.dtype != dtype:
            continue
        kind = _kind(norm)
        if kind not in tried:
            tried[kind] = _try(norm, kernel, device, dtype, compile_options)
        form, defined = tried[kind], form_of(norm)
        assert defined is not None
        if form is None and asked != "on":
            continue
        always = traced or form is None
        eps = float(norm.variance_epsilon)
        chosen = defined if form is None else form
        fusion.norms.append(FusedNorm(len(fusion.norms), norm, places, weight, eps, chosen, always))
    differing = sum(tried[_kind(norm.module)] is None for norm in fusion.norms)
    logger.info("%d of %d norms are fused with edits", len(fusion.norms), len(found))
    if differing:
        logger.warning("%d of %d norms are the kernel's in all passes, with other bits", differing, len(found))
    return fusion


def agreeing(
    norm: nn.Module, stock: Stock, kernel: NormKernel, device: torch.device, dtype: torch.dtype, rows: Iterable[int]
) -> Form | None:
    """The form in which ``kernel`` has all bits of ``stock``, the model's own norm, on rows of many sizes; None: none.

    Sums of thousands of squares in another order differ in their last bit more often than not, which turns some element
    of most batches: that all of these agree is no accident.
    """
    one_more = (form_of(norm) or DEFINED) & Form.ONE_MORE
    batches = list(_batches(norm, device, dtype, rows))
    wanted = [tuple(part.clone() for part in stock(x.clone(), residual.clone())) for x, residual in batches]
    tables = Tables(1, device, entries=1, words=8, floats=4)
    for roundings in (Form.ROUNDED_QUOTIENT, Form(0), Form.ROUNDED_SUM | Form.ROUNDED_QUOTIENT, Form.ROUNDED_SUM):
        if all(
            _same(kernel, norm, one_more | roundings, tables, batch, want)
            for batch, want in reversed(list(zip(batches, wanted, strict=True)))  # few rows say no as well
        ):
            return one_more | roundings
    return None


# -- parts ----------------------------------------------------------------------------------------


def _try(
    norm: nn.Module,
    kernel: NormKernel,
    device: torch.device,
    dtype: torch.dtype,
    compile_options: Mapping[str, Any] | None,
) -> Form | None:
    try:
        with torch.inference_mode():
            if compile_options is None:
                return agreeing(norm, norm.forward, kernel, device, dtype, ROWS)
            many = ROWS[:-1]  # for 1 row torch.compile alone would make other code, and vLLM does not
            return agreeing(norm, compiled(norm, compile_options), kernel, device, dtype, many)
    except Exception:
        logger.exception("norms could not be tried, and are taken to differ")
        return None


def compiled(norm: Any, options: Mapping[str, Any]) -> Stock:
    """The norm as inductor makes it of vLLM's own definition, for any number of rows."""
    from vllm import ir

    call = torch.compile(norm.forward_native, dynamic=True, fullgraph=True, options=dict(options))

    def stock(x: Tensor, residual: Tensor) -> Pair:
        with ir.enable_torch_wrap(False):
            return call(x, residual)  # type: ignore[no-any-return]

    return stock


def _batches(norm: Any, device: torch.device, dtype: torch.dtype, rows: Iterable[int]) -> Iterable[Pair]:
    generator = torch.Generator().manual_seed(0)
    for n in rows:
        for size, outlier in SIZES:
            x, residual = (torch.randn(n, norm.weight.shape[0], generator=generator) * size for _ in range(2))
            residual[:, ::61] *= outlier
            yield x.to(device, dtype), residual.to(device, dtype)


def _same(kernel: NormKernel, norm: Any, form: Form, tables: Tables, batch: Pair, wanted: Sequence[Tensor]) -> bool:
    x, residual = (part.clone() for part in batch)
    nobody = torch.full((len(x),), NONE, dtype=torch.int32, device=x.device)
    kernel(x, residual, _weight(norm), float(norm.variance_epsilon), nobody, tables, 0, form=form)
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    return all(torch.equal(a.view(bits), b.view(bits)) for a, b in zip((x, residual), wanted, strict=True))


def _kind(norm: Any) -> Any:
    """What norms have in common that differ in their weights alone."""
    return type(norm), norm.weight.shape, _weight(norm) is None, norm.variance_epsilon


def _weight(norm: Any) -> Tensor | None:
    """[d] what it multiplies by; None where it multiplies by nothing."""
    return norm.weight.data if getattr(norm, "has_weight", True) else None
