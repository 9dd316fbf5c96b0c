"""Writes `tests/data/dictionaries`: small dictionaries in the libraries' own files, and what they compute.

    pip install sae-lens==6.54.12 dictionary-learning==0.1.0
    python tests/data/make_dictionaries.py

Each folder is what its library saves. `expected.safetensors` holds, for each, the inputs `<name>.x` [n, d], the
activations `<name>.acts` [n, m] of the library's own encoder and the reconstructions `<name>.out` [n, d_out] of its
decoder.
"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import llama_scope_sae_huggingface_loader, sparsify_disk_loader
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

OUT = Path(__file__).parent / "dictionaries"
D, M, N = 8, 20, 24
expected: dict[str, torch.Tensor] = {}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def note(name: str, x: torch.Tensor, acts: torch.Tensor, out: torch.Tensor) -> None:
    assert 0.02 < float((acts != 0).float().mean()) < 0.9, f"{name}: {float((acts != 0).float().mean())} active"
    expected.update({f"{name}.x": x, f"{name}.acts": acts, f"{name}.out": out})


def fill(sae: torch.nn.Module, seed: int) -> None:
    for i, (name, parameter) in enumerate(sorted(sae.named_parameters())):
        value = noise(*parameter.shape, seed=1000 * seed + i)
        if name in ("threshold", "r_mag"):
            value = value.abs() / 3 if name == "threshold" else value / 3
        elif parameter.dim() == 1:
            value = value / 3
        parameter.data = value


def saelens(name: str, architecture: str, hook: str = "blocks.2.hook_resid_post", **fields: Any) -> None:
    about = {"model_name": "tiny", "hook_name": hook, **fields.pop("metadata", {})}
    config = {"architecture": architecture, "d_in": D, "d_sae": M, "metadata": about, **fields}
    sae = SAE.from_dict(config)
    fill(sae, len(expected))
    if architecture == "matching_pursuit":
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=1)
    sae.cfg.metadata = SAEMetadata(**about)
    sae.save_model(OUT / name)
    sae = SAE.load_from_disk(OUT / name)  # what is compared is what a user of the file gets
    x = 2 * noise(N, D, seed=7)
    with torch.no_grad():
        acts = sae.encode(x)
        note(name, x, acts, sae.decode(acts))


def saelens_v5(name: str, weights: str, **fields: Any) -> None:
    """A flat configuration as versions before 6 wrote it, around weights that SAELens saved."""
    (OUT / name).mkdir()
    shutil.copy(OUT / weights / "sae_weights.safetensors", OUT / name)
    config = {
        "d_in": D, "d_sae": M, "dtype": "float32", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_pre",
        "hook_layer": 1, "hook_head_index": None, "activation_fn_str": "relu", "finetuning_scaling_factor": False,
        "normalize_activations": "none", "context_size": 128, "sae_lens_training_version": "5.3.0", **fields,
    }  # fmt: skip
    (OUT / name / "cfg.json").write_text(json.dumps(config))
    sae = SAE.load_from_disk(OUT / name)
    x = 2 * noise(N, D, seed=8)
    with torch.no_grad():
        acts = sae.encode(x)
        note(name, x, acts, sae.decode(acts))


def learned(name: str, model: Any, kind: str, **trainer: Any) -> None:
    fill(model, len(expected))
    if hasattr(model, "threshold") and kind != "JumpReluAutoEncoder":
        model.threshold.fill_(0.4)
    (OUT / name).mkdir()
    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    save_file(state, OUT / name / "ae.safetensors")
    about = {"dict_class": kind, "activation_dim": D, "dict_size": M, "layer": 1, "lm_name": "org/tiny", **trainer}
    (OUT / name / "config.json").write_text(json.dumps({"trainer": about, "buffer": {"ctx_len": 128}}))
    x = 2 * noise(N, D, seed=9)
    with torch.no_grad():
        acts = model.encode(x)
        note(name, x, acts, model.decode(acts))


def gemma_scope() -> None:
    """The layout of Gemma Scope's `params.npz`; the formula is SAELens's JumpReLU."""
    sae = SAE.from_dict({"architecture": "jumprelu", "d_in": D, "d_sae": M, "apply_b_dec_to_input": False})
    fill(sae, 99)
    (OUT / "gemma_scope").mkdir()
    np.savez(OUT / "gemma_scope" / "params.npz", **{n: p.detach().numpy() for n, p in sae.named_parameters()})
    x = 2 * noise(N, D, seed=10)
    with torch.no_grad():
        acts = sae.encode(x)
        note("gemma_scope", x, acts, sae.decode(acts))


def sparsify() -> None:
    """sparsify's own layout; SAELens reads the file, but for W_dec, which its loader transposes."""
    folder = OUT / "layers.2"
    folder.mkdir()
    tensors = {
        "encoder.weight": noise(M, D, seed=1), "encoder.bias": noise(M, seed=2) / 3,
        "W_dec": noise(M, D, seed=3), "b_dec": noise(D, seed=4) / 3,
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": False, "num_latents": M, "k": 4,
              "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    _, state = sparsify_disk_loader(folder, cfg_overrides={"dtype": "float32"})
    sae = SAE.from_dict({"architecture": "topk", "k": 4, "d_in": D, "d_sae": M, "apply_b_dec_to_input": True})
    sae.load_state_dict({**state, "W_dec": state["W_dec"].T})
    x = 2 * noise(N, D, seed=11)
    with torch.no_grad():
        acts = sae.encode(x)
        note("layers.2", x, acts, sae.decode(acts))


def llama_scope() -> None:
    folder = OUT / "llama_scope"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": noise(M, D, seed=21), "encoder.bias": noise(M, seed=22) / 3,
        "decoder.weight": noise(D, M, seed=23), "decoder.bias": noise(D, seed=24) / 3,
    }  # fmt: skip
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    config = {"d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": 0.7,
              "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post",
              "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(OUT / subfolder / filename)

    with patch("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", local):
        cfg, state, _ = llama_scope_sae_huggingface_loader("x", "llama_scope", cfg_overrides={"dtype": "float32"})
    used = ("architecture", "d_in", "d_sae", "apply_b_dec_to_input")
    sae = SAE.from_dict({name: cfg[name] for name in used})
    sae.load_state_dict(state)
    sae.fold_activation_norm_scaling_factor(D**0.5 / 5.0)
    x = 2 * noise(N, D, seed=12)
    with torch.no_grad():
        acts = sae.encode(x)
        note("llama_scope", x, acts, sae.decode(acts))


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    saelens("standard", "standard", apply_b_dec_to_input=True)
    saelens("jumprelu", "jumprelu", apply_b_dec_to_input=True)
    saelens("jumprelu_plain", "jumprelu", apply_b_dec_to_input=False)
    saelens("gated", "gated", apply_b_dec_to_input=True)
    saelens("topk", "topk", k=5, apply_b_dec_to_input=True)
    saelens("topk_rescaled", "topk", k=5, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=True)
    saelens("matching_pursuit", "matching_pursuit", max_iterations=6, residual_threshold=0.5)
    saelens("constant_norm", "standard", normalize_activations="constant_norm_rescale", apply_b_dec_to_input=True)
    saelens("layer_norm", "jumprelu", normalize_activations="layer_norm", apply_b_dec_to_input=False)
    writes = {"metadata": {"hook_name_out": "blocks.2.hook_mlp_out"}}
    hook = "blocks.2.ln2.hook_normalized"
    saelens("transcoder", "skip_transcoder", hook, d_out=D, apply_b_dec_to_input=False, **writes)
    saelens_v5("v5_standard", "standard", architecture="standard")
    saelens_v5("v5_topk", "topk", activation_fn_str="topk", activation_fn_kwargs={"k": 3}, apply_b_dec_to_input=False)
    learned("dl_standard", AutoEncoder(D, M), "AutoEncoder")
    learned("dl_gated", GatedAutoEncoder(D, M), "GatedAutoEncoder")
    learned("dl_jumprelu", JumpReluAutoEncoder(D, M), "JumpReluAutoEncoder")
    learned("dl_batchtopk", BatchTopKSAE(D, M, 4), "BatchTopKSAE", k=4)
    learned("dl_topk", AutoEncoderTopK(D, M, 4), "AutoEncoderTopK", k=4)
    gemma_scope()
    sparsify()
    llama_scope()
    save_file({name: tensor.detach().contiguous() for name, tensor in expected.items()}, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
