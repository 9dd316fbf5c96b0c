"""The files that other projects' libraries wrote (`tests/data/foreign/make.py`), and the model they were used on."""

from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from steersman.steering.assets import ModelRef

DATA = Path(__file__).parents[1] / "data" / "foreign"
LAYERS, D, SCALE = 4, 16, 1.5
MODEL = ModelRef(id="tiny", n_layers=LAYERS, d_model=D)
FIELDS: dict[str, Any] = {"name": "x", "model": MODEL.model_dump()}


@cache
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DATA / "model").eval()


@cache
def expected() -> dict[str, Tensor]:
    return load_file(DATA / "expected.safetensors")
