"""Small models of vLLM's own norms and the projections that sites are found by, which run without an engine.

Attention has no past, and rows do not see each other: a row's bits are its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from tests.steering.library import LAYERS, D, noise


def one_rank(tmp: Path) -> Iterator[None]:
    """vLLM's linear layers ask for their tensor-parallel rank."""
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp / 'store'}", 0, "gloo")
        parallel_state.initialize_model_parallel(1)
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


class Attend(nn.Module, AttentionLayerBase):
    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> None:
        return None


class Branch(nn.Module):
    """Attention or an MLP."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.up_proj, self.down_proj = ColumnParallelLinear(D, 2 * D), RowParallelLinear(2 * D, D)
        if attends:
            self.attn = Attend()
        self.factor = nn.Parameter(noise(D, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.factor.to(x.dtype)) * 0.75


class Llama(nn.Module):
    norm: Any = RMSNorm

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.mid_norm = self.norm(D), self.norm(D)
        self.self_attn, self.mlp = Branch(True), Branch(False)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_norm(hidden_states)
        else:
            hidden_states, residual = self.input_norm(hidden_states, residual)
        hidden_states, residual = self.mid_norm(self.self_attn(hidden_states), residual)
        return self.mlp(hidden_states), residual


class Gemma(Llama):
    norm = GemmaRMSNorm

    def __init__(self) -> None:
        super().__init__()
        self.after_attn, self.after_mlp = self.norm(D), self.norm(D)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_norm(hidden_states)
        else:
            hidden_states, residual = self.input_norm(hidden_states, residual)
        hidden_states = self.after_attn(self.self_attn(hidden_states))
        hidden_states, residual = self.mid_norm(hidden_states, residual)
        return self.after_mlp(self.mlp(hidden_states)), residual


class PreNorm(Llama):  # GPT-2: the norm is given the sum
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.mid_norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, hidden_states: Tensor) -> Any:  # type: ignore[override]
        hidden_states = hidden_states + self.self_attn(self.input_norm(hidden_states))
        return hidden_states + self.mlp(self.mid_norm(hidden_states))


class Model(nn.Module):
    def __init__(self, layer: type[Llama], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.norm = layer.norm(D)
        for i, parameter in enumerate(self.parameters()):
            if parameter.dim() == 1 and not isinstance(parameter, nn.Buffer):
                parameter.data = 1 + noise(D, seed=20 + i) / 4
        self.to(dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            if isinstance(layer, PreNorm):
                hidden_states = layer(hidden_states)
            else:
                hidden_states, residual = layer(hidden_states, residual)
        if residual is None:
            return self.norm(hidden_states)  # type: ignore[no-any-return]
        return self.norm(hidden_states, residual)[0]  # type: ignore[no-any-return]
