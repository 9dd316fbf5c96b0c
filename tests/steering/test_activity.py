"""The most active features, block by block, are those of the whole encode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steersman.steering import activity, dictionaries
from steersman.steering.activity import most_active
from steersman.steering.assets import Asset
from steersman.steering.errors import AssetCorrupt, FeatureUnreadable
from tests.steering.library import D, asset, noise
from tests.steering.saes import EXPECTED, NAMES, load


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_the_same_as_of_the_whole(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    given, x = load(name, tmp_path), EXPECTED[f"{name}.x"]
    whole = dictionaries.encode(given, x)
    monkeypatch.setattr(activity, "FEATURES", 5)
    monkeypatch.setattr(activity, "TOKENS", 3)
    index, values = most_active(given, x, count)
    wanted = whole.abs().sort(dim=1, descending=True).values[:, :count]
    told = values.shape[1]
    torch.testing.assert_close(values.abs(), wanted[:, :told], rtol=1e-5, atol=1e-5)
    assert not wanted[:, told:].any()
    active = values != 0
    torch.testing.assert_close(whole.gather(1, index)[active], values[active], rtol=1e-5, atol=1e-5)
    for numbers, real in zip(index, active, strict=True):
        assert len(set(numbers[real].tolist())) == int(real.sum())


def linear(encoder: torch.Tensor) -> Asset:
    m = len(encoder)
    tensors = {"encoder": encoder, "decoder": encoder.clone(), "b_enc": torch.zeros(m), "b_dec": torch.zeros(D)}
    return asset("basis", "dictionary", tensors, layer=1, architecture="linear")


def test_coordinates_count_by_their_size() -> None:
    encoder = torch.eye(D)[:3]
    index, values = most_active(linear(encoder), torch.tensor([[1.0, -3.0, 2.0, *[9.0] * (D - 3)]]), 2)
    assert index.tolist() == [[1, 2]]
    assert values.tolist() == [[-3.0, 2.0]]


def test_what_cannot_be_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = {"decoder": noise(4, D), "b_dec": torch.zeros(D)}
    with pytest.raises(FeatureUnreadable, match="no encoder"):
        most_active(asset("b", "dictionary", directions, layer=1, architecture="basis"), noise(2, D), 1)
    monkeypatch.setattr(activity, "MAX_WHOLE", 100)
    pursuit = asset("p", "dictionary", directions, layer=1, architecture="matching_pursuit")
    with pytest.raises(FeatureUnreadable, match="too many"):
        most_active(pursuit, noise(2, D), 1)
    broken = linear(torch.eye(D))
    broken.tensors["encoder"][2, 2] = torch.inf
    with pytest.raises(AssetCorrupt, match="NaN or infinity"):
        most_active(broken, noise(1, D), 1)
