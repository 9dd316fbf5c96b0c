"""Sparse dictionaries as other projects store them, to a `dictionary` asset: one function per format.

| format | files | encoder | b_dec before the encoder |
|---|---|---|---|
| saelens | `cfg.json` (flat before version 6), `sae_weights.safetensors` | see `steering/formats/saelens.py` | stated |
| gemma_scope | `params.npz`, or `params.safetensors` with names in lower case | JumpReLU, [d, m] | no |
| sparsify | `cfg.json`, `sae.safetensors` | TopK, [m, d] | yes, but for transcoders |
| llama_scope | `hyperparams.json`, `final.safetensors` | JumpReLU, one threshold, [m, d], on √d / mean norm · x | no |
| the same, R1-Distill | `config.json`, `sae_weights.safetensors` | JumpReLU, exp(`log_jumprelu_threshold`) | no |
| goodfire | the state of a `.pt` as safetensors | ReLU, [m, d] | no |
| dictionary_learning | `config.json`, the state of `ae.pt` as safetensors | by `dict_class` | yes, but for JumpReLU |

A file's layer and site are those of its hook's name (`steering/formats/hook_names.py`), or the fields `hook_name`, or
`layer` and `site`, that are given beside it. Gemma Scope's and Goodfire's files name none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from steersman.steering import labels
from steersman.steering.assets import D_MODEL_SITES, DTYPES, Asset, parse_metadata
from steersman.steering.errors import InvalidRequest, UploadMalformed
from steersman.steering.formats import hook_names, saelens
from steersman.steering.formats.hook_names import MLP_IN
from steersman.steering.formats.parts import Parts, flag, matrix, number, row, stated_scale, take_only, text
from steersman.steering.sites import Site

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
_OWN: Final = ("format", "config", "hook_name", "labels")  # fields that are no metadata


def gemma_scope(tensors: Tensors, config: Config) -> Parts:
    """JumpReLU with a threshold for each feature; b_dec is not taken from the input.

    Those of Gemma's embedding were trained before the model multiplies it by √d: give 1/√d as `config.input_scale`.
    """
    tensors = {re.sub(r"^w_", "W_", name): tensor for name, tensor in tensors.items()}
    transcoder = "affine_skip_connection" in tensors
    skip = {"affine_skip_connection": "skip"} if transcoder else {}
    take_only(tensors, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", *skip))
    out = {
        "encoder": matrix(tensors, "W_enc").T,
        "decoder": matrix(tensors, "W_dec"),
        **{name: row(tensors, name) for name in ("b_enc", "b_dec", "threshold")},
        **{ours: matrix(tensors, theirs) for theirs, ours in skip.items()},
    }
    meta: dict[str, Any] = {"architecture": "jumprelu"}
    if "input_scale" in config:
        meta["input_scale"] = stated_scale(config)
    if transcoder:
        meta |= {"site": Site.MLP_OUT.value, "read_site": MLP_IN}
    return Parts(meta, out)


def sparsify(tensors: Tensors, config: Config) -> Parts:
    """TopK; W_dec is stored [m, d] already."""
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise InvalidRequest("only unsigned topk is known", "config.activation")
    transcode = flag(config, "transcode", False)
    skip = {"W_skip"} & set(tensors)
    take_only(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *skip))
    out = {
        "encoder": matrix(tensors, "encoder.weight"),
        "decoder": matrix(tensors, "W_dec"),
        "b_enc": row(tensors, "encoder.bias"),
        "b_dec": row(tensors, "b_dec"),
        **({"skip": matrix(tensors, "W_skip")} if skip else {}),
    }
    meta = {"architecture": "topk", "k": number(config, "k", int), "apply_b_dec_to_input": not transcode}
    if transcode:
        meta |= {"site": Site.MLP_OUT.value, "read_site": MLP_IN}
    return Parts(meta, out)


def llama_scope(tensors: Tensors, config: Config) -> Parts:
    """JumpReLU of one threshold for all features, which is stated in the units of x.

    Later ones (Llama-Scope-R1-Distill) have a `log_jumprelu_threshold` for each in the units of the scaled input, and
    need not say how it is scaled.
    """
    later = {"log_jumprelu_threshold"} & set(tensors)
    take_only(tensors, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", *later))
    hook = text(config, "hook_point_in")
    if text(config, "hook_point_out", hook) != hook:
        raise InvalidRequest(
            "a dictionary that reads one place and writes another is not known", "config.hook_point_out"
        )
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise InvalidRequest("only jumprelu is known", "config.act_fn")
    encoder = matrix(tensors, "encoder.weight")
    norms = config.get("dataset_average_activation_norm")
    if isinstance(norms, Mapping):
        scale = encoder.shape[1] ** 0.5 / number(norms, "in", float, "config.dataset_average_activation_norm")
    elif later:
        scale = stated_scale(config)
    else:
        raise InvalidRequest("needs the object {in, out}", "config.dataset_average_activation_norm")
    if later:
        threshold = row(tensors, "log_jumprelu_threshold", len(encoder)).float().exp()
    else:
        threshold = torch.full((len(encoder),), number(config, "jump_relu_threshold", float) * scale)
    out = {
        "encoder": encoder,
        "decoder": matrix(tensors, "decoder.weight").T,
        "b_enc": row(tensors, "encoder.bias"),
        "b_dec": row(tensors, "decoder.bias"),
        "threshold": threshold,
    }
    return Parts({"architecture": "jumprelu", "input_scale": scale}, out, hook, model="meta-llama/Llama-3.1-8B")


def goodfire(tensors: Tensors, config: Config) -> Parts:
    """ReLU; b_dec is not taken from the input. The file says nothing else of itself."""
    take_only(tensors, [f"{part}_linear.{name}" for part in ("encoder", "decoder") for name in ("weight", "bias")])
    out = {
        "encoder": matrix(tensors, "encoder_linear.weight"),
        "decoder": matrix(tensors, "decoder_linear.weight").T,
        "b_enc": row(tensors, "encoder_linear.bias"),
        "b_dec": row(tensors, "decoder_linear.bias"),
    }
    return Parts({"architecture": "standard", "apply_b_dec_to_input": False}, out)


def dictionary_learning(tensors: Tensors, config: Config) -> Parts:
    """By the trainer's `dict_class`. The state also says of TopK what its threshold is: `"encode": "threshold"` in the
    configuration takes that, as the library's own `use_threshold` does, and makes it a JumpReLU."""
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        raise InvalidRequest("needs the trainer's configuration", "config.trainer")
    known = {name: tensors[name] for name in tensors if name not in ("k", "group_sizes", "activation_dim", "dict_size")}
    rename = {
        "bias": "b_dec",
        "decoder_bias": "b_dec",
        "encoder.bias": "b_enc",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
    }
    state = {rename.get(name, name): tensor for name, tensor in known.items()}
    kind = text(trainer, "dict_class", param="config.trainer")
    if kind not in _LEARNED:
        raise InvalidRequest(f"'{kind}' is not known; known: {', '.join(_LEARNED)}", "config.trainer.dict_class")
    architecture, names = _LEARNED[kind]
    meta: dict[str, Any] = {"architecture": architecture, "apply_b_dec_to_input": kind != "JumpReluAutoEncoder"}
    if architecture == "topk":
        if config.get("encode") == "threshold":
            meta["architecture"], names = "jumprelu", (*names, "threshold")
        else:
            meta["k"] = number(trainer, "k", int, "config.trainer")
            state.pop("threshold", None)
    whole = {"encoder": "W_enc", "decoder": "W_dec"}
    linear = all(name not in state for name in whole.values())
    weights = [f"{ours}.weight" if linear else theirs for ours, theirs in whole.items()]
    take_only(state, (*weights, "b_dec", *names))
    encoder, decoder = (matrix(state, name) for name in weights)
    out = {"encoder": encoder if linear else encoder.T, "decoder": decoder.T if linear else decoder}
    out |= {"b_dec": row(state, "b_dec")} | {n: row(state, n, len(out["encoder"])) for n in names}
    layer = number(trainer, "layer", int, "config.trainer")
    model = trainer.get("lm_name")
    return Parts(meta, out, f"blocks.{layer}.hook_resid_post", model=model if isinstance(model, str) else None)


