"""Dictionaries of other projects: the same activations and reconstructions as the libraries', by row and as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from steersman.kernels.program import Program
from steersman.kernels.reference import edit, project
from steersman.steering import dictionaries, lower
from steersman.steering.assets import Asset, DictionaryMeta, parse_metadata
from steersman.steering.errors import FeatureUnreadable, InvalidRequest
from steersman.steering.formats import dictionary_files
from steersman.steering.plan import Activation
from tests.steering.saes import DATA, EXPECTED, EXPORTS, MODEL, NAMES, load

BY_ROW = ["standard", "jumprelu", "jumprelu_plain", "gated", "v5_standard", "dl_standard", "dl_gated", "dl_jumprelu",
          "dl_batchtopk", "gemma_scope", "llama_scope"]  # fmt: skip
PARITY = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_encode_and_decode_are_the_librarys(name: str, tmp_path: Path) -> None:
    asset = load(name, tmp_path)
    x, acts, out = (EXPECTED[f"{name}.{part}"] for part in ("x", "acts", "out"))
    torch.testing.assert_close(dictionaries.encode(asset, x), acts, **PARITY)
    torch.testing.assert_close(dictionaries.decode(asset, acts, x), out, **PARITY)


@pytest.mark.parametrize("name", BY_ROW)
def test_a_feature_by_its_row_alone_is_the_librarys(name: str, tmp_path: Path) -> None:
    asset = load(name, tmp_path)
    x, acts = EXPECTED[f"{name}.x"], EXPECTED[f"{name}.acts"]
    chosen = [17, 3, 11]
    reads = dictionaries.reads(asset, chosen)
    found = [
        Activation(float(bias), float(floor))(dots)
        for dots, bias, floor in zip(project(x, reads.direction).T, reads.bias, reads.threshold, strict=True)
    ]
    torch.testing.assert_close(torch.stack(found, 1), acts[:, chosen], **PARITY)


@pytest.mark.parametrize("name", BY_ROW)
@pytest.mark.parametrize(
    ("mode", "value", "change"),
    [
        ("set", 3.0, lambda a: torch.full_like(a, 3.0)),
        ("add", -1.5, lambda a: a - 1.5),
        ("scale", 2.5, lambda a: a * 2.5),
        ("ablate", 0.0, torch.zeros_like),
    ],
)
@pytest.mark.parametrize("only_if_active", [False, True])
def test_an_edit_is_the_librarys_decode_of_changed_activations_with_the_error_kept(
    name: str, mode: str, value: float, change: Any, only_if_active: bool, tmp_path: Path
) -> None:
    """x′ = decode(a′) + (x − decode(a)): several features are read off the same x, as one encode does."""
    asset, chosen = load(name, tmp_path), [17, 3, 11]
    x, acts, out = (EXPECTED[f"{name}.{part}"] for part in ("x", "acts", "out"))
    after = acts.clone()
    after[:, chosen] = change(acts[:, chosen])
    if only_if_active:
        after = torch.where(acts > 0, after, acts)
    want = dictionaries.decode(asset, after, x) + (x - out)
    reads = None if mode == "add" and not only_if_active else dictionaries.reads(asset, chosen)
    write = dictionaries.writes(asset, chosen)
    block = lower.feature(0, write, reads, mode, [value] * 3, only_if_active)
    for dtype in (torch.float32, torch.float64):
        got = x.to(dtype) + edit(x.to(dtype), Program((block,), x.shape[1]))
        torch.testing.assert_close(got.float(), want, **PARITY)
    assert float((want - x).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["topk", "matching_pursuit", "constant_norm", "layers.2", "layer_norm"])
def test_what_is_encoded_has_no_row_of_its_own(name: str, tmp_path: Path) -> None:
    asset = load(name, tmp_path)
    assert dictionaries.takes_encode(dictionaries.dictionary(asset))
    with pytest.raises(FeatureUnreadable, match="encoded token by token"):
        dictionaries.reads(asset, [0])


def test_what_is_read_elsewhere_is_refused(tmp_path: Path) -> None:
    asset = load("transcoder", tmp_path)
    assert not dictionaries.takes_encode(dictionaries.dictionary(asset))
    with pytest.raises(FeatureUnreadable, match="without only_if_active"):
        dictionaries.reads(asset, [0])


@pytest.mark.parametrize(
    "name", ["topk", "topk_rescaled", "matching_pursuit", "transcoder", "constant_norm", "layers.2"]
)
def test_adding_to_a_feature_needs_no_encoder(name: str, tmp_path: Path) -> None:
    """For every encoder, a′ − a is the value: x moves as the library's decode of one changed activation says."""
    asset = load(name, tmp_path)
    x, acts, out = (EXPECTED[f"{name}.{part}"] for part in ("x", "acts", "out"))
    after = acts.clone()
    after[:, [2, 9]] += torch.tensor([4.0, -1.0])
    want = dictionaries.decode(asset, after, x) - out
    relative = name == "constant_norm"
    block = lower.feature(0, dictionaries.writes(asset, [2, 9]), None, "add", [4.0, -1.0], relative=relative)
    torch.testing.assert_close(edit(x, Program((block,), out.shape[1])), want, **PARITY)


