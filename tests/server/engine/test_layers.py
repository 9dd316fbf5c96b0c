"""Toy decoder layers of every residual structure, with vLLM's own linear layers."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer

from steersman.server.engine import hooks
from steersman.server.engine.layers import TORCH, LayerSites, decoder_layers, find_sites
from steersman.server.engine.runtime import Runtime
from steersman.steering.sites import Site

LOOK = "vLLM changed what server/engine/layers.py relies on; see its docstring"
D, HEADS, FF = 8, 12, 20


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's linear layers ask for their tensor-parallel rank."""
    address = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel(1)
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


class Attend(nn.Module, AttentionLayerBase):
    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> None:
        return None


class Stubbed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("finding sites must not run this")


class Norm(Stubbed):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))


class Attention(Stubbed):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = ColumnParallelLinear(D, 3 * HEADS)
        self.o_proj = RowParallelLinear(HEADS, D)
        self.attn = Attend()


class Mlp(Stubbed):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(D, FF)
        self.down_proj = RowParallelLinear(FF, D)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()
        self.norm1, self.norm2, self.norm3, self.norm4 = Norm(), Norm(), Norm(), Norm()


class PreNormFused(Layer):  # Llama, Qwen, Mistral
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, self.norm1(hidden_states)
        else:
            hidden_states, residual = self.norm1(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.norm2(hidden_states, residual)
        return self.mlp(hidden_states), residual


class SandwichFused(Layer):  # Gemma 2 and 3
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any) -> Any:
        hidden_states, residual = self.norm1(hidden_states, residual)
        hidden_states = self.norm2(self.self_attn(positions=positions, hidden_states=hidden_states, **kwargs))
        hidden_states, residual = self.norm3(hidden_states, residual)
        return self.norm4(self.mlp(hidden_states)), residual


class PreNorm(Layer):  # GPT-2, OPT
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.self_attn(hidden_states=self.norm1(hidden_states)) + hidden_states
        return hidden_states + self.mlp(self.norm2(hidden_states))


class Parallel(Layer):  # GPT-J, Phi: one norm
    def forward(self, position_ids: Tensor | None = None, hidden_states: Tensor | None = None) -> Tensor:
        assert hidden_states is not None
        normed = self.norm1(hidden_states)
        return self.self_attn(position_ids, normed) + self.mlp(normed) + hidden_states


class ParallelTwoNorms(Layer):  # GPT-NeoX
    def forward(self, position_ids: Tensor | None = None, hidden_states: Tensor | None = None) -> Tensor:
        attended = self.self_attn(position_ids, self.norm1(hidden_states))
        return self.mlp(self.norm2(hidden_states)) + attended + hidden_states


class PostNorm(Layer):  # OLMo 2: what is added is normed, what is read is not
    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.norm1(self.self_attn(positions, hidden_states))
        return hidden_states + self.norm2(self.mlp(hidden_states))


class StreamNorm(Layer):  # the first transformer, OPT-350m: the stream itself is normed
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm1(hidden_states + self.self_attn(hidden_states))
        return self.norm2(hidden_states + self.mlp(hidden_states))


class Scaled(Layer):  # Granite, MiniCPM: less than what the children give is added
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        hidden_states = hidden_states + self.self_attn(positions, self.norm1(hidden_states)) * 0.22
        return hidden_states + self.mlp(self.norm2(hidden_states)) * 0.22, residual


class Tupled(Layer):  # Transformers' own layers: a batch dimension, attention gives a tuple
    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        attended, _weights = self.self_attn(hidden_states=self.norm1(hidden_states), position_ids=position_ids)
        hidden_states = hidden_states + attended.view(batch, tokens, -1)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class Strange(Layer):
    def forward(self, hidden_states: Tensor, something: Tensor) -> Tensor:
        return self.mlp(self.self_attn(hidden_states, something))


