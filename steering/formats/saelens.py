"""SAELens: `cfg.json` and `sae_weights.safetensors` to the parts of a dictionary, and a dictionary back.

W_enc is [d, m], W_dec [m, d_out]. A `cfg.json` of a version before 6 is flat and has other names for some fields, and
other defaults: b_dec is taken from the input unless it says otherwise. BatchTopK and Matryoshka dictionaries are saved
as JumpReLU. What rescales activations by the decoder's norms, or by a fine-tuned factor, is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.errors import AssetKindMismatch, InvalidRequest
from steersman.steering.formats.hook_names import lens_name, parse
from steersman.steering.formats.parts import Parts, flag, matrix, number, row, stated_scale, take_only, text

VERSION: Final = "6.0.0"  # of the configuration that is written
_OLD_NAMES: Final = {
    "hook_point": "hook_name",
    "activation_fn_str": "activation_fn",
    "hook_point_head_index": "hook_head_index",
}
_NUMBERS: Final[dict[str, tuple[str, ...]]] = {  # of an architecture: its vectors of [m]
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "matching_pursuit": (),
}
_TRANSCODERS: Final = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def from_saelens(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Parts:
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    about = config.get("metadata") or {}
    if not isinstance(about, Mapping):
        raise InvalidRequest("must be an object", "config.metadata")
    about = {**config, **about}
    if about.get("hook_head_index") is not None:
        raise InvalidRequest("a dictionary of one head is not known", "config.hook_head_index")
    stated = text(config, "architecture", "standard")
    architecture, skip = _TRANSCODERS.get(stated, (stated, False))
    k = _k(config)
    if architecture == "standard" and config.get("activation_fn") == "topk":
        architecture = "topk"
    if architecture not in _NUMBERS:
        known = ", ".join((*_NUMBERS, *_TRANSCODERS))
        raise InvalidRequest(f"'{stated[:64]}' is not known; known: {known}", "config.architecture")
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise InvalidRequest("only relu and topk are known", "config.activation_fn")
    transcodes = stated in _TRANSCODERS
    meta: dict[str, Any] = {
        "architecture": architecture,
        "apply_b_dec_to_input": flag(config, "apply_b_dec_to_input", not transcodes) and not transcodes,
        **_normalisation(config),
    }
    if architecture == "topk":
        meta["k"] = k
    if architecture == "matching_pursuit":
        meta |= {
            n: config[n] for n in ("residual_threshold", "max_iterations", "stop_on_duplicate_support") if n in config
        }
    out = _tensors(tensors, config, architecture, skip)
    hook, hook_out = (about.get(name) for name in ("hook_name", "hook_name_out"))
    if transcodes:
        if not isinstance(hook, str) or not isinstance(hook_out, str):
            raise InvalidRequest("a transcoder needs hook_name and hook_name_out", "config.hook_name_out")
        meta["read_site"] = parse(hook).site
        if parse(hook).layer != parse(hook_out, "config.hook_name_out").layer:
            raise InvalidRequest("reads and writes different layers, which is not known", "config.hook_name_out")
    model = about.get("model_name")
    return Parts(
        meta,
        out,
        hook if isinstance(hook, str) else None,
        hook_out if transcodes else None,
        model if isinstance(model, str) else None,
    )


def _tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], architecture: str, skip: bool
) -> dict[str, Tensor]:
    tied = architecture == "matching_pursuit"
    fine = flag(config, "finetuning_scaling_factor", False)
    extra = [name for name, has in (("finetuning_scaling_factor", fine), ("W_skip", skip)) if has]
    encoder = () if tied else ("W_enc",)
    take_only(tensors, (*encoder, "W_dec", "b_dec", *_NUMBERS[architecture], *extra))
    out = {"decoder": matrix(tensors, "W_dec"), "b_dec": row(tensors, "b_dec")}
    if not tied:
        out["encoder"] = matrix(tensors, "W_enc").T
    out |= {name: row(tensors, name) for name in _NUMBERS[architecture]}
    if skip:
        out["skip"] = matrix(tensors, "W_skip")
    if fine:
        out["decoder"] = (out["decoder"].double() * row(tensors, "finetuning_scaling_factor").double()[:, None]).float()
    if flag(config, "rescale_acts_by_decoder_norm", False):
        if architecture != "topk":
            raise InvalidRequest("is for topk", "config.rescale_acts_by_decoder_norm")
        norms = out["decoder"].double().norm(dim=1)
        out["encoder"] = (out["encoder"].double() * norms[:, None]).float()
        out["b_enc"] = (out["b_enc"].double() * norms).float()
        out["decoder"] = (out["decoder"].double() / norms[:, None]).float()
    return out


def _k(config: Mapping[str, Any]) -> int | None:
    """k of TopK, where older configurations say it too."""
    arguments = config.get("activation_fn_kwargs")
    if "k" not in config and isinstance(arguments, Mapping) and "k" in arguments:
        return number(arguments, "k", int, "config.activation_fn_kwargs")
    return number(config, "k", int) if "k" in config else None


def _normalisation(config: Mapping[str, Any]) -> dict[str, Any]:
    stated = config.get("normalize_activations")
    if stated in (None, False, "none"):
        return {}
    if stated in ("constant_norm_rescale", "layer_norm"):
        return {"normalize": stated}
    if stated not in (True, "expected_average_only_in"):
        raise InvalidRequest(f"'{stated!s:.64}' is not known", "config.normalize_activations")
    return {"input_scale": stated_scale(config)}


def to_saelens(asset: Asset) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`cfg.json`'s object and the tensors of `sae_weights.safetensors`, as version 6 reads them."""
    meta = asset.meta
    if not isinstance(meta, DictionaryMeta):
        raise AssetKindMismatch(f"SAELens holds dictionaries; {asset.ref} is a {meta.kind}")
    if meta.architecture not in _NUMBERS:
        raise InvalidRequest(f"SAELens has no {meta.architecture} dictionaries, which {asset.ref} is")
    scale = meta.input_scale
    if meta.architecture == "matching_pursuit" and scale != 1:  # its rows are of length one: nothing folds into them
        raise InvalidRequest(f"{asset.ref} scales its input, which SAELens's matching pursuit does not")
    decoder = asset.tensors["decoder"]
    out = {
        "W_dec": decoder if scale == 1 else (decoder.double() / scale).float(),
        "b_dec": asset.tensors["b_dec"] if scale == 1 else (asset.tensors["b_dec"].double() / scale).float(),
        **{name: asset.tensors[name] for name in _NUMBERS[meta.architecture]},
    }
    d = decoder.shape[1]
    if meta.architecture != "matching_pursuit":
        encoder = asset.tensors["encoder"]
        out["W_enc"] = (encoder if scale == 1 else (encoder.double() * scale).float()).T.contiguous()
        d = encoder.shape[1]
    config: dict[str, Any] = {
        "architecture": meta.architecture,
        "d_in": d,
        "d_sae": decoder.shape[0],
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": meta.apply_b_dec_to_input,
        "normalize_activations": meta.normalize,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "model_name": meta.model.id,
            "hook_name": lens_name(meta.layer, meta.read_site or meta.site),
        },
    }
    if meta.architecture == "topk":
        config["k"] = meta.k
    if meta.architecture == "matching_pursuit":
        config |= {
            "residual_threshold": meta.residual_threshold,
            "max_iterations": meta.max_iterations,
            "stop_on_duplicate_support": meta.stop_on_duplicate_support,
        }
    if meta.read_site is not None:
        _as_transcoder(asset, meta, config, out)
    dtypes = {tensor.dtype for tensor in out.values()}
    if len(dtypes) > 1:  # SAELens has one number type
        config["dtype"] = "float32"
        out = {name: tensor.float() for name, tensor in out.items()}
    return config, {name: torch.clone(tensor.contiguous()) for name, tensor in out.items()}


def _as_transcoder(asset: Asset, meta: DictionaryMeta, config: dict[str, Any], out: dict[str, Tensor]) -> None:
    kind = (meta.architecture, "skip" in asset.tensors)
    names = {value: name for name, value in _TRANSCODERS.items()}
    if kind not in names:
        raise InvalidRequest(f"SAELens has no {meta.architecture} transcoders, which {asset.ref} is")
    config["architecture"], config["d_out"] = names[kind], asset.shapes["decoder"][1]
    config["metadata"]["hook_name_out"] = lens_name(meta.layer, meta.site)
    if kind[1]:
        out["W_skip"] = asset.tensors["skip"]
