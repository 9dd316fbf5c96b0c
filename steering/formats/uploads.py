"""An uploaded file, told apart by how it begins, with what is said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from steersman.steering.assets import Asset, ModelRef, validation_error
from steersman.steering.formats import gguf, native


def read(data: bytes, metadata: str | Mapping[str, Any] | None = None) -> Asset:
    """The asset in a safetensors or GGUF file. ``metadata``: a JSON object with what the file does not say."""
    fields = native.loads(metadata, "metadata") if isinstance(metadata, str) else metadata
    if data[:4] != b"GGUF":
        return native.from_safetensors(data, fields)
    given = dict(fields or {})
    stated = given.pop("model", None)
    try:
        model = None if stated is None else ModelRef.model_validate(stated)
    except ValidationError as error:
        raise validation_error(error, "metadata.model") from None
    return gguf.from_gguf(data, model=model, **given)