_LEARNED: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "AutoEncoder": ("standard", ("b_enc",)),
    "AutoEncoderTopK": ("topk", ("b_enc",)),
    "BatchTopKSAE": ("jumprelu", ("b_enc", "threshold")),
    "MatryoshkaBatchTopKSAE": ("jumprelu", ("b_enc", "threshold")),
    "JumpReluAutoEncoder": ("jumprelu", ("b_enc", "threshold")),
    "GatedAutoEncoder": ("gated", ("b_gate", "b_mag", "r_mag")),
}


def basis(tensors: Tensors, config: Config) -> Parts:
    """Directions without an encoder: SNMF features F [d, k], or rows W_dec [k, d] of concepts and meta-features.

    They are brought to length one, so that a value is how far x moves, as in SNMF's α·F_j/‖F_j‖. With
    `"coordinates": true` the encoder is the pseudo-inverse, so that a feature is its coordinate in the basis.
    """
    rows = matrix(tensors, "F").T if "F" in tensors else matrix(tensors, "W_dec")
    take_only(tensors, ("F",) if "F" in tensors else ("W_dec",))
    norms = rows.double().norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise InvalidRequest("a feature has the length zero", "file")
    rows = (rows.double() / norms).float()
    out = {"decoder": rows, "b_dec": torch.zeros(rows.shape[1])}
    if not flag(config, "coordinates", False):
        return Parts({"architecture": "basis"}, out)
    if len(rows) > rows.shape[1] or torch.linalg.matrix_rank(rows.double()) < len(rows):
        raise InvalidRequest("the directions are not independent, so they give no coordinates", "config.coordinates")
    out |= {"encoder": torch.linalg.pinv(rows.double()).T.float(), "b_enc": torch.zeros(len(rows))}
    return Parts({"architecture": "linear"}, out)


