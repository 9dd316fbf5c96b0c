"""Where W_down and the unembedding lie in a checkpoint, against transformers' own modules and by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman.steering.errors import InvalidRequest, LayerOutOfRange, SiteUnsupported, SteeringError
from steersman.steering.neurons_checkpoint import Checkpoint
from tests.models.tiny import tiny_model
from tests.steering.checkpoints import D_FF, LAYERS, D, V, columns, tensors, write
from tests.steering.library import noise

DOWN = {
    "llama": lambda layer: layer.mlp.down_proj,
    "gpt2": lambda layer: layer.mlp.c_proj,
    "gpt_neox": lambda layer: layer.mlp.dense_4h_to_h,
    "qwen2": lambda layer: layer.mlp.down_proj,  # tied
    "phi3": lambda layer: layer.mlp.down_proj,
    "gemma3": lambda layer: layer.mlp.down_proj,  # tied
}


@pytest.mark.parametrize("name", DOWN)
@torch.no_grad()
def test_what_a_neuron_writes_is_what_the_model_s_own_module_makes_of_it(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32)
    found = Checkpoint(tiny_model(name))
    layers = getattr(model.base_model, "layers", None) or model.base_model.h
    assert found.n_layers == len(layers)
    for i, layer in enumerate(layers):
        module, width = DOWN[name](layer), found.widths()[i]
        alone = module(torch.eye(width)) - module(torch.zeros(1, width))  # each neuron at 1, and the bias taken off
        torch.testing.assert_close(found.down(i).float(), alone, rtol=0, atol=1e-6)
    head = model.get_output_embeddings().weight
    assert found.tied == (head is model.get_input_embeddings().weight)
    assert torch.equal(found.unembedding(0, found.vocabulary), head)
    assert torch.equal(found.unembedding(17, 40), head[17:40])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_the_final_norm_is_the_model_s_own(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32)
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    x = 100 * noise(5, model.config.hidden_size)  # beside which the norm's epsilon is nothing
    bias = getattr(norm, "bias", None)
    wanted = norm(x) - (0 if bias is None else bias)
    torch.testing.assert_close(Checkpoint(tiny_model(name)).final_norm()(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", "lm_head.weight"),
        ("model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_any_prefix_and_other_stacks_beside_it(tmp_path: Path, prefix: str, head: str) -> None:
    """As OpenVLA and LLaVA: towers with stacks of as many layers, as wide, and matrices of the same names."""
    weights = tensors(prefix, head)
    towers = {}
    for i in range(LAYERS):
        towers[f"vision_backbone.featurizer.blocks.{i}.mlp.fc2.weight"] = noise(D, D_FF, seed=90 + i)
        towers[f"vision_tower.vision_model.encoder.layers.{i}.mlp.down_proj.weight"] = noise(D, D_FF, seed=95 + i)
    towers["projector.fc2.weight"] = noise(D, D)
    found = Checkpoint(write(tmp_path, weights | towers))
    assert found.widths() == dict.fromkeys(range(LAYERS), D_FF)
    assert torch.equal(torch.cat([found.down(i) for i in range(LAYERS)]), columns(weights, prefix))
    assert found.pattern == f"{prefix}layers.*.mlp.down_proj.weight"
    assert found.head == head


def test_many_files_by_their_index_alone(tmp_path: Path) -> None:
    weights = tensors()
    folder = write(tmp_path, weights, shards=4)
    (folder / "consolidated.safetensors").write_bytes(b"a second copy under other names")
    found = Checkpoint(folder)
    assert torch.equal(torch.cat([found.down(i) for i in range(LAYERS)]), columns(weights))
    assert torch.equal(found.unembedding(0, V), weights["lm_head.weight"])


@pytest.mark.parametrize(("kind", "is_transposed"), [("gpt2", True), ("starcoder2", False)])
def test_square_matrices_go_by_the_family(tmp_path: Path, kind: str, is_transposed: bool) -> None:
    weight = noise(D, D, seed=5)
    weights = {"wte.weight": noise(V, D), "h.0.mlp.c_proj.weight": weight, "h.0.attn.c_proj.weight": noise(D, D)}
    found = Checkpoint(write(tmp_path, weights, {"model_type": kind}))
    assert torch.equal(found.down(0), weight if is_transposed else weight.T)


def test_mixtures_of_experts_are_refused_at_their_layers() -> None:
    with pytest.raises(SiteUnsupported, match=r"mixtures of experts.* this model has no other layers") as raised:
        Checkpoint(tiny_model("mixtral")).widths()
    assert raised.value.param == "layers"
    mixed = Checkpoint(tiny_model("deepseek_v2"))
    with pytest.raises(SiteUnsupported, match=r"layers 1, 2, 3 are .* those that are not: 0"):
        mixed.widths()
    assert mixed.widths((0,)) == {0: 160}
    assert mixed.down(0).shape == (160, 64)


@pytest.mark.parametrize(
    ("layers", "error"), [((LAYERS,), LayerOutOfRange), ((), InvalidRequest), ((1, 1), InvalidRequest)]
)
def test_layers_that_are_none(tmp_path: Path, layers: tuple[int, ...], error: type[SteeringError]) -> None:
    with pytest.raises(error) as raised:
        Checkpoint(write(tmp_path, tensors())).widths(layers)
    assert raised.value.param == "layers"


def without(*parts: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors().items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("weights", "config", "complaint"),
    [
        (tensors(), {"quantization_config": {"quant_method": "awq"}}, "quantised"),
        (tensors(), {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised"),
        ({k: v.to(torch.int8) if "down" in k else v for k, v in tensors().items()}, {}, "is I8: quantised"),
        (
            {k: v.to(torch.float8_e4m3fn) if "lm_" in k else v for k, v in tensors().items()},
            {},
            "is F8_E4M3: quantised",
        ),
        (without("embed_tokens"), {}, "one token embedding .* found: none"),
        (without("layers.1."), {}, r"\[0, 2\], not 0 to n"),
        (without("layers.1.mlp.down"), {}, "layer 1 should have one matrix W_down; found: none"),
        (tensors() | {"model.layers.2.mlp.fc2.weight": noise(D, D_FF)}, {}, "layer 2 .*down_proj.weight, .*fc2"),
        (without("lm_head"), {"tie_word_embeddings": False}, "but has none"),
        (tensors() | {"a.lm_head.weight": noise(V, D)}, {}, "one unembedding; found: a.lm_head.weight, lm_head"),
    ],
)
def test_checkpoints_that_are_refused(tmp_path: Path, weights: Any, config: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as raised:
        Checkpoint(write(tmp_path, weights, config))
    assert raised.value.param == "model"


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InvalidRequest, match="JSON object"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InvalidRequest, match=r"pickles .* are not opened"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(SteeringError, match="not a safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("config", [{"rms_norm_eps": None}, {"layer_norm_eps": 1e-5}])
def test_a_norm_that_cannot_be_told_is_refused(tmp_path: Path, config: Any) -> None:
    folder = write(tmp_path, tensors(), config)
    given = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(given))
    with pytest.raises(InvalidRequest, match="final norm"):
        Checkpoint(folder).final_norm()


def test_memory_holds_a_layer_and_not_the_file(tmp_path: Path) -> None:
    """Of 24 layers of 8 MiB each, one after the other, no more than a few are ever in memory."""
    weights = {"model.embed_tokens.weight": noise(V, 512)}
    for i in range(24):
        weights[f"model.layers.{i}.mlp.down_proj.weight"] = torch.full((512, 8192), i, dtype=torch.bfloat16)
    found = Checkpoint(write(tmp_path, weights))
    del weights
    found.down(0).sum()  # what the first read loads of libraries is not counted
    before, peak = _resident(), 0
    for i in range(24):
        assert float(found.down(i).amax()) == i  # which touches every page
        peak = max(peak, _resident())
    assert peak - before < 64 << 20


def _resident() -> int:
    """Bytes of this process in memory, pages of mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
