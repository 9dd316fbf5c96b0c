"""The dictionaries of other projects in `tests/data/dictionaries`, as assets, and what was computed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch

from steersman.steering.assets import Asset
from steersman.steering.formats import dictionary_files

DATA = Path(__file__).parents[1] / "data" / "dictionaries"
EXPORTS = DATA / "exports.safetensors"
EXPECTED = safetensors.torch.load_file(DATA / "expected.safetensors")
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
MODEL = {"id": "tiny", "n_layers": 4, "d_model": 8}
GIVEN: dict[str, dict[str, Any]] = {"gemma_scope": {"hook_name": "blocks.1.hook_resid_post"}}


def load(name: str, scratch: Path, **fields: Any) -> Asset:
    path = DATA / name
    if (path / "ae.safetensors").exists():
        path = path / "ae.safetensors"
    return dictionary_files.from_path(path, {"name": name, "model": MODEL, **GIVEN.get(name, {}), **fields}, scratch)