FORMATS: Final[dict[str, Callable[[Tensors, Config], Parts]]] = {
    "saelens": saelens.from_saelens,
    "gemma_scope": gemma_scope,
    "sparsify": sparsify,
    "llama_scope": llama_scope,
    "goodfire": goodfire,
    "dictionary_learning": dictionary_learning,
    "basis": basis,
}


def guess(tensors: Tensors, config: Config) -> str:
    """The format, by what only it states."""
    for name, found in (
        ("dictionary_learning", "trainer" in config),
        ("llama_scope", "hook_point_in" in config),
        ("saelens", "d_sae" in config or "hook_point" in config),
        ("sparsify", "expansion_factor" in config or "num_latents" in config),
        ("goodfire", "encoder_linear.weight" in tensors),
        ("gemma_scope", not config and {"threshold", "b_dec"} < set(tensors)),
    ):
        if found:
            return name
    raise InvalidRequest(f"it cannot be told which format this is; name one of {', '.join(FORMATS)}", "format")


def build(tensors: Tensors, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The asset's metadata and tensors.

    `fields` go before what the file says; of them `format`, `config` (the object of the file's configuration),
    `hook_name` and `labels` are for the reading alone.
    """
    config = fields.get("config", {})
    if not isinstance(config, Mapping):
        raise InvalidRequest("must be the object of the configuration file", "config")
    chosen = fields.get("format") or guess(tensors, config)
    if not isinstance(chosen, str) or chosen not in FORMATS:
        raise InvalidRequest(f"'{chosen!s:.64}' is no format of dictionaries; known: {', '.join(FORMATS)}", "format")
    parts = FORMATS[chosen](tensors, config)
    meta = {"kind": "dictionary", "provenance": {"format": chosen, "config": dict(config)}, **parts.meta}
    stated = fields.get("hook_name")
    hook = parts.hook if stated is None else str(stated)
    if hook is not None and not {"layer", "site"} <= set(fields):
        where = hook_names.parse(hook, "config.hook_name" if stated is None else "hook_name")
        meta["layer"] = where.layer
        meta.setdefault("site", where.site)
    if parts.hook_out is not None and "site" not in fields:
        meta["site"] = hook_names.parse(parts.hook_out, "config.hook_name_out").site
    meta |= {name: value for name, value in fields.items() if name not in _OWN and value is not None}
    for name in ("layer", "site"):
        if name not in meta:
            raise InvalidRequest(
                f"the file does not say at which {name} it was trained: give {name}, or hook_name", name
            )
    meta["model"] = _model(meta.get("model"), parts, str(meta["site"]))
    out = {name: _plain(name, tensor) for name, tensor in parts.tensors.items()}
    if "labels" in fields:
        given = fields["labels"]
        read = labels.parse_text(given) if isinstance(given, str | bytes) else labels.parse(given)
        out |= labels.pack(read, len(out["decoder"]))
    return meta, out


def to_asset(tensors: Tensors, fields: Mapping[str, Any]) -> Asset:
    """The asset, in memory."""
    meta, out = build(tensors, fields)
    return Asset(parse_metadata(meta), out)


def _model(given: Any, parts: Parts, site: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise InvalidRequest("must be an object {id, n_layers, d_model}", "model")
    known: dict[str, Any] = {} if parts.model is None else {"id": parts.model}
    if site in {each.value for each in D_MODEL_SITES}:
        known["d_model"] = parts.tensors["decoder"].shape[1]
    model = known | dict(given or {})
    for name in ("id", "n_layers", "d_model"):
        if name not in model:
            raise InvalidRequest(f"the file does not say the model's {name}: give it as model.{name}", f"model.{name}")
    return model


def _plain(name: str, tensor: Tensor) -> Tensor:
    """One of the number types that are stored; float64 loses what float32 has no room for."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        raise UploadMalformed(f"{name} is {tensor.dtype}, not floating point", "file")
    return (tensor if tensor.dtype in DTYPES.values() else tensor.float()).contiguous()
