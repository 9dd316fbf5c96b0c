"""Control vectors in GGUF, as repeng, llama.cpp and EasySteer write them: one float32 row `direction.<L>` per layer.

L is the 0-based block at whose output the row is added, in all three: a `vector` asset at `resid_post`. (llama.cpp
keeps row L at the place L − 1 of its buffer, and reads that place at block L; its loader refuses `direction.0`.)
Key-value fields are kept as provenance; one of ours, `steersman.asset`, carries the whole metadata, so that an exported
asset comes back under the same name and version.

The `gguf` package reads the file only after `_check` has walked its header within bounds: the package itself trusts the
counts that a file states, and a few crafted bytes would keep it busy for years.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from steersman.steering.assets import Asset, ModelRef, VectorMeta, canonical_json, dump_metadata, parse_metadata
from steersman.steering.errors import (
    AssetKindMismatch,
    FormatUnavailable,
    InvalidRequest,
    ModelMismatch,
    SiteUnsupported,
    UploadMalformed,
)
from steersman.steering.formats.foreign import assemble, needed_model, stack
from steersman.steering.formats.native import loads
from steersman.steering.sites import Site

ARCHITECTURE: Final = "controlvector"
ASSET_KEY: Final = "steersman.asset"
_DIRECTION: Final = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_SCALARS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
_STRING, _ARRAY, _F32 = 8, 9, 0
_MAX_ENTRIES: Final = 65536  # fields, tensors, or elements of one array


def from_gguf(data: bytes, /, *, name: str | None = None, model: ModelRef | None = None, **fields: Any) -> Asset:
    """The file's vector. `model` is the served model, whose id a control-vector file does not state.

    `name`, `model` and further `fields` of the metadata (source, licence, ...) go before the file's own.
    """
    gguf = _library()
    _check(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload.gguf"
        path.write_bytes(data)
        try:
            reader = gguf.GGUFReader(path)
            values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
            rows = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
            del reader  # lets go of the file
        except Exception as error:  # the package documents no list of what it raises
            raise UploadMalformed(f"not a readable GGUF file: {error}", "file") from error
    if values.get("general.architecture") != ARCHITECTURE:
        raise UploadMalformed(f"its general.architecture is not {ARCHITECTURE}", "file")
    layers, vectors = stack({_layer(name): torch.from_numpy(row) for name, row in rows.items()})
    return assemble(_metadata(values, layers, model), {"name": name, **fields}, {"vectors": vectors})


def to_gguf(asset: Asset, *, model_hint: str | None = None, for_llama_cpp: bool = False) -> bytes:
    """Float16 and bfloat16 rows are widened, which is exact. `for_llama_cpp`: refuse what its loader refuses."""
    gguf = _library()
    meta = asset.meta
    if not isinstance(meta, VectorMeta):
        raise AssetKindMismatch(f"a control-vector file holds a vector; {asset.ref} is a {meta.kind}")
    if meta.site is not Site.RESID_POST:
        raise SiteUnsupported(f"a control-vector file is read at resid_post; {asset.ref} is at {meta.site.value}")
    vectors = asset.tensors["vectors"]
    if vectors.dim() != 2:
        raise InvalidRequest(f"a control-vector file holds one direction per layer; {asset.ref} has subspaces")
    if for_llama_cpp and meta.layers[0] == 0:
        raise InvalidRequest(f"llama.cpp refuses a vector at layer 0, and {asset.ref} has one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint or meta.model.id)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(meta.layers))
        writer.add_string(ASSET_KEY, canonical_json(dump_metadata(meta)))
        for layer, row in zip(meta.layers, vectors.float(), strict=True):
            writer.add_tensor(f"direction.{layer}", row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise FormatUnavailable("GGUF files need the gguf package on the server: pip install gguf") from error
    return gguf


def _layer(name: str) -> int:
    match = _DIRECTION.fullmatch(name)
    if match is None:
        raise UploadMalformed(f"a control vector has no tensor '{name[:64]}'", "file")
    return int(match[1])


def _metadata(values: Mapping[str, Any], layers: list[int], model: ModelRef | None) -> dict[str, Any]:
    if ASSET_KEY in values:
        metadata = loads(str(values[ASSET_KEY]), ASSET_KEY)
        meta = parse_metadata(metadata)
        if model is not None and _shape(meta.model) != _shape(model):
            raise ModelMismatch(f"the file is for {meta.model.id}, not for {model.id}", "file")
        if not isinstance(meta, VectorMeta) or list(meta.layers) != layers:
            raise UploadMalformed(f"its tensors are not those of its {ASSET_KEY}", "file")
        return metadata
    model = needed_model(model, "a control-vector file")
    prefix = f"{ARCHITECTURE}."
    stated = {key.removeprefix(prefix): _plain(value) for key, value in values.items() if key.startswith(prefix)}
    return {
        "kind": "vector",
        "site": Site.RESID_POST.value,
        "layers": layers,
        "model": model.model_dump(mode="json"),
        "provenance": {"format": "gguf", **stated},
    }


def _shape(model: ModelRef) -> tuple[str, int, int]:
    return model.id, model.n_layers, model.d_model


def _plain(value: Any) -> Any:
    """JSON has no NaN: EasySteer writes one where a variance is unknown."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.loads(json.dumps(value, default=str))


class _Cursor:
    """Reads little-endian numbers and steps over strings, never beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def skip(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise UploadMalformed("not a GGUF file: it ends early", "file")
        self.at += count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self._data, start)[0])

    def count(self, form: str = "<Q") -> int:
        count = self.number(form)
        if count > _MAX_ENTRIES:
            raise UploadMalformed("not a control vector in GGUF: it states too many entries", "file")
        return count

    def string(self) -> None:
        self.skip(self.number("<Q"))


def _check(data: bytes) -> None:
    """Raises unless the header is whole and within bounds, and all tensors are one-dimensional float32."""
    cursor = _Cursor(data)
    cursor.skip(4)
    if data[:4] != b"GGUF" or cursor.number("<I") not in (2, 3):
        raise UploadMalformed("not a little-endian GGUF file of version 2 or 3", "file")
    n_tensors, n_fields = cursor.count(), cursor.count()
    for _ in range(n_fields):
        cursor.string()
        _skip_value(cursor, cursor.number("<I"))
    total = 0
    for _ in range(n_tensors):
        cursor.string()
        n_dimensions = cursor.count("<I")
        length = cursor.number("<Q") if n_dimensions == 1 else 0
        if n_dimensions != 1 or cursor.number("<I") != _F32:
            raise UploadMalformed("a control vector's tensors are one-dimensional float32", "file")
        total += 4 * length
        if 4 * length + cursor.number("<Q") > len(data) or total > len(data):  # many may state the same place
            raise UploadMalformed("not a GGUF file: its tensors are more than it holds", "file")


def _skip_value(cursor: _Cursor, kind: int) -> None:
    if kind == _STRING:
        cursor.string()
    elif kind in _SCALARS:
        cursor.skip(_SCALARS[kind])
    elif kind == _ARRAY:
        element, count = cursor.number("<I"), cursor.count()
        if element == _ARRAY:
            raise UploadMalformed("a control vector has no nested arrays", "file")
        for _ in range(count):
            _skip_value(cursor, element)
    else:
        raise UploadMalformed(f"not a GGUF file: value type {kind}", "file")
