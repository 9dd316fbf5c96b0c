"""Finding the sites of a decoder layer by its structure, not by its class's name.

The contract with vLLM: the language model's decoder layers are a ``ModuleList`` as long as the config's
number of layers, each holding one attention layer (``AttentionLayerBase``); a layer's ``forward`` takes
``hidden_states`` and perhaps ``residual`` and returns ``(hidden_states, residual)`` or ``hidden_states``,
the stream being their sum; a norm called with two tensors adds them, normalises the sum and returns
both; linear layers are ``LinearBase`` (or LoRA's wrappers of them) and tell their ``input_size`` and
``output_size``. Transformers' own layers, which vLLM runs for architectures it has no code for, keep
to the same, with attention modules that return a tuple. Outside of vLLM they have torch's own linear layers, and
:data:`TORCH` says how these are known.

How: the layer's real ``forward`` is run on three tokens of noise with every child that computes
replaced by a stub that returns fixed noise. The output is then an affine function of the stubs'
outputs, and its coefficients say which child adds to the stream, in what order. Where the norm before the MLP
reads "stream + what attention adds", there is a ``resid_mid``; parallel blocks have none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

TOKENS = 3  # not 2: a pair of rows could be unpacked where a tuple is expected


@dataclass(frozen=True)
class Adder:
    """The child whose output is added to the stream."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Linear:
    """A linear layer whose input is a site."""

    module: nn.Module
    width: int  # of the whole input
    start: int  # first coordinate that this rank holds
    stop: int


@dataclass(frozen=True)
class Kinds:
    """What a layer's parts are made of."""

    attends: Callable[[nn.Module], bool]  # whether there is attention in a module
    linears: Callable[[nn.Module], list[nn.Module]]  # a module's linear layers, in order
    last_linear: Callable[[nn.Module, int], Linear | None]  # the one that leads back to the stream, of this width


@dataclass(frozen=True)
class LayerSites:
    """What was found in one decoder layer; None where the structure does not have it."""

    attn_out: Adder | None = None
    mlp_out: Adder | None = None
    pre_norm: nn.Module | None = None  # called first, with (hidden_states, residual): resid_pre is their sum
    mid_norm: nn.Module | None = None  # called with (added, residual): resid_mid is their sum
    mid_adder: Adder | None = None  # resid_mid is the layer's input + its output
    attn_z: Linear | None = None
    mlp_post: Linear | None = None


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The language model's decoder layers.

    Raises LookupError where there are none, or where some of them see rows that are not the batch's: DeepSeek-V4.1
    (from vLLM 0.33) runs its last ones on each request's last tokens alone (``decoder_replay_layers``).
    """
    for name, module in model.named_modules():
        if getattr(module, "decoder_replay_layers", None) is not None:
            raise LookupError(f"the last layers of {name or type(model).__name__} see a part of the batch")
        if isinstance(module, nn.ModuleList) and len(module) == count and any(map(_attends, module)):
            return module
    raise LookupError(f"no list of {count} decoder layers with attention in {type(model).__name__}")


def norm_after(model: nn.Module, layers: nn.ModuleList) -> nn.Module | None:
    """The one norm beside ``layers``, which reads the last one's stream where it is called with two tensors."""
    (owner,) = (m for m in model.modules() if any(child is layers for child in m.children()))
    norms = [m for m in owner.children() if isinstance(m, RMSNorm | GemmaRMSNorm)]
    return norms[0] if len(norms) == 1 else None


