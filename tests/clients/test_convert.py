"""Files that the real libraries wrote: converted, they do to a forward pass what the libraries' own hooks did to it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steersman.clients import pickles
from steersman.clients.convert import convert, from_steering_vectors
from steersman.server import cli
from steersman.steering.assets import Asset
from steersman.steering.errors import (
    InvalidRequest,
    LayerOutOfRange,
    NonFinite,
    SiteUnsupported,
    SteeringError,
    UploadMalformed,
    WidthMismatch,
)
from steersman.steering.formats import native
from steersman.steering.formats.gguf import from_gguf, to_gguf
from steersman.steering.store import Store
from tests.clients.torch_files import rewritten
from tests.steering import planned
from tests.steering.foreign import DATA, FIELDS, LAYERS, SCALE, D, expected, model

ADDED = {
    "repeng": "repeng.gguf",
    "easysteer": "easysteer.gguf",
    "cast": "cast.svec",
    "steering_vectors_decoder_block": "steering_vectors_decoder_block.pt",
    "steering_vectors_self_attn": "steering_vectors_self_attn.pt",
    "steering_vectors_mlp": "steering_vectors_mlp.pt",
    "vllm_hook": "vllm_hook.pt",
}
LOREFT = ("loreft", "loreft_input", "loreft_path")
FILES = [*ADDED.values(), *LOREFT, "tensor.pt"]


def read(name: str, **fields: Any) -> Asset:
    layers = {"layers": [2]} if name in ("vllm_hook.pt", "tensor.pt") else {}
    return convert(DATA / name, {**FIELDS, **layers, **fields})


def run(*interventions: dict[str, Any], asset: Asset | None = None) -> Tensor:
    steering = {"interventions": list(interventions)}
    return planned.logits(model(), expected()["ids"], steering, *([asset] if asset else []))


def test_the_model_is_the_one_that_the_libraries_edited() -> None:
    torch.testing.assert_close(run(), expected()["logits.plain"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADDED)
def test_an_added_vector_acts_where_the_library_adds_it(name: str) -> None:
    asset = read(ADDED[name])
    wanted = expected()[f"logits.{name}"]
    got = run({"op": "add", "vector": "x", "scale": SCALE}, asset=asset)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - expected()["logits.plain"]).abs().max() > 0.1  # else any layer would do


@pytest.mark.parametrize("name", ADDED)
def test_a_layer_to_either_side_would_show(name: str) -> None:
    asset = read(ADDED[name])
    layers = asset.meta.edited_layers
    for step in (-1, 1):
        moved = {
            "op": "add",
            "vector": "x",
            "scale": SCALE,
        }
        edits = [
            {**moved, "from_layer": layer, "layers": layer + step} for layer in layers if 0 <= layer + step < LAYERS
        ]
        assert (run(*edits, asset=asset) - expected()[f"logits.{name}"]).abs().max() > 0.02


@pytest.mark.parametrize("name", LOREFT)
def test_loreft_edits_as_pyreft_does(name: str) -> None:
    wanted = expected()[f"logits.{name}"]
    got = run({"op": "affine", "affine": "x"}, asset=read(name))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - expected()["logits.plain"]).abs().max() > 0.1


def test_what_each_file_becomes() -> None:
    found = {name: (a.meta.kind, a.meta.site.value, a.meta.edited_layers) for name in FILES if (a := read(name))}
    assert found == {
        "repeng.gguf": ("vector", "resid_post", (1, 2, 3)),
        "easysteer.gguf": ("vector", "resid_post", (0, 1, 2, 3)),
        "cast.svec": ("vector", "resid_post", (0, 1, 2)),
        "steering_vectors_decoder_block.pt": ("vector", "resid_post", (0, 2, 3)),
        "steering_vectors_self_attn.pt": ("vector", "attn_out", (0, 2, 3)),
        "steering_vectors_mlp.pt": ("vector", "mlp_out", (0, 2, 3)),
        "vllm_hook.pt": ("vector", "resid_post", (2,)),
        "tensor.pt": ("vector", "resid_post", (2,)),
        "loreft": ("affine", "resid_post", (1, 3)),
        "loreft_input": ("affine", "resid_pre", (2,)),
        "loreft_path": ("affine", "resid_post", (2,)),
    }


@pytest.mark.parametrize("name", FILES)
def test_through_native_and_back_is_the_same_version(name: str, tmp_path: Path) -> None:
    asset = read(name, description="ä", licence="MIT")
    (tmp_path / "x.safetensors").write_bytes(native.to_safetensors(asset))
    back = convert(tmp_path / "x.safetensors", {})
    assert (back.ref, back.meta) == (asset.ref, asset.meta)
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in asset.tensors.items())


@pytest.mark.parametrize(
    "name", [file for file in FILES if not file.startswith(("loreft", "steering_vectors_s", "steering_vectors_m"))]
)
def test_through_gguf_and_back_is_bit_for_bit(name: str) -> None:
    asset = read(name)
    back = from_gguf(to_gguf(asset))
    assert back.ref == asset.ref
    assert torch.equal(back.tensors["vectors"], asset.tensors["vectors"])


def test_numbers_are_the_files_own() -> None:
    svec = json.loads((DATA / "cast.svec").read_text())["directions"]
    rows = torch.tensor([svec[str(layer)] for layer in (1, 2, 3)])
    assert torch.equal(read("cast.svec").tensors["vectors"], rows)
    assert torch.equal(read("easysteer.gguf").tensors["vectors"][1:], rows)
    for name in ("vllm_hook.pt", "tensor.pt"):
        assert torch.equal(read(name).tensors["vectors"], rows[1:2])


def test_provenance_says_what_the_asset_cannot() -> None:
    assert read("cast.svec").meta.provenance["left_out"].startswith("layer 0")
    assert read("vllm_hook.pt").meta.provenance == {"format": "vllm-hook", "avg_proj": 0.75}
    assert read("repeng.gguf").meta.provenance["model_hint"] == "llama"
    assert read("steering_vectors_mlp.pt").meta.provenance["layer_type"] == "mlp"


def test_a_negative_layer_counts_from_the_last_block() -> None:
    """As the library's own list of modules takes it."""
    saved = pickles.SteeringVectorFile()
    saved.layer_type, saved.layer_activations = "decoder_block", {-1: torch.ones(D), 0: torch.zeros(D)}
    asset = from_steering_vectors(saved, FIELDS)
    assert asset.meta.edited_layers == (0, LAYERS - 1)
    assert asset.tensors["vectors"].sum(1).tolist() == [0, D]
    for bad in ({-1 - LAYERS: torch.ones(D)}, {-1: torch.ones(D), LAYERS - 1: torch.ones(D)}, {"0": torch.ones(D)}):
        saved.layer_activations = bad
        with pytest.raises(UploadMalformed, match="layer_activations"):
            from_steering_vectors(saved, FIELDS)