def names(layer: nn.Module) -> dict[str, str | None]:
    """The children at the sites that are made of children."""
    found = find_sites(layer, D)
    known = {id(m): n for n, m in layer.named_modules()}
    assert not any("forward" in m.__dict__ for m in layer.modules()), "a stub was left behind"
    at = {
        "attn_out": found.attn_out and found.attn_out.module,
        "mlp_out": found.mlp_out and found.mlp_out.module,
        "mid_norm": found.mid_norm,
        "mid_adder": found.mid_adder and found.mid_adder.module,
    }
    return {site: None if module is None else known[id(module)] for site, module in at.items()}


@pytest.mark.parametrize(
    ("layer", "attn_out", "mlp_out", "mid_norm", "mid_adder"),
    [
        (PreNormFused, "self_attn", "mlp", "norm2", None),
        (SandwichFused, "norm2", "norm4", "norm3", None),
        (PreNorm, "self_attn", "mlp", None, "self_attn"),
        (Parallel, "self_attn", "mlp", None, None),
        (ParallelTwoNorms, "self_attn", "mlp", None, None),
        (PostNorm, "norm1", "norm2", None, "norm1"),
        (Tupled, "self_attn", "mlp", None, "self_attn"),
        (Scaled, None, None, None, None),
    ],
)
def test_sites_follow_the_structure(
    layer: type[Layer], attn_out: str | None, mlp_out: str | None, mid_norm: str | None, mid_adder: str | None
) -> None:
    found = names(layer())
    assert found == {"attn_out": attn_out, "mlp_out": mlp_out, "mid_norm": mid_norm, "mid_adder": mid_adder}


def test_a_norm_of_the_stream_is_not_taken_for_what_the_mlp_adds() -> None:
    assert names(StreamNorm()) == {"attn_out": None, "mlp_out": None, "mid_norm": None, "mid_adder": None}


@pytest.mark.parametrize("layer", [PreNormFused, SandwichFused, PreNorm, Parallel, PostNorm, StreamNorm, Tupled])
def test_the_inputs_of_the_projections_back_to_the_stream(layer: type[Layer]) -> None:
    made = layer()
    found = find_sites(made, D)
    assert found.attn_z is not None
    assert found.mlp_post is not None
    assert (found.attn_z.module, found.attn_z.width) == (made.self_attn.o_proj, HEADS)
    assert (found.mlp_post.module, found.mlp_post.width) == (made.mlp.down_proj, FF)
    assert (found.mlp_post.start, found.mlp_post.stop) == (0, FF)