def find_sites(layer: nn.Module, d_model: int, kinds: Kinds | None = None) -> LayerSites:
    """The sites of one decoder layer. Never raises for an unknown structure: what is not found is None.

    ``kinds``: of what its parts are made; vLLM's where that is not said.
    """
    kinds = kinds or VLLM
    attention = next((m for m in layer.children() if kinds.attends(m)), None)
    if attention is None:
        return LayerSites()
    try:
        trace = _trace(layer, d_model, kinds)
    except Exception:
        return LayerSites()
    calls = [name for name, _ in trace.calls]
    modules = dict(layer.named_children())
    attn_name = next(n for n, m in modules.items() if m is attention)
    mlp_name = next((n for n in reversed(calls) if n != attn_name and kinds.linears(modules[n])), None)
    if mlp_name is None or attn_name not in calls:
        return LayerSites()
    adders = _adders(trace, calls, {attn_name, mlp_name})
    attn, mlp = adders.get(attn_name), adders.get(mlp_name)
    sequential = calls.index(attn_name) < calls.index(mlp_name)
    mid_norm = _norm_reading(trace, attn, calls, mlp_name) if attn and sequential else None
    fused = mid_norm is not None and trace.calls[calls.index(mid_norm)][1] == 2
    first, tensors = trace.calls[0]
    return LayerSites(
        pre_norm=modules[first] if tensors == 2 and _reads(trace, first, trace.stream_in) else None,
        attn_out=Adder(attn, modules[attn]) if attn else None,
        mlp_out=Adder(mlp, modules[mlp]) if mlp else None,
        mid_norm=modules[mid_norm] if mid_norm and fused else None,
        mid_adder=Adder(attn, modules[attn]) if attn and mid_norm and not fused else None,
        attn_z=kinds.last_linear(attention, d_model),
        mlp_post=None if _has_experts(modules[mlp_name]) else kinds.last_linear(modules[mlp_name], d_model),
    )


# -- linear layers ----------------------------------------------------------------------------------


def _attends(module: nn.Module) -> bool:
    return any(isinstance(m, AttentionLayerBase) for m in module.modules())


def _has_experts(module: nn.Module) -> bool:
    return any(".fused_moe" in type(m).__module__ for m in module.modules())  # its classes' names change


def _linears(module: nn.Module) -> list[nn.Module]:
    """Linear layers in order, LoRA's wrappers in place of what they wrap."""
    wrapped = {id(m.base_layer) for m in module.modules() if isinstance(m, BaseLayerWithLoRA)}
    return [m for m in module.modules() if _base(m) is not None and id(m) not in wrapped]


def _base(module: nn.Module) -> LinearBase | None:
    inner = module.base_layer if isinstance(module, BaseLayerWithLoRA) else module
    return inner if isinstance(inner, LinearBase) else None


def _last_linear(module: nn.Module, d_model: int) -> Linear | None:
    """The linear that leads back to the stream: row-parallel if there is one, else the last of the right width."""
    fitting = [m for m in _linears(module) if _base(m).output_size == d_model]  # type: ignore[union-attr]
    rows = [m for m in fitting if isinstance(_base(m), RowParallelLinear)]
    if not fitting:
        return None
    chosen = (rows or fitting)[-1]
    base = _base(chosen)
    assert base is not None
    part = getattr(base, "input_size_per_partition", base.input_size)
    start = part * base.tp_rank if part != base.input_size else 0
    return Linear(chosen, base.input_size, start, start + part)


def _torch_linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _torch_attends(module: nn.Module) -> bool:
    return any(isinstance(getattr(m, "k_proj", None), nn.Linear) for m in module.modules())


def _torch_last_linear(module: nn.Module, d_model: int) -> Linear | None:
    fitting = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == d_model]
    return Linear(fitting[-1], fitting[-1].in_features, 0, fitting[-1].in_features) if fitting else None


VLLM = Kinds(_attends, _linears, _last_linear)
TORCH = Kinds(_torch_attends, _torch_linears, _torch_last_linear)
"""Of Transformers' models as they are, whose attention has a ``k_proj``."""


# -- running a layer on noise -----------------------------------------------------------------------


@dataclass
class _Trace:
    """One run of a stubbed layer."""

    calls: list[tuple[str, int]]  # (child, number of tensors it was called with), in order
    inputs: dict[str, Tensor]  # child -> sum of those tensors
    outputs: dict[str, Tensor]  # child -> the noise it returned
    stream_in: Tensor
    stream_out: Tensor
    rerun: Callable[[dict[str, Tensor]], tuple[Any, Tensor]]  # child outputs -> stubs, stream_out


