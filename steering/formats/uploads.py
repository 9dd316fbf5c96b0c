"""An uploaded file, told apart by how it begins, with what is said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steersman.steering.assets import Asset
from steersman.steering.formats import dictionary_files, gguf, native, svec
from steersman.steering.formats.foreign import stated_model


def read(data: bytes, metadata: str | Mapping[str, Any] | None = None) -> Asset:
    """The asset in a safetensors, GGUF, `.svec` or `.npz` file. ``metadata``: an object with what it does not say."""
    fields = native.loads(metadata, "metadata") if isinstance(metadata, str) else metadata
    if dictionary_files.recognises(data, fields):
        return dictionary_files.from_bytes(data, fields)
    reader = gguf.from_gguf if data[:4] == b"GGUF" else svec.from_svec if _is_json(data) else None
    if reader is None:
        return native.from_safetensors(data, fields)
    model, given = stated_model(fields or {})
    return reader(data, model=model, **given)


def _is_json(data: bytes) -> bool:
    """A safetensors file begins with a length of 8 bytes, which ends in zeros."""
    return data[:64].lstrip().startswith(b"{") and b"\0" not in data[:8]
