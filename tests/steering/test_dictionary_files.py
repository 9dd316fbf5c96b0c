"""Dictionaries of other projects: files that are not what they say, and what they say of their place."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from steersman.steering import dictionaries
from steersman.steering.assets import DictionaryMeta
from steersman.steering.errors import InvalidRequest, NonFinite, SteeringError, UploadMalformed
from steersman.steering.formats import dictionary_files, hook_names, uploads
from tests.steering.small_dictionary import MODEL, SAELENS, D, M, lens, read, tensors

SPARSIFY = Path(__file__).parents[1] / "data" / "sparsify"


def test_a_sound_file_is_read() -> None:
    assert torch.equal(read(lens()).tensors["decoder"], tensors()["decoder"])


@pytest.mark.parametrize(
    ("state", "error", "param"),
    [
        (lens(W_dec=torch.zeros(M, D + 1)), SteeringError, "tensors.decoder"),
        (lens(W_dec=torch.zeros(D, M)), SteeringError, "tensors.decoder"),
        (lens(W_enc=torch.zeros(M, D)), InvalidRequest, "tensors.encoder"),
        (lens(W_enc=torch.zeros(D)), UploadMalformed, "file"),
        (lens(threshold=torch.zeros(1)), InvalidRequest, "tensors.threshold"),
        (lens(threshold=None), UploadMalformed, "file"),
        (lens(extra=torch.zeros(1)), UploadMalformed, "file"),
        (lens(b_enc=torch.full((M,), torch.nan)), NonFinite, "tensors.b_enc"),
        (lens(W_dec=torch.full((M, D), torch.inf)), NonFinite, "tensors.decoder"),
        (lens(b_enc=torch.zeros(M, dtype=torch.int64)), UploadMalformed, "file"),
    ],
)
def test_bad_tensors_are_refused_in_words(
    state: dict[str, torch.Tensor], error: type[SteeringError], param: str
) -> None:
    with pytest.raises(error) as raised:
        read(state)
    assert (raised.value.param, 400 <= raised.value.status < 500) == (param, True)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"architecture": "temporal"}, "config.architecture"),
        ({"architecture": 3}, "config.architecture"),
        ({"apply_b_dec_to_input": "yes"}, "config.apply_b_dec_to_input"),
        ({"normalize_activations": "whiten"}, "config.normalize_activations"),
        ({"normalize_activations": "expected_average_only_in"}, "config.input_scale"),
        ({"normalize_activations": True, "input_scale": -1}, "config.input_scale"),
        ({"activation_fn": "tanh-relu"}, "config.activation_fn"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_q"}}, "config.hook_name"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post", "hook_head_index": 3}}, "config.hook_head_index"),
        ({"metadata": {}}, "layer"),
        ({"metadata": [1]}, "config.metadata"),
    ],
)
def test_bad_configurations_name_their_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(lens(), {**SAELENS, **change})
    assert raised.value.param == param


def test_a_factor_that_the_file_leaves_out_is_asked_for_and_used() -> None:
    scaled = read(lens(), {**SAELENS, "normalize_activations": "expected_average_only_in", "input_scale": 0.5})
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(dictionaries.encode(scaled, x), dictionaries.encode(read(lens()), x / 2))
    reads = dictionaries.reads(scaled, [4])
    want = dictionaries.encode(scaled, x)[:, 4]
    p = x @ reads.direction[0] + reads.bias
    torch.testing.assert_close(torch.where(p > reads.threshold, p, 0), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{"format": "pickle"}, {"config": []}, {"model": {"id": "tiny"}}, {"model": 3}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        read(lens(), **fields)


def test_cut_files_and_huge_headers_are_refused_in_words(tmp_path: Path) -> None:
    data = safetensors.torch.save(lens())
    fields = {"name": "sae", "model": MODEL, "config": SAELENS}
    for bad in (data[:-1], data[:40], data[:7], struct.pack("<Q", 1 << 40) + data[8:], struct.pack("<Q", 2**64 - 1)):
        with pytest.raises(UploadMalformed):
            uploads.read(bad, fields)
        (tmp_path / "sae_weights.safetensors").write_bytes(bad)
        with pytest.raises(UploadMalformed):
            dictionary_files.from_path(tmp_path, fields, tmp_path)


# -- what files say of their place -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("blocks.12.hook_resid_pre", (12, "resid_pre")),
        ("blocks.0.hook_resid_mid", (0, "resid_mid")),
        ("blocks.3.attn.hook_z", (3, "attn_z")),
        ("blocks.3.hook_attn_out", (3, "attn_out")),
        ("blocks.3.mlp.hook_post", (3, "mlp_post")),
        ("blocks.3.ln2.hook_normalized", (3, "mlp_in")),
        ("model.layers.7", (7, "resid_post")),
        ("layers.7.mlp", (7, "mlp_out")),
        ("transformer.h.7.attn", (7, "attn_out")),
        ("gpt_neox.layers.7.attention", (7, "attn_out")),
        ("model.layers.7.self_attn.o_proj.input", (7, "attn_z")),
        ("model.layers.7.output", (7, "resid_post")),
        ("model.layers.7.input", (7, "resid_pre")),
        ("hook_embed", (0, "resid_pre")),
    ],
)
def test_hook_names(name: str, where: tuple[int, str]) -> None:
    assert hook_names.parse(name) == where
    assert hook_names.parse(hook_names.lens_name(*where)) == where


@pytest.mark.parametrize(
    "name", ["", "blocks.x.hook_z", "blocks.1.hook_q", "layers", "model.layers.3.norm", "blocks.1."]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        hook_names.parse(name)


def test_the_transcoders_of_gemma_scope_and_sparsify() -> None:
    own = tensors()
    gemma = {"w_enc": own["encoder"].T.contiguous(), "w_dec": own["decoder"], "affine_skip_connection": torch.eye(D)}
    gemma |= {name: own[name] for name in ("b_enc", "b_dec", "threshold")}
    sparse = {"encoder.weight": own["encoder"], "encoder.bias": own["b_enc"], "W_dec": own["decoder"]}
    sparse |= {"b_dec": own["b_dec"], "W_skip": torch.eye(D)}
    config = {"num_latents": M, "k": 3, "transcode": True, "d_in": D}
    for made in (
        read(gemma, {}, layer=2),
        read(sparse, config, hook_name="layers.2.mlp"),
    ):
        meta = made.meta
        assert isinstance(meta, DictionaryMeta)
        assert (meta.layer, meta.site, meta.read_site, meta.apply_b_dec_to_input) == (2, "mlp_out", "mlp_in", False)
        assert torch.equal(made.tensors["skip"], torch.eye(D))
        assert torch.equal(made.tensors["encoder"], own["encoder"])


def test_the_later_llama_scopes_have_a_threshold_for_each_feature() -> None:
    """As SAELens loads Llama-Scope-R1-Distill: thresholds of the scaled input, whose scale the file need not state."""
    own = tensors()
    state = {"encoder.weight": own["encoder"], "encoder.bias": own["b_enc"], "decoder.bias": own["b_dec"]}
    state |= {"decoder.weight": own["decoder"].T.contiguous(), "log_jumprelu_threshold": own["threshold"]}
    config = {"d_model": D, "expansion_factor": M / D, "hook_point_in": "blocks.2.hook_resid_post"}
    with pytest.raises(InvalidRequest) as raised:
        read(state, config)
    assert raised.value.param == "config.input_scale"
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    norms = {"dataset_average_activation_norm": {"in": 2 * D**0.5}}
    for scale, stated in ((1.0, {"input_scale": 1}), (0.5, {"input_scale": 0.5}), (0.5, norms)):
        made = read(state, {**config, **stated})
        p = scale * x @ own["encoder"].T + own["b_enc"]
        acts = torch.where(p > own["threshold"].exp(), p, 0)
        assert 0.02 < float((acts > 0).float().mean()) < 0.9
        torch.testing.assert_close(dictionaries.encode(made, x), acts, rtol=0, atol=1e-5)
        out = (acts @ own["decoder"] + own["b_dec"]) / scale
        torch.testing.assert_close(dictionaries.decode(made, acts, x), out, rtol=0, atol=1e-4)
    assert made.meta.edited_layers == (2,)
    one = read({**state, "log_jumprelu_threshold": torch.tensor(-0.5)}, {**config, "input_scale": 1})
    assert torch.equal(one.tensors["threshold"], torch.tensor(-0.5).exp().expand(M))


def test_gemma_scopes_of_the_embedding_are_scaled() -> None:
    own, scale = tensors(), D**-0.5
    state = {"W_enc": own["encoder"].T.contiguous(), "W_dec": own["decoder"]}
    state |= {name: own[name] for name in ("b_enc", "b_dec", "threshold")}
    made = read(state, {"input_scale": scale}, format="gemma_scope", hook_name="hook_embed")
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(3)) / scale
    p = (x @ own["encoder"].T) * scale + own["b_enc"]
    acts = torch.where(p > own["threshold"].clamp_min(0), p, 0)
    torch.testing.assert_close(dictionaries.encode(made, x), acts, rtol=0, atol=1e-5)
    torch.testing.assert_close(dictionaries.writes(made, [3]), own["decoder"][3:4] / scale)
    assert isinstance(made.meta, DictionaryMeta)
    assert (made.meta.layer, made.meta.site) == (0, "resid_pre")


def test_goodfires_names_no_place() -> None:
    own = tensors()
    state = {"encoder_linear.weight": own["encoder"], "encoder_linear.bias": own["b_enc"]}
    state |= {"decoder_linear.weight": own["decoder"].T.contiguous(), "decoder_linear.bias": own["b_dec"]}
    with pytest.raises(InvalidRequest) as raised:
        read(state, {})
    assert raised.value.param == "layer"
    made = read(state, {}, layer=3, site="resid_post")
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    acts = (x @ own["encoder"].T + own["b_enc"]).relu()
    torch.testing.assert_close(dictionaries.encode(made, x), acts, rtol=0, atol=1e-5)
    torch.testing.assert_close(dictionaries.decode(made, acts, x), acts @ own["decoder"] + own["b_dec"])


@pytest.mark.parametrize(("name", "where"), [("layers.2", (2, "resid_post")), ("layers.1.mlp", (1, "mlp_out"))])
def test_sparsifys_own_files(name: str, where: tuple[int, str], tmp_path: Path) -> None:
    """A dictionary and a transcoder that the library saved: the same activations and reconstructions as its own."""
    expected = safetensors.torch.load_file(SPARSIFY / "expected.safetensors")
    model = {"id": "tiny", "n_layers": 4, "d_model": 8}
    made = dictionary_files.from_path(SPARSIFY / name, {"name": "sparse", "model": model}, tmp_path)
    x, acts, out = (expected[f"{name}.{part}"] for part in ("x", "acts", "out"))
    assert 0.05 < float((acts > 0).float().mean()) < 0.9
    torch.testing.assert_close(dictionaries.encode(made, x), acts, rtol=0, atol=1e-4)
    torch.testing.assert_close(dictionaries.decode(made, acts, x), out, rtol=0, atol=1e-4)
    assert isinstance(made.meta, DictionaryMeta)
    assert (made.meta.layer, made.meta.site, made.meta.read_site is not None) == (*where, name.endswith("mlp"))


def test_a_fine_tuned_factor_is_folded_into_the_decoder() -> None:
    factor = torch.rand(M, generator=torch.Generator().manual_seed(5)) + 0.5
    made = read(lens(finetuning_scaling_factor=factor), {**SAELENS, "finetuning_scaling_factor": True})
    torch.testing.assert_close(made.tensors["decoder"], factor[:, None] * tensors()["decoder"])
    with pytest.raises(UploadMalformed):
        read(lens(finetuning_scaling_factor=factor))