def _trace(layer: nn.Module, d_model: int, kinds: Kinds) -> _Trace:
    generator = torch.Generator().manual_seed(0)
    names = inspect.signature(layer.forward).parameters
    takes_residual = "residual" in names
    arguments = {
        "hidden_states": torch.randn(TOKENS, d_model, generator=generator),
        "residual": torch.randn(TOKENS, d_model, generator=generator),
        "positions": torch.arange(TOKENS),
    }

    def run(outputs: dict[str, Tensor], tuples: bool, batched: bool) -> tuple[_Stubs, Tensor]:
        stubs = _Stubs(layer, outputs, d_model, generator, tuples, kinds.attends)
        with stubs.installed():
            given = {k: v.clone()[None] if batched else v.clone() for k, v in arguments.items() if k in names}
            out = layer.forward(**given)
        parts = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        total = sum(t.reshape(TOKENS, d_model) for t in parts[: 2 if takes_residual else 1])
        assert isinstance(total, Tensor)
        return stubs, total

    error: Exception | None = None
    for tuples, batched in ((False, False), (True, True), (True, False)):
        outputs: dict[str, Tensor] = {}
        try:
            stubs, out = run(outputs, tuples, batched)
        except Exception as failure:
            error = failure
            continue
        stream = arguments["hidden_states"] + (arguments["residual"] if takes_residual else 0)
        again = partial(run, tuples=tuples, batched=batched)
        return _Trace(stubs.calls, stubs.inputs, outputs, stream, out, again)
    assert error is not None
    raise error


class _Stubs:
    """Stand-ins for a layer's children that compute; dropouts and the like stay as they are."""

    def __init__(
        self,
        layer: nn.Module,
        outputs: dict[str, Tensor],
        d_model: int,
        generator: torch.Generator,
        tuples: bool,
        attends: Callable[[nn.Module], bool],
    ) -> None:
        self.layer = layer
        self.attends = attends
        self.outputs = outputs
        self.d_model = d_model
        self.generator = generator
        self.tuples = tuples
        self.calls: list[tuple[str, int]] = []
        self.inputs: dict[str, Tensor] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        stubbed = {n: m for n, m in self.layer.named_children() if any(True for _ in m.parameters())}
        # vLLM's Transformers backend puts fused forwards on instances: they are put back.
        own = {name: m.__dict__["forward"] for name, m in stubbed.items() if "forward" in m.__dict__}
        for name, module in stubbed.items():
            module.__dict__["forward"] = self._stub(name, self.attends(module))
        try:
            yield
        finally:
            for name, module in stubbed.items():
                del module.__dict__["forward"]
                if name in own:
                    module.__dict__["forward"] = own[name]

    def _stub(self, name: str, attends: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = [
                a for a in (*args, *kwargs.values())
                if isinstance(a, Tensor) and a.is_floating_point() and a.shape[-1] == self.d_model
            ]  # fmt: skip
            shape = tensors[0].shape
            total = sum(t.reshape(TOKENS, self.d_model) for t in tensors)
            assert isinstance(total, Tensor)
            self.calls.append((name, len(tensors)))
            self.inputs[name] = total
            if name not in self.outputs:
                self.outputs[name] = torch.randn(TOKENS, self.d_model, generator=self.generator)
            out = self.outputs[name].reshape(shape).clone()
            if len(tensors) == 2 and not attends:  # a norm that adds its inputs
                return out, total.reshape(shape)
            return (out, None) if self.tuples and attends else out

        return forward


def _adders(trace: _Trace, calls: list[str], majors: set[str]) -> dict[str, str]:
    """For attention and MLP, the child whose output is added to the stream once, unscaled: itself or its norm."""
    found: dict[str, str] = {}
    major = None
    for name in calls:
        major = name if name in majors else major
        step = torch.randn_like(trace.outputs[name])
        moved = trace.rerun({**trace.outputs, name: trace.outputs[name] + step})[1] - trace.stream_out
        alone = torch.allclose(trace.stream_out, trace.outputs[name], atol=1e-4)  # a norm of the whole stream
        if major is not None and not alone and torch.allclose(moved, step, atol=1e-4):
            found[major] = name
    return found


def _norm_reading(trace: _Trace, adder: str, calls: list[str], mlp: str) -> str | None:
    """The child after ``adder``, and no later than the MLP, that reads the stream with attention's part added."""
    wanted = trace.stream_in + trace.outputs[adder]
    for name in calls[calls.index(adder) + 1 : calls.index(mlp) + 1]:
        if _reads(trace, name, wanted):
            return name
    return None


def _reads(trace: _Trace, name: str, wanted: Tensor) -> bool:
    """Whether the sum of what the child is called with is ``wanted``."""
    return bool(torch.allclose(trace.inputs[name], wanted, atol=1e-4))
