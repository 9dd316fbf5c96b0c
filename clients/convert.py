"""Files of other projects as native assets, on the user's own machine: pickles never reach a server.

    steersman assets convert FILE --name NAME --metadata '{"model": {"id": .., "n_layers": .., "d_model": ..}}'

| what | becomes | its layer L, 0-based, acts at |
|---|---|---|
| steering-vectors `.pt` | vector | the output of block L, of its attention or of its MLP, as its `layer_type` says |
| vLLM-Hook `.pt`, `{dir, avg_proj}` | vector | the output of block L; the file names none, so `layers` must be given |
| a bare tensor `.pt` (EasySteer) | vector | the same |
| pyreft folder, LoReFT | affine | the output of block L, or its input where the folder says `block_input` |
| dictionary_learning `ae.pt` beside its `config.json` | dictionary | the output of block L |
| Goodfire's `.pt`, maps `encoder_linear` and `decoder_linear` | dictionary | the output of block `layer`, to be given |
| GGUF, `.svec`, safetensors, JSON | what it says | as those formats' own modules say |

The result is one safetensors file whose header holds the metadata; `steersman assets add` and the upload route take it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from steersman.clients import pickles
from steersman.steering.assets import Asset, ModelRef
from steersman.steering.errors import InvalidRequest, LayerOutOfRange, PayloadTooLarge, SiteUnsupported, UploadMalformed
from steersman.steering.formats import native, saes, uploads
from steersman.steering.formats.foreign import assemble, needed_model, stack, stated_model
from steersman.steering.sites import Site

_LAYER_TYPES: Final = {"decoder_block": Site.RESID_POST, "self_attn": Site.ATTN_OUT, "mlp": Site.MLP_OUT}
_COMPONENTS: Final = {"block_output": Site.RESID_POST, "block_input": Site.RESID_PRE}
_LOREFT: Final = "<class 'pyreft.interventions.LoreftIntervention'>"
_REPRESENTATION: Final = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
_MAX_CONFIG: Final = 2**20


def convert(path: Path, fields: Mapping[str, Any]) -> Asset:
    """The asset in a file or folder. `fields`: metadata that it does not state itself, such as `model` and `name`."""
    if path.is_dir():
        return from_pyreft(path, fields)
    if pickles.is_torch_file(path):
        return from_torch(path, fields)
    if path.stat().st_size > pickles.MAX_BYTES:
        raise PayloadTooLarge(f"larger than {pickles.MAX_BYTES >> 30} GiB", "file")
    data = path.read_bytes()
    if path.suffix == ".json":
        return native.from_json({**native.loads(data, "file"), **fields})
    return uploads.read(data, dict(fields) or None)


def from_torch(path: Path, fields: Mapping[str, Any]) -> Asset:
    """A `.pt` file, told apart by what it holds."""
    saved = pickles.read(path)
    if isinstance(saved, pickles.SteeringVectorFile):
        return from_steering_vectors(saved, fields)
    if isinstance(saved, Tensor):
        return from_direction({"dir": saved}, "tensor", fields)
    if isinstance(saved, dict) and "dir" in saved and set(saved) <= {"dir", "avg_proj"}:
        return from_direction(saved, "vllm-hook", fields)
    state = isinstance(saved, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in saved.items())
    if state and "encoder_linear.weight" in saved:
        return saes.to_asset(saved, {"format": "goodfire", "site": Site.RESID_POST.value, **fields})
    if state and (config := path.parent / "config.json").is_file():
        stated = {"format": "dictionary_learning", "config": native.loads(config.read_bytes(), "config")}
        return saes.to_asset(saved, {**stated, **fields})
    raise UploadMalformed(
        "no steering vector, {dir, avg_proj}, tensor, or dictionary beside a config.json is in it", "file"
    )


def from_steering_vectors(saved: pickles.SteeringVectorFile, fields: Mapping[str, Any]) -> Asset:
    """The library adds row L to what the module L of `layer_type` returns; a negative L counts from the last block.

    `self_attn` and `mlp` are modules of the block: where a family norms what they return before the stream takes it
    (Gemma 2, OLMo 2), `attn_out` and `mlp_out` are behind that norm, and the direction acts elsewhere than it did.
    """
    model, rest = stated_model(fields)
    model = needed_model(model, "a steering vector")
    site = _LAYER_TYPES.get(saved.layer_type) if isinstance(saved.layer_type, str) else None
    if site is None:
        raise SiteUnsupported(f"layer_type {str(saved.layer_type)[:64]!r}; wanted: {', '.join(_LAYER_TYPES)}", "file")
    rows: dict[int, Tensor] = {}
    for key, row in saved.layer_activations.items():
        layer = key + model.n_layers if type(key) is int and key < 0 else key
        if type(layer) is not int or layer < 0 or layer in rows:
            raise UploadMalformed(f"layer_activations: {str(key)[:64]!r} is no layer, or one given twice", "file")
        if layer >= model.n_layers:
            raise LayerOutOfRange(f"layer {layer} does not exist: {model.id} has {model.n_layers} layers", "file")
        rows[layer] = _vector(row, f"layer_activations[{layer}]")
    layers, vectors = stack(rows)
    provenance = {"format": "steering-vectors", "layer_type": saved.layer_type}
    metadata = {"kind": "vector", "site": site, "layers": layers, "model": _json(model), "provenance": provenance}
    return assemble(metadata, rest, {"vectors": vectors})


def from_direction(saved: Mapping[str, Any], form: str, fields: Mapping[str, Any]) -> Asset:
    """One direction for the output of each block that `fields` names in `layers`, since the file names none.

    vLLM-Hook's `add_vector` is op `add`. Its `adjust_rs` is op `clamp` to `avg_proj`, kept in the provenance, for a
    `dir` of unit length; but it reads the stream before the MLP's part has been added, and `clamp` reads all of it.
    """
    model, rest = stated_model(fields)
    layers = rest.pop("layers", None)
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise InvalidRequest("the file names no layer: give layers, a list of integers", "layers")
    model = needed_model(model, "the file")
    if max(layers) >= model.n_layers:
        raise LayerOutOfRange(f"layer {max(layers)} does not exist: {model.id} has {model.n_layers} layers", "layers")
    row = _vector(saved["dir"], "dir")
    provenance: dict[str, Any] = {"format": form}
    if (average := saved.get("avg_proj")) is not None:
        if isinstance(average, Tensor) and average.numel() != 1:
            raise UploadMalformed(f"avg_proj has the shape {list(average.shape)}; wanted: one number", "file")
        if not isinstance(average, Tensor | float | int) or not math.isfinite(average):
            raise UploadMalformed("avg_proj is no finite number", "file")
        provenance["avg_proj"] = float(average)
    metadata = {
        "kind": "vector",
        "site": Site.RESID_POST,
        "layers": layers,
        "model": _json(model),
        "provenance": provenance,
    }
    return assemble(metadata, rest, {"vectors": row.expand(len(layers), -1)})


def from_pyreft(folder: Path, fields: Mapping[str, Any]) -> Asset:
    """LoReFT, x + Rᵀ(Wx + b − Rx) at the output of block L: `rotate_layer` is Rᵀ [d, r], `weight` is W [r, d].

    The positions at which it was trained to act are not in the folder: give `tokens`, or name them in the request.
    """
    model, rest = stated_model(fields)
    model = needed_model(model, "a pyreft folder")
    sites = set()
    found: dict[int, dict[str, Tensor]] = {}
    for layer, site, rank, file in _representations(folder):
        if layer in found:
            raise UploadMalformed(f"layer {layer} has two interventions; an asset holds one for each", "config.json")
        sites.add(site)
        found[layer] = _loreft(folder / file, rank)
    if len(sites) != 1:
        raise UploadMalformed("its interventions are at several sites; an asset has one", "config.json")
    tensors: dict[str, Tensor] = {}
    for name in ("R", "A", "b"):
        layers, tensors[name] = stack({layer: parts[name] for layer, parts in found.items()})
    metadata = {
        "kind": "affine",
        "site": sites.pop(),
        "layers": layers,
        "model": _json(model),
        "provenance": {"format": "pyreft", "intervention": "LoReFT"},
    }
    return assemble(metadata, rest, tensors)


def _representations(folder: Path) -> list[tuple[int, Site, int | None, str]]:
    """(layer, site, rank if stated, file's name) of each intervention."""
    path = folder / "config.json"
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MAX_CONFIG:
        raise UploadMalformed("a pyreft folder holds a config.json of at most 1 MiB", "config.json")
    config = native.loads(path.read_bytes(), "config.json")
    given, types = config.get("representations"), config.get("intervention_types")
    if not isinstance(given, list) or not given or not isinstance(types, list) or len(types) != len(given):
        raise UploadMalformed("needs as many intervention_types as representations", "config.json")
    for kind in types:
        if kind != _LOREFT:
            raise UploadMalformed(f"intervention {str(kind)[:128]}; wanted: LoReFT", "config.json")
    return [_representation(one) for one in given]


def _representation(one: Any) -> tuple[int, Site, int | None, str]:
    """The file's name is made of a checked layer and component, never of free text."""
    named = dict(zip(_REPRESENTATION, one, strict=False)) if isinstance(one, list) else one
    if not isinstance(named, Mapping):
        raise UploadMalformed("a representation is a list or an object", "config.json")
    layer, component, unit, units, rank = (named.get(key) for key in _REPRESENTATION)
    if type(layer) is int and layer >= 0 and (unit, units) == ("pos", 1) and (rank is None or type(rank) is int):
        for word, site in _COMPONENTS.items():
            path = f"model_layers[{layer}]_{word.removeprefix('block_')}"
            for spelled, key in ((word, f"layer_{layer}_comp_{word}"), (path.replace("_", ".", 2), f"comp_{path}")):
                if component == spelled:
                    return layer, site, rank, f"intkey_{key}_unit_pos_nunit_1#0.bin"
    wanted = "wanted: a layer, block_output or block_input, unit pos, one unit"
    raise UploadMalformed(f"a representation of {str(one)[:128]}; {wanted}", "config.json")


def _loreft(path: Path, rank: int | None) -> dict[str, Tensor]:
    if not path.is_file() or path.is_symlink():
        raise UploadMalformed("is missing, or no plain file", path.name)
    saved = pickles.read(path)
    if not isinstance(saved, dict) or set(saved) != {"rotate_layer", "weight", "bias"}:
        raise UploadMalformed("holds other tensors than rotate_layer, weight and bias", path.name)
    rotate, weight, bias = saved["rotate_layer"], saved["weight"], saved["bias"]
    if not all(isinstance(part, Tensor) for part in (rotate, weight, bias)) or rotate.dim() != 2:
        raise UploadMalformed("rotate_layer, weight and bias must be tensors, the first [d, r]", path.name)
    d, r = rotate.shape
    if r > d or weight.shape != (r, d) or bias.shape != (r,) or rank not in (None, r):
        shapes = ", ".join(str(list(part.shape)) for part in (rotate, weight, bias))
        raise UploadMalformed(f"rotate_layer, weight, bias are {shapes}; wanted: [d, r], [r, d], [r]", path.name)
    return {"R": rotate.T, "A": weight, "b": bias}


def _vector(value: Any, what: str) -> Tensor:
    """[d] as float32, or as it is in half precision."""
    if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() == 0 or not value.is_floating_point():
        raise UploadMalformed(f"{what} is no list of floats", "file")
    return value.float() if value.dtype is torch.float64 else value


def _json(model: ModelRef) -> dict[str, Any]:
    return model.model_dump(mode="json")
