"""dictionary_learning's `ae.pt`, a pickle that only the converter opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from steersman.clients.convert import convert
from steersman.steering import dictionaries
from steersman.steering.errors import UploadMalformed
from steersman.steering.formats import native

DATA = Path(__file__).parents[1] / "data" / "dictionaries"
EXPECTED = safetensors.torch.load_file(DATA / "expected.safetensors")
FIELDS = {"name": "sae", "model": {"id": "tiny", "n_layers": 4, "d_model": 8}}


@pytest.mark.parametrize("name", ["dl_standard", "dl_gated", "dl_jumprelu", "dl_batchtopk", "dl_topk"])
def test_it_encodes_as_the_library_does(name: str, tmp_path: Path) -> None:
    torch.save(safetensors.torch.load_file(DATA / name / "ae.safetensors"), tmp_path / "ae.pt")
    with pytest.raises(UploadMalformed):
        convert(tmp_path / "ae.pt", FIELDS)  # without its configuration it could be anything
    shutil.copy(DATA / name / "config.json", tmp_path)
    torch.save({"encoder.weight": 3, 4: torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UploadMalformed):
        convert(tmp_path / "other.pt", FIELDS)
    asset = convert(tmp_path / "ae.pt", FIELDS)
    again = native.from_safetensors(native.to_safetensors(asset))
    assert again.sha256 == asset.sha256
    for each in (asset, again):
        acts = dictionaries.encode(each, EXPECTED[f"{name}.x"])
        torch.testing.assert_close(acts, EXPECTED[f"{name}.acts"], rtol=0, atol=1e-4)


def test_goodfires_state_is_known_by_its_names(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    encoder, decoder = (torch.randn(20, 8, generator=generator) for _ in range(2))
    state = {"encoder_linear.weight": encoder, "encoder_linear.bias": torch.ones(20)}
    state |= {"decoder_linear.weight": decoder.T, "decoder_linear.bias": torch.zeros(8)}
    torch.save(state, tmp_path / "sae.pth")
    asset = convert(tmp_path / "sae.pth", {**FIELDS, "layer": 2})
    assert torch.equal(asset.tensors["decoder"], decoder)
    assert (asset.meta.edited_layers, asset.meta.kind) == ((2,), "dictionary")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "sae.pth")
    with pytest.raises(UploadMalformed):
        convert(tmp_path / "sae.pth", {**FIELDS, "layer": 2})
