"""A Hugging Face Llama whose forward pass a plan edits, through the plan's own blocks and the reference kernel."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from steersman.kernels.program import Program
from steersman.kernels.reference import edit
from steersman.steering.assets import Asset
from steersman.steering.plan import Place
from steersman.steering.sites import ModelInfo, Site
from tests.steering.library import resolve

INPUTS = {Site.RESID_PRE: "", Site.ATTN_Z: "self_attn.o_proj"}
OUTPUTS = {Site.RESID_POST: "", Site.ATTN_OUT: "self_attn", Site.MLP_OUT: "mlp"}


def info(model: Any) -> ModelInfo:
    c = model.config
    d_head = c.hidden_size // c.num_attention_heads
    sites = {site: dict.fromkeys(range(c.num_hidden_layers), c.hidden_size) for site in (*INPUTS, *OUTPUTS)}
    sites[Site.ATTN_Z] = dict.fromkeys(range(c.num_hidden_layers), c.num_attention_heads * d_head)
    return ModelInfo("tiny", "Llama", c.num_hidden_layers, c.hidden_size, c.num_attention_heads, d_head, sites)


def logits(model: Any, ids: Tensor, steering: dict[str, Any], *assets: Asset) -> Tensor:
    """[T, V] of the sequence `ids` [T], every token of it edited as `steering` says."""
    plan = resolve(steering, *assets, model=info(model))
    with ExitStack() as stack, torch.inference_mode():
        for place, blocks in plan.blocks.items():
            handle = _hook(model.model.layers[place.layer], place, _editor(blocks, plan, place))
            stack.callback(handle.remove)
        return model(input_ids=ids[None], use_cache=False).logits[0]


def _editor(blocks: Any, plan: Any, place: Place) -> Callable[[Tensor], Tensor]:
    assert not plan.gates
    return lambda x: x + edit(x[0], Program(blocks, x.shape[-1]))[None]


def _hook(block: Any, place: Place, change: Callable[[Tensor], Tensor]) -> Any:
    if place.site in INPUTS:
        module = block.get_submodule(INPUTS[place.site])
        return module.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))
    module = block.get_submodule(OUTPUTS[place.site])

    def after(_module: Any, _args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return module.register_forward_hook(after)