def test_a_rank_of_two_holds_its_half() -> None:
    layer = PreNormFused()
    layer.self_attn.o_proj.input_size_per_partition, layer.self_attn.o_proj.tp_rank = HEADS // 2, 1
    found = find_sites(layer, D).attn_z
    assert found is not None
    assert (found.start, found.stop, found.width) == (HEADS // 2, HEADS, HEADS)


def test_a_wrapper_by_lora_stands_for_what_it_wraps() -> None:
    class Wrapper(BaseLayerWithLoRA):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    layer = PreNormFused()
    wrapper = layer.mlp.down_proj = Wrapper(layer.mlp.down_proj)
    found = find_sites(layer, D).mlp_post
    assert found is not None
    assert (found.module, found.width) == (wrapper, FF)


def test_experts_have_no_mlp_post() -> None:
    class Moe(Stubbed):
        def __init__(self) -> None:
            super().__init__()
            self.gate = ReplicatedLinear(D, 4)
            self.shared = RowParallelLinear(FF, D)
            self.experts = type("Runner", (nn.Module,), {"__module__": MoERunner.__module__})()

    layer = PreNormFused()
    layer.mlp = Moe()
    found = find_sites(layer, D)
    assert found.mlp_post is None
    assert found.mlp_out is not None
    assert found.mlp_out.module is layer.mlp


def test_nothing_is_found_where_nothing_is_known() -> None:
    assert find_sites(Strange(), D) == LayerSites()
    assert find_sites(nn.Linear(D, D), D) == LayerSites()
    assert not any("forward" in m.__dict__ for m in Strange().modules())


def test_transformers_own_layers_are_known_by_torchs_linear_ones() -> None:
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer

    config = GemmaConfig(hidden_size=D, intermediate_size=FF, num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    layer = GemmaDecoderLayer(config, 0)
    assert find_sites(layer, D) == LayerSites()
    found = find_sites(layer, D, TORCH)
    assert (found.attn_z and found.attn_z.module) is layer.self_attn.o_proj
    assert (found.mlp_post and (found.mlp_post.module, found.mlp_post.width)) == (layer.mlp.down_proj, FF)
    for adder, module in (
        (found.attn_out, layer.self_attn),
        (found.mlp_out, layer.mlp),
        (found.mid_adder, layer.self_attn),
    ):
        assert (adder and adder.module) is module


def test_the_language_model_s_layers_are_those_that_attend_in_the_config_s_number() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
            self.layers = nn.ModuleList([PreNormFused(), nn.Identity()])  # another rank holds the second

    model = Model()
    assert decoder_layers(model, 2) is model.layers
    with pytest.raises(LookupError, match="no list of 3 decoder layers"):
        decoder_layers(model, 3)
    model.decoder_replay_layers = object()  # type: ignore[assignment]
    with pytest.raises(LookupError, match="Model see a part of the batch"):
        decoder_layers(model, 2)


@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
def test_contract_a_norm_of_two_tensors_gives_their_sum(norm: type[nn.Module]) -> None:
    x, residual = torch.randn(3, D), torch.randn(3, D)
    made = norm(D)
    normed, total = made(x.clone(), residual.clone())
    torch.testing.assert_close(total, x + residual, msg=LOOK)
    torch.testing.assert_close(normed, made(x + residual), msg=LOOK)


def test_contract_linear_layers_tell_their_sizes() -> None:
    for cls in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear):
        made = cls(D, FF)
        assert isinstance(made, LinearBase), LOOK
        assert (made.input_size, made.output_size, made.tp_rank) == (D, FF, 0), LOOK
    assert RowParallelLinear(D, FF).input_size_per_partition == D, LOOK
    assert "input_" in next(iter(inspect.signature(RowParallelLinear.forward).parameters.keys() - {"self"})), LOOK


def test_contract_lora_wraps_linear_layers() -> None:
    assert issubclass(RowParallelLinearWithLoRA, BaseLayerWithLoRA), LOOK
    assert list(inspect.signature(RowParallelLinearWithLoRA.__init__).parameters)[:2] == ["self", "base_layer"], LOOK


def test_contract_attention_layers_share_a_base() -> None:
    assert AttentionLayerBase.__abstractmethods__ <= {"get_attn_backend", "get_kv_cache_spec"}, LOOK
    assert ".fused_moe" in MoERunner.__module__, LOOK


def test_contract_a_decoder_layer_takes_hidden_states_and_residual() -> None:
    assert list(inspect.signature(LlamaDecoderLayer.forward).parameters)[:4] == [
        "self", "positions", "hidden_states", "residual",
    ], LOOK  # fmt: skip


def test_a_forward_of_an_instance_is_still_there_afterwards() -> None:
    """vLLM's Transformers backend fuses projections by replacing ``forward`` on instances."""
    layer = PreNorm()
    for child in layer.children():
        child.__dict__["forward"] = child.forward
    before = {name: child.__dict__["forward"] for name, child in layer.named_children()}
    find_sites(layer, D)
    assert {name: child.__dict__.get("forward") for name, child in layer.named_children()} == before


@pytest.mark.parametrize("site", [Site.ATTN_Z, Site.MLP_POST])
def test_a_projection_whose_input_is_hooked_is_not_given_a_quantized_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_runtime", None)  # put back afterwards
    layer = PreNormFused()
    projections = {Site.ATTN_Z: layer.self_attn.o_proj, Site.MLP_POST: layer.mlp.down_proj}
    for linear in projections.values():
        linear._input_quant_key = "fp8"  # what its kernel could take
    hooks.install([(0, layer)], D, Runtime(), frozenset({site}))
    for at, linear in projections.items():
        assert get_input_quant_key(linear) == (None if at is site else "fp8")
