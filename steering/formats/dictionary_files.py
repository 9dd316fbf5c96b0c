"""Files of dictionaries, from an upload's bytes or from a folder: read within bounds, then `saes.build`."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import InvalidRequest, SteeringError, UploadMalformed
from steersman.steering.formats import native, saelens, saes
from steersman.steering.rows import RowFile

ZIP: Final = b"PK\x03\x04"
_PACKED: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bzip2 and LZMA unpack a block whole, whatever its size
_MAX_RATIO: Final = 32  # of what an archive unpacks to, over its own size: weights hardly shrink
_CONFIGS: Final = ("cfg.json", "config.json", "hyperparams.json")
_WEIGHTS: Final = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "final.safetensors",
)


def recognises(data: bytes, fields: Mapping[str, Any] | None) -> bool:
    """Whether an upload is a dictionary in a foreign format: an .npz, or a safetensors whose format is named."""
    return data[:4] == ZIP or bool(fields and ("format" in fields or "config" in fields))


def from_bytes(data: bytes, fields: Mapping[str, Any] | None) -> Asset:
    """The asset of an uploaded file; ``fields`` as for :func:`steersman.steering.formats.saes.build`."""
    if data[:4] == ZIP:
        tensors = read_npz(io.BytesIO(data), len(data))
    else:
        try:
            tensors = safetensors.torch.load(data)
        except Exception as error:  # the reader documents no list of what it raises
            raise UploadMalformed(f"not a safetensors file: {error}", "file") from error
    return saes.to_asset(tensors, fields or {})


def from_path(path: Path, fields: Mapping[str, Any], scratch: Path) -> Asset:
    """The asset of a file, or of a folder with weights and configuration, whose tensors stay on disk.

    ``scratch`` is a folder for the converted file, which the asset reads: to be removed when it has been stored. A
    safetensors file of our own is read where it lies.
    """
    weights = _weights(path)
    fields = dict(fields)
    if weights.suffix == ".npz":
        with weights.open("rb") as file:
            tensors: Mapping[str, Tensor] = read_npz(file, weights.stat().st_size)
    else:
        try:
            with safe_open(weights, framework="pt") as opened:
                own = (opened.metadata() or {}).get(native.HEADER_KEY)
            if own is not None and "format" not in fields:
                given = native.loads(own, "metadata")
                return Asset(parse_metadata({**given, **fields}), RowFile(weights))
            tensors = safetensors.torch.load_file(weights)
        except (OSError, SteeringError):
            raise
        except Exception as error:  # the reader documents no list of what it raises
            raise UploadMalformed(f"not a safetensors file: {error}", "file") from error
    config = next((weights.parent / n for n in _CONFIGS if (weights.parent / n).is_file()), None)
    if config is None and weights.parent.name == "checkpoints":
        config = next((p for n in _CONFIGS if (p := weights.parent.parent / n).is_file()), None)
    if "config" not in fields and config is not None:
        fields["config"] = native.loads(config.read_bytes(), "config")
    if "hook_name" not in fields and "layer" not in fields and weights.name == "sae.safetensors":
        fields["hook_name"] = weights.parent.name  # sparsify names the folder by the module
    meta, out = saes.build(tensors, fields)
    converted = scratch / "dictionary.safetensors"
    safetensors.torch.save_file(out, converted)
    return Asset(parse_metadata(meta), RowFile(converted))


def to_folder(asset: Asset, folder: Path) -> None:
    """Writes a dictionary as SAELens saves one."""
    config, tensors = saelens.to_saelens(asset)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config, indent=1))


def read_npz(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """The arrays of an .npz of ``size`` bytes. No pickles, and no array whose header promises more than is there."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > _MAX_RATIO * size + (1 << 20):
                raise UploadMalformed(f"the archive unpacks to more than {_MAX_RATIO} times its size", "file")
            if any(entry.compress_type not in _PACKED for entry in entries):
                raise UploadMalformed("an .npz is stored or deflated; this archive is packed in another way", "file")
            named = {entry.filename.removesuffix(".npy"): entry for entry in entries}
            if len(named) != len(entries):
                raise UploadMalformed("an array is given twice", "file")
            return {name: _array(archive, entry) for name, entry in named.items()}
    except SteeringError:
        raise
    except Exception as error:  # neither zipfile nor numpy documents a list of what it raises
        raise UploadMalformed(f"not a readable .npz file: {error}", "file") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    with archive.open(entry) as stream:
        form: Any = np.lib.format
        version = form.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} has the format version {version}")
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"{entry.filename} holds {dtype}, not floating point")
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"{entry.filename} has the shape {shape}")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > entry.file_size:
            raise ValueError(f"{entry.filename} promises {nbytes} bytes and has {entry.file_size}")
        data = stream.read(nbytes)
        if len(data) < nbytes:
            raise ValueError(f"{entry.filename} ends early")
    flat = np.frombuffer(bytearray(data), dtype=dtype)
    array = flat.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _weights(path: Path) -> Path:
    if not path.is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        for name in _WEIGHTS:
            if (folder / name).is_file():
                return folder / name
    raise InvalidRequest(f"{path.name} holds none of {', '.join(_WEIGHTS)}", "file")
