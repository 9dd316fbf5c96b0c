"""An exported control vector under llama.cpp's rules, written a second time from its loader and its graph builder.

The loader (`common_control_vector_load_one`) takes tensors `direction.<k>`, k from 1, one-dimensional F32 of one
length, and adds row k into its buffer at (k − 1)·n_embd. The graph adds the buffer's piece at (l − 1)·n_embd to the
output of block l, 0-based, for l from 1.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import InvalidRequest
from steersman.steering.formats.gguf import to_gguf
from tests.steering import planned
from tests.steering.foreign import LAYERS, MODEL, D, expected, model
from tests.steering.library import noise


def make(*layers: int, dtype: torch.dtype = torch.float32) -> Asset:
    meta = {"name": "x", "kind": "vector", "model": MODEL.model_dump(), "layers": layers}
    return Asset(parse_metadata(meta), {"vectors": noise(len(layers), D).to(dtype)})


def load(path: Path) -> np.ndarray:
    """The buffer [pieces·n_embd] that the loader makes."""
    buffer, width = np.zeros(0, np.float32), -1
    for tensor in gguf.GGUFReader(path).tensors:
        word, _, number = tensor.name.partition(".")
        k = int(number)
        assert word == "direction"
        assert k > 0
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        assert width in (-1, tensor.n_elements)
        width = int(tensor.n_elements)
        buffer = np.pad(buffer, (0, max(0, k * width - len(buffer))))
        buffer[(k - 1) * width : k * width] += tensor.data
    return buffer


def run(buffer: np.ndarray) -> Tensor:
    net, handles = model(), []
    for layer in range(1, LAYERS):
        piece = torch.tensor(buffer[(layer - 1) * D : layer * D])
        if len(piece) == D:
            block = net.model.layers[layer]
            handles.append(block.register_forward_hook(lambda _m, _a, out, piece=piece: shifted(out, piece)))
    with torch.inference_mode():
        out = net(input_ids=expected()["ids"][None]).logits[0]
    for handle in handles:
        handle.remove()
    return out


def shifted(out: Any, by: Tensor) -> Any:
    return (out[0] + by, *out[1:]) if isinstance(out, tuple) else out + by


@pytest.mark.parametrize("layers", [(1,), (3,), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_cpp_does_what_the_plan_does(tmp_path: Path, layers: tuple[int, ...], dtype: torch.dtype) -> None:
    asset = make(*layers, dtype=dtype)
    (tmp_path / "x.gguf").write_bytes(to_gguf(asset, for_llama_cpp=True))
    edit = {"op": "add", "vector": "x", "scale": 1.0}
    wanted = planned.logits(model(), expected()["ids"], {"interventions": [edit]}, asset)
    torch.testing.assert_close(run(load(tmp_path / "x.gguf")), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - expected()["logits.plain"]).abs().max() > 0.1


def test_what_it_would_refuse_is_not_written_for_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="layer 0"):
        to_gguf(make(0, 2), for_llama_cpp=True)
    (tmp_path / "x.gguf").write_bytes(to_gguf(make(0, 2)))
    with pytest.raises(AssertionError):
        load(tmp_path / "x.gguf")