def test_an_array_of_numpy_2_reads_as_one_of_numpy_1(tmp_path: Path) -> None:
    wanted = read("vllm_hook.pt").tensors["vectors"]
    torch.save({"dir": wanted[0].numpy(), "avg_proj": 1.0}, tmp_path / "new.pt")
    assert torch.equal(convert(tmp_path / "new.pt", {**FIELDS, "layers": [2]}).tensors["vectors"], wanted)


def test_a_direction_for_several_layers(tmp_path: Path) -> None:
    asset = read("tensor.pt", layers=[0, 3])
    assert asset.meta.edited_layers == (0, 3)
    assert torch.equal(asset.tensors["vectors"][0], asset.tensors["vectors"][1])


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_another_models_size_is_refused(name: str) -> None:
    with pytest.raises(WidthMismatch):
        read(name, model={"id": "wide", "n_layers": LAYERS, "d_model": D + 1})
    with pytest.raises((LayerOutOfRange, UploadMalformed)):
        read(name, model={"id": "shallow", "n_layers": 1, "d_model": D})
    with pytest.raises(InvalidRequest) as raised:
        convert(DATA / name, {"name": "x", **({"layers": [2]} if name in ("vllm_hook.pt", "tensor.pt") else {})})
    assert raised.value.param == "model"


@pytest.mark.parametrize("layers", [None, [], 2, ["2"], [2.0], [True], [2, 2], [3, 1]])
def test_the_layer_that_a_file_does_not_name_must_be_given_well(layers: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        convert(DATA / "tensor.pt", {**FIELDS, **({} if layers is None else {"layers": layers})})
    assert raised.value.param == "layers"


def copied(tmp_path: Path, name: str = "loreft") -> Path:
    shutil.copytree(DATA / name, tmp_path / name)
    return tmp_path / name


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], Any], name: str = "loreft") -> Path:
    folder = copied(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


REPRESENTATION = [1, "block_output", "pos", 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("representations"),
        lambda c: c.update(representations=[]),
        lambda c: c.update(representations=[3, 4]),
        lambda c: c.update(representations=[REPRESENTATION, REPRESENTATION]),
        lambda c: c.update(intervention_types=["<class 'pyreft.interventions.NoreftIntervention'>"] * 2),
        lambda c: c.update(intervention_types=[["x"], None]),
        lambda c: c["representations"][0].__setitem__(0, -1),
        lambda c: c["representations"][0].__setitem__(0, "../../1"),
        lambda c: c["representations"][0].__setitem__(0, True),
        lambda c: c["representations"][0].__setitem__(0, 2),  # no such file
        lambda c: c["representations"][0].__setitem__(1, "../block_output"),
        lambda c: c["representations"][0].__setitem__(1, "model.layers[2].output"),  # of another layer
        lambda c: c["representations"][0].__setitem__(1, "mlp_activation"),
        lambda c: c["representations"][0].__setitem__(2, "h.pos"),
        lambda c: c["representations"][0].__setitem__(3, 2),
        lambda c: c["representations"][0].__setitem__(4, 3),  # not the file's rank
    ],
)
def test_a_pyreft_folder_that_says_something_else_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(UploadMalformed):
        convert(changed(tmp_path, change), FIELDS)