def test_of_topk_the_threshold_may_be_taken(tmp_path: Path) -> None:
    config = json.loads((DATA / "dl_topk" / "config.json").read_text())
    asset = load("dl_topk", tmp_path, config={**config, "encode": "threshold"})
    x = EXPECTED["dl_topk.x"]
    assert isinstance(asset.meta, DictionaryMeta)
    assert asset.meta.architecture == "jumprelu"
    state = safetensors.torch.load_file(DATA / "dl_topk" / "ae.safetensors")
    p = ((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    torch.testing.assert_close(dictionaries.encode(asset, x), p * (p > state["threshold"]), **PARITY)


@pytest.mark.parametrize("name", NAMES)
def test_an_export_for_saelens_comes_back_the_same(name: str, tmp_path: Path) -> None:
    asset = load(name, tmp_path)
    dictionary_files.to_folder(asset, tmp_path / "out")
    back = dictionary_files.from_path(tmp_path / "out", {"name": name, "model": MODEL}, tmp_path / "out")
    x, acts = EXPECTED[f"{name}.x"], EXPECTED[f"{name}.acts"]
    torch.testing.assert_close(dictionaries.encode(back, x), acts, **PARITY)
    torch.testing.assert_close(dictionaries.decode(back, acts, x), EXPECTED[f"{name}.out"], **PARITY)
    assert isinstance(asset.meta, DictionaryMeta)
    assert isinstance(back.meta, DictionaryMeta)
    assert (back.meta.site, back.meta.layer, back.meta.read_site) == (
        asset.meta.site,
        asset.meta.layer,
        asset.meta.read_site,
    )
    if asset.meta.input_scale == 1:  # nothing had to be folded: bit for bit
        assert all(torch.equal(back.tensors[n].float(), t.float()) for n, t in asset.tensors.items())


def test_a_scale_that_saelens_has_no_place_for_is_not_exported(tmp_path: Path) -> None:
    """Folded into matching pursuit's rows, which must have length one, it would make another dictionary."""
    fields = {"name": "mp", "kind": "dictionary", "model": MODEL, "layer": 1, "architecture": "matching_pursuit"}
    rows = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    scaled = Asset(parse_metadata({**fields, "input_scale": 0.5}), {"decoder": rows, "b_dec": torch.zeros(8)})
    with pytest.raises(InvalidRequest, match="scales its input"):
        dictionary_files.to_folder(scaled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_saelens_itself_computes_the_same_with_the_export(name: str, tmp_path: Path) -> None:
    """What it computed is in a file, beside what it was given, which must be what is written today."""
    dictionary_files.to_folder(load(name, tmp_path), tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out" / "sae_weights.safetensors")
    with safe_open(EXPORTS, framework="pt") as theirs:
        start = f"{name}.given."
        given = {k.removeprefix(start): theirs.get_tensor(k) for k in theirs.keys() if k.startswith(start)}  # noqa: SIM118
        assert json.loads((tmp_path / "out" / "cfg.json").read_text()) == json.loads(theirs.metadata()[name])
        torch.testing.assert_close(written, given, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs.get_tensor(f"{name}.acts"), EXPECTED[f"{name}.acts"], **PARITY)
        torch.testing.assert_close(theirs.get_tensor(f"{name}.out"), EXPECTED[f"{name}.out"], **PARITY)


@pytest.mark.parametrize(
    ("name", "layer", "site", "read_site"),
    [
        ("standard", 2, "resid_post", None),
        ("v5_standard", 1, "resid_pre", None),
        ("transcoder", 2, "mlp_out", "mlp_in"),
        ("layers.2", 2, "resid_post", None),
        ("llama_scope", 1, "resid_post", None),
    ],
)
def test_where_a_file_was_trained(name: str, layer: int, site: str, read_site: str | None, tmp_path: Path) -> None:
    meta = load(name, tmp_path).meta
    assert isinstance(meta, DictionaryMeta)
    assert (meta.layer, meta.site.value, meta.read_site) == (layer, site, read_site)


def snmf(**config: Any) -> Asset:
    f = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    data = safetensors.torch.save({"F": f})
    fields = {"name": "snmf", "model": MODEL, "layer": 1, "site": "mlp_post", "format": "basis", "config": config}
    return dictionary_files.from_bytes(data, fields)


def test_snmf_features_are_directions_of_length_one() -> None:
    asset = snmf()
    write = dictionaries.writes(asset, [2])
    torch.testing.assert_close(write.norm(dim=1), torch.ones(1))
    with pytest.raises(FeatureUnreadable, match="no encoder"):
        dictionaries.reads(asset, [0])


def test_coordinates_in_a_basis_set_one_and_leave_the_others() -> None:
    asset = snmf(coordinates=True)
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    block = lower.feature(0, dictionaries.writes(asset, [1]), dictionaries.reads(asset, [1]), "set", [2.5])
    before, after = (dictionaries.encode(asset, each) for each in (x, x + edit(x, Program((block,), 20))))
    want: Tensor = before.clone()
    want[:, 1] = 2.5
    torch.testing.assert_close(after, want, rtol=0, atol=1e-5)


def test_meta_features_compose_features(tmp_path: Path) -> None:
    """A meta-SAE decodes another dictionary's rows: adding a meta-feature adds the features it is made of, together."""
    features = load("standard", tmp_path)
    mixture = torch.tensor([[0.0, 2.0, 0.0, 1.0], [1.0, 0.0, -1.0, 0.0]])  # of the first four features
    meta = mixture @ features.tensors["decoder"][:4].float()
    fields = {"name": "meta", "model": MODEL, "layer": 2, "site": "resid_post", "format": "basis"}
    asset = dictionary_files.from_bytes(safetensors.torch.save({"W_dec": meta}), fields)
    x = torch.randn(3, meta.shape[1], generator=torch.Generator().manual_seed(2))
    length = float(meta[0].norm())
    whole = lower.feature(0, dictionaries.writes(asset, [0]), None, "add", [length])
    parts = lower.feature(0, dictionaries.writes(features, [1, 3]), None, "add", [2.0, 1.0])
    got, want = (x + edit(x, Program((block,), x.shape[1])) for block in (whole, parts))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