def test_interventions_at_two_sites_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, lambda c: c["representations"][1].__setitem__(1, "block_input"))
    stem = "intkey_layer_3_comp_block_{}_unit_pos_nunit_1#0.bin"
    (folder / stem.format("output")).rename(folder / stem.format("input"))
    with pytest.raises(UploadMalformed, match="several sites"):
        convert(folder, FIELDS)


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    for file in ("config.json", "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"):
        folder = copied(tmp_path)
        (folder / file).rename(tmp_path / "outside")
        (folder / file).symlink_to(tmp_path / "outside")
        with pytest.raises(UploadMalformed):
            convert(folder, FIELDS)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "part",
    [
        {"weight": torch.zeros(3, D)},
        {"bias": torch.zeros(1)},
        {"rotate_layer": torch.zeros(2, D)},
        {"rotate_layer": torch.zeros(D)},
        {"act_fn": torch.zeros(1)},
        {"bias": 1.0},
    ],
)
def test_loreft_tensors_that_do_not_fit_are_refused(tmp_path: Path, part: dict[str, Any]) -> None:
    folder = copied(tmp_path, "loreft_input")
    parts = {"rotate_layer": torch.eye(D, 2), "weight": torch.zeros(2, D), "bias": torch.zeros(2), **part}
    torch.save(parts, folder / "intkey_layer_2_comp_block_input_unit_pos_nunit_1#0.bin")
    with pytest.raises(UploadMalformed):
        convert(folder, FIELDS)


@pytest.mark.parametrize(
    ("saved", "error"),
    [
        ({"dir": torch.zeros(1, D)}, UploadMalformed),
        ({"dir": torch.zeros(D, dtype=torch.int64)}, UploadMalformed),
        ({"dir": "north"}, UploadMalformed),
        ({"dir": torch.ones(D), "extra": 1}, UploadMalformed),
        ({"dir": torch.ones(D), "avg_proj": torch.ones(2)}, UploadMalformed),
        ({"dir": torch.full((D,), torch.nan)}, NonFinite),
        ({"dir": torch.ones(D), "avg_proj": torch.tensor(torch.inf)}, SteeringError),
        (torch.zeros(2, D), UploadMalformed),
        ({}, UploadMalformed),
        ([torch.ones(D)], UploadMalformed),
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, saved: Any, error: type[SteeringError]) -> None:
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(error):
        convert(tmp_path / "x.pt", {**FIELDS, "layers": [1]})


def test_a_layer_type_without_a_site_is_refused(tmp_path: Path) -> None:
    data = (DATA / "steering_vectors_mlp.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(rewritten(data, lambda pickle: pickle.replace(b"\x00mlpq", b"\x00mlqq")))
    with pytest.raises(SiteUnsupported, match="mlq"):
        convert(tmp_path / "x.pt", FIELDS)


# -- the command --------------------------------------------------------------------------------------


def test_the_command_writes_what_add_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = json.dumps({"model": FIELDS["model"]})
    source = str(DATA / "steering_vectors_mlp.pt")
    assert cli.main(["assets", "convert", source, "--name", "calm", "--metadata", metadata]) == 0
    assert cli.main(["assets", "--store", "store", "add", "calm.safetensors"]) == 0
    stored = Store(tmp_path / "store").get("calm")
    assert torch.equal(stored.tensors["vectors"], load_file("calm.safetensors")["vectors"])
    assert cli.main(["assets", "--store", "store", "export", "calm", "out.safetensors"]) == 0
    assert convert(tmp_path / "out.safetensors", {}).ref == stored.ref


def test_a_refused_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes((DATA / "tensor.pt").read_bytes()[:-40])
    before = sorted(tmp_path.iterdir())
    metadata = json.dumps({"model": FIELDS["model"], "layers": [1]})
    assert cli.main(["assets", "convert", "bad.pt", "--name", "x", "--metadata", metadata]) == 1
    assert sorted(tmp_path.iterdir()) == before
