"""Dictionaries on disk: rows of a file far larger than memory, and files that are not what they say."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from steersman.steering import dictionaries
from steersman.steering.assets import Asset, DictionaryMeta, content_sha256, dump_metadata, parse_metadata
from steersman.steering.errors import AssetCorrupt, InvalidRequest, NonFinite, SteeringError, UploadMalformed
from steersman.steering.formats import dictionary_files, hook_names, native, uploads
from steersman.steering.rows import RowFile
from steersman.steering.store import Store

D, M = 6, 9
MODEL = {"id": "tiny", "n_layers": 4, "d_model": D}
META = {"name": "sae", "kind": "dictionary", "model": MODEL, "layer": 2, "architecture": "jumprelu"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder": (M, D), "decoder": (M, D), "b_dec": (D,), "b_enc": (M,), "threshold": (M,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def asset(**fields: Any) -> Asset:
    return Asset(parse_metadata({**META, **fields}), tensors())


# -- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    safetensors.torch.save_file(whole, tmp_path / "f")
    file = RowFile(tmp_path / "f")
    os.remove(tmp_path / "f")  # it stays readable
    assert torch.equal(file.rows("decoder", [7, 0, 7]), whole["decoder"][[7, 0, 7]])
    assert torch.equal(file.rows("threshold", [8]), whole["threshold"][[8]])
    assert torch.equal(torch.cat(list(file.chunks("encoder"))), whole["encoder"].flatten())
    assert all(torch.equal(file[name], tensor) for name, tensor in whole.items())
    assert content_sha256(META, file) == content_sha256(META, whole)
    with pytest.raises(IndexError):
        file.rows("decoder", [M])


def test_a_stored_dictionary_is_the_same_version_and_stays_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = asset()
    ref = store.add(made)
    found = Store(tmp_path / "store").get(ref)
    assert isinstance(found.tensors, RowFile)
    assert (found.sha256, found.nbytes) == (made.sha256, 0)
    for indices in ([0], [8, 3]):
        one, other = dictionaries.reads(found, indices), dictionaries.reads(made, indices)
        assert torch.equal(one.direction, other.direction)
        assert torch.equal(one.threshold, other.threshold)
    assert [verdict.problem for verdict in store.verify()] == [None]
    again = Store(tmp_path / "other").add(found)  # from one store to another, never whole in memory
    assert again == ref


def test_a_remote_dictionary_is_read_from_its_copy(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}", cache_dir=tmp_path)
    ref = store.add(asset())
    found = Store(f"memory://{tmp_path.name}", cache_dir=tmp_path).get(ref)
    assert torch.equal(found.tensors["decoder"], tensors()["decoder"])
    assert [verdict.problem for verdict in store.verify()] == [None]


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_dictionary_is_never_read(damage: str, tmp_path: Path) -> None:
    ref = Store(tmp_path).add(asset())
    [path] = tmp_path.glob("sae/*/tensors.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    elif damage == "cut":
        data = data[:-8]
    else:
        data = bytearray(safetensors.torch.save({"decoder": torch.zeros(2, 2)}))
    path.write_bytes(data)
    with pytest.raises(AssetCorrupt):
        Store(tmp_path).get(ref)
    assert Store(tmp_path).verify()[0].problem is not None


def high_water() -> int:
    """The most memory that this process has held since `reset`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_million_features_do_not_come_into_memory(tmp_path: Path) -> None:
    """19 GB of a dictionary as a sparse file: what is read is the header and the rows in use."""
    m, d = 1 << 20, 2304
    shapes = {"b_dec": [d], "b_enc": [m], "decoder": [m, d], "encoder": [m, d], "threshold": [m]}
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    meta = parse_metadata({**META, "model": {"id": "big", "n_layers": 26, "d_model": d}})
    sha = "ab" * 32
    folder = tmp_path / "sae" / sha[:12]
    folder.mkdir(parents=True)
    with (folder / "tensors.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)
        index = m - 3
        for name, value in (("encoder", 2.0), ("decoder", 3.0)):
            file.seek(8 + len(header) + entries[name]["data_offsets"][0] + index * d * 4)
            file.write(np.full(d, value, np.float32).tobytes())
    specs = {name: {"dtype": "float32", "shape": shape} for name, shape in shapes.items()}
    stored = {"sha256": sha, "order": 1, "at": "now", "tensors": specs}
    (folder / "asset.json").write_text(json.dumps({**dump_metadata(meta), "stored": stored}))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high water
    before = high_water()
    found = Store(tmp_path).get("sae")
    reads, writes = dictionaries.reads(found, [index, 17]), dictionaries.writes(found, [index, 17])
    grown = high_water() - before
    assert found.shapes["decoder"] == (m, d)
    assert os.stat(folder / "tensors.safetensors").st_size > 19e9
    assert torch.equal(reads.direction, torch.stack([torch.full((d,), 2.0), torch.zeros(d)]))
    assert torch.equal(writes, torch.stack([torch.full((d,), 3.0), torch.zeros(d)]))
    assert grown < 64 << 20, f"{grown >> 20} MiB"


# -- bad files --------------------------------------------------------------------------------------------


SAELENS = {"architecture": "jumprelu", "d_in": D, "d_sae": M, "metadata": {"hook_name": "blocks.1.hook_resid_post"},
           "apply_b_dec_to_input": False, "normalize_activations": "none"}  # fmt: skip


def lens(**changes: Any) -> dict[str, torch.Tensor]:
    own = tensors()
    state = {"W_enc": own["encoder"].T.contiguous(), "W_dec": own["decoder"]}
    state |= {n: own[n] for n in ("b_dec", "b_enc", "threshold")}
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


def read(state: dict[str, torch.Tensor], config: Any = None, **fields: Any) -> Asset:
    given = {"name": "sae", "model": MODEL, "config": SAELENS if config is None else config, **fields}
    return uploads.read(safetensors.torch.save(state), given)


def test_a_sound_file_is_read() -> None:
    assert torch.equal(read(lens()).tensors["decoder"], tensors()["decoder"])


@pytest.mark.parametrize(
    ("state", "error", "param"),
    [
        (lens(W_dec=torch.zeros(M, D + 1)), SteeringError, "tensors.decoder"),
        (lens(W_dec=torch.zeros(D, M)), SteeringError, "tensors.decoder"),
        (lens(W_enc=torch.zeros(M, D)), InvalidRequest, "tensors.encoder"),
        (lens(W_enc=torch.zeros(D)), UploadMalformed, "file"),
        (lens(threshold=torch.zeros(1)), InvalidRequest, "tensors.threshold"),
        (lens(threshold=None), UploadMalformed, "file"),
        (lens(extra=torch.zeros(1)), UploadMalformed, "file"),
        (lens(b_enc=torch.full((M,), torch.nan)), NonFinite, "tensors.b_enc"),
        (lens(W_dec=torch.full((M, D), torch.inf)), NonFinite, "tensors.decoder"),
        (lens(b_enc=torch.zeros(M, dtype=torch.int64)), UploadMalformed, "file"),
    ],
)
def test_bad_tensors_are_refused_in_words(
    state: dict[str, torch.Tensor], error: type[SteeringError], param: str
) -> None:
    with pytest.raises(error) as raised:
        read(state)
    assert (raised.value.param, 400 <= raised.value.status < 500) == (param, True)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"architecture": "temporal"}, "config.architecture"),
        ({"architecture": 3}, "config.architecture"),
        ({"apply_b_dec_to_input": "yes"}, "config.apply_b_dec_to_input"),
        ({"normalize_activations": "whiten"}, "config.normalize_activations"),
        ({"normalize_activations": "expected_average_only_in"}, "config.input_scale"),
        ({"normalize_activations": True, "input_scale": -1}, "config.input_scale"),
        ({"activation_fn": "tanh-relu"}, "config.activation_fn"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_q"}}, "config.hook_name"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post", "hook_head_index": 3}}, "config.hook_head_index"),
        ({"metadata": {}}, "layer"),
        ({"metadata": [1]}, "config.metadata"),
    ],
)
def test_bad_configurations_name_their_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(lens(), {**SAELENS, **change})
    assert raised.value.param == param


def test_a_factor_that_the_file_leaves_out_is_asked_for_and_used() -> None:
    scaled = read(lens(), {**SAELENS, "normalize_activations": "expected_average_only_in", "input_scale": 0.5})
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(dictionaries.encode(scaled, x), dictionaries.encode(read(lens()), x / 2))
    reads = dictionaries.reads(scaled, [4])
    want = dictionaries.encode(scaled, x)[:, 4]
    p = x @ reads.direction[0] + reads.bias
    torch.testing.assert_close(torch.where(p > reads.threshold, p, 0), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{"format": "pickle"}, {"config": []}, {"model": {"id": "tiny"}}, {"model": 3}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        read(lens(), **fields)


def test_cut_files_and_huge_headers_are_refused_in_words(tmp_path: Path) -> None:
    data = safetensors.torch.save(lens())
    fields = {"name": "sae", "model": MODEL, "config": SAELENS}
    for bad in (data[:-1], data[:40], data[:7], struct.pack("<Q", 1 << 40) + data[8:], struct.pack("<Q", 2**64 - 1)):
        with pytest.raises(UploadMalformed):
            uploads.read(bad, fields)
        (tmp_path / "sae_weights.safetensors").write_bytes(bad)
        with pytest.raises(UploadMalformed):
            dictionary_files.from_path(tmp_path, fields, tmp_path)


# -- npz --------------------------------------------------------------------------------------------------

NPZ = {"name": "gemma", "model": MODEL, "hook_name": "blocks.3.hook_resid_post"}


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **{**{name: tensor.numpy() for name, tensor in lens().items()}, **arrays})
    return out.getvalue()


def test_an_npz_is_gemma_scope() -> None:
    made = uploads.read(npz(), NPZ)
    assert torch.equal(made.tensors["encoder"], tensors()["encoder"])
    assert (made.meta.edited_layers, made.meta.kind) == ((3,), "dictionary")


def lying(shape: str) -> bytes:
    """An archive whose one array promises more than it has."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 64
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("W_enc.npy", entry)
    return out.getvalue()


def headed(header: str) -> bytes:
    """An archive with one array whose header is this text."""
    padded = header.ljust(117) + "\n"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + b"\0" * 64
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("W_enc.npy", entry)
    return out.getvalue()


def packed(compression: int) -> bytes:
    """A sound archive, packed as numpy never does: its blocks unpack whole, however large."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz())) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def twice() -> bytes:
    out = io.BytesIO(npz())
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("b_dec", archive.read("b_dec.npy"))
    return out.getvalue()


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", b"\0" * (64 << 20))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npz()[:-30],
        npz()[:100],
        b"PK\x03\x04",
        lying("(1000000000000,)"),
        lying("(2305843009213693952, 8)"),
        lying("(-1,)"),
        bomb(),
        packed(zipfile.ZIP_BZIP2),
        packed(zipfile.ZIP_LZMA),
        twice(),
        headed("((("),
        headed("{1: 2, 'a': 3}"),
        headed("{[]: 1}"),
        headed("-" * 9000 + "1"),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2)}"),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}"),
        npz(W_enc=np.array([{"a": 1}], dtype=object)),
        npz(W_enc=np.zeros((D, M), dtype=np.int32)),
        npz(w_enc=np.zeros((D, M), dtype=np.float32), other=np.zeros(3, dtype=np.float32)),
    ],
)
def test_bad_archives_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(SteeringError) as raised:
        uploads.read(data, {**NPZ, "format": "gemma_scope"})
    assert raised.value.status == 400


def test_a_file_on_disk_goes_out_in_parts_under_our_own_metadata(tmp_path: Path) -> None:
    foreign = {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()}
    safetensors.torch.save_file(foreign, tmp_path / "f", {"format": "pt"})
    made = Asset(parse_metadata(META), RowFile(tmp_path / "f"))
    assert native.from_safetensors(native.to_safetensors(made)).sha256 == made.sha256


def test_only_so_many_dictionaries_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.steering.store.MAX_OPEN", 2)
    store = Store(tmp_path)
    refs = [store.add(asset(name=f"sae{i}")) for i in range(6)]
    store.get(refs[0])
    before = len(os.listdir("/proc/self/fd"))
    for ref in refs:
        store.get(ref)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert store.get(refs[5]) is store.get(refs[5])


def test_what_is_read_of_an_unhashed_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.steering.store.HASHED_BYTES", 0)
    ref = Store(tmp_path).add(asset())
    found = Store(tmp_path).get(ref)
    [path] = tmp_path.glob("sae/*/tensors.safetensors")
    assert isinstance(found.tensors, RowFile)
    for name, read in (
        ("encoder", dictionaries.reads),
        ("b_enc", dictionaries.reads),
        ("decoder", dictionaries.writes),
    ):
        sound = path.read_bytes()
        spec = found.tensors.specs[name]
        at = spec.start + 4 * spec.nbytes // (4 * M)  # the row of feature 1
        with path.open("r+b") as file:
            file.seek(at)
            file.write(struct.pack("<f", float("nan")))
        with pytest.raises(AssetCorrupt, match=name):
            read(found, [1])
        read(found, [0])
        path.write_bytes(sound)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(AssetCorrupt, match="cut short"):
        dictionaries.reads(found, [M - 1])


def test_a_stored_hash_is_a_hash(tmp_path: Path) -> None:
    """It names files in the cache folder, so nothing else may stand there."""
    ref = Store(tmp_path).add(asset())
    [path] = tmp_path.glob("sae/*/asset.json")
    text = path.read_text()
    path.write_text(text.replace(json.loads(text)["stored"]["sha256"], ref.partition("@")[2] + "/../../out"))
    with pytest.raises(AssetCorrupt, match="damaged"):
        Store(tmp_path).info(ref)


def test_our_own_file_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "own.safetensors").write_bytes(native.to_safetensors(asset()))
    found = dictionary_files.from_path(tmp_path / "own.safetensors", {}, tmp_path)
    assert isinstance(found.tensors, RowFile)
    assert found.sha256 == asset().sha256
    bad = tensors() | {"b_enc": torch.full((M,), torch.nan)}
    header = {native.HEADER_KEY: json.dumps(META)}
    safetensors.torch.save_file(bad, tmp_path / "nan.safetensors", header)
    with pytest.raises(NonFinite):
        dictionary_files.from_path(tmp_path / "nan.safetensors", {}, tmp_path)


# -- what files say of their place -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("blocks.12.hook_resid_pre", (12, "resid_pre")),
        ("blocks.0.hook_resid_mid", (0, "resid_mid")),
        ("blocks.3.attn.hook_z", (3, "attn_z")),
        ("blocks.3.hook_attn_out", (3, "attn_out")),
        ("blocks.3.mlp.hook_post", (3, "mlp_post")),
        ("blocks.3.ln2.hook_normalized", (3, "mlp_in")),
        ("model.layers.7", (7, "resid_post")),
        ("layers.7.mlp", (7, "mlp_out")),
        ("transformer.h.7.attn", (7, "attn_out")),
        ("gpt_neox.layers.7.attention", (7, "attn_out")),
        ("model.layers.7.self_attn.o_proj.input", (7, "attn_z")),
        ("model.layers.7.output", (7, "resid_post")),
        ("model.layers.7.input", (7, "resid_pre")),
        ("hook_embed", (0, "resid_pre")),
    ],
)
def test_hook_names(name: str, where: tuple[int, str]) -> None:
    assert hook_names.parse(name) == where
    assert hook_names.parse(hook_names.lens_name(*where)) == where


@pytest.mark.parametrize(
    "name", ["", "blocks.x.hook_z", "blocks.1.hook_q", "layers", "model.layers.3.norm", "blocks.1."]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        hook_names.parse(name)


def test_the_transcoders_of_gemma_scope_and_sparsify() -> None:
    own = tensors()
    gemma = {"w_enc": own["encoder"].T.contiguous(), "w_dec": own["decoder"], "affine_skip_connection": torch.eye(D)}
    gemma |= {name: own[name] for name in ("b_enc", "b_dec", "threshold")}
    sparse = {"encoder.weight": own["encoder"], "encoder.bias": own["b_enc"], "W_dec": own["decoder"]}
    sparse |= {"b_dec": own["b_dec"], "W_skip": torch.eye(D)}
    config = {"num_latents": M, "k": 3, "transcode": True, "d_in": D}
    for made in (
        read(gemma, {}, layer=2),
        read(sparse, config, hook_name="layers.2.mlp"),
    ):
        meta = made.meta
        assert isinstance(meta, DictionaryMeta)
        assert (meta.layer, meta.site, meta.read_site, meta.apply_b_dec_to_input) == (2, "mlp_out", "mlp_in", False)
        assert torch.equal(made.tensors["skip"], torch.eye(D))
        assert torch.equal(made.tensors["encoder"], own["encoder"])


def test_a_fine_tuned_factor_is_folded_into_the_decoder() -> None:
    factor = torch.rand(M, generator=torch.Generator().manual_seed(5)) + 0.5
    made = read(lens(finetuning_scaling_factor=factor), {**SAELENS, "finetuning_scaling_factor": True})
    torch.testing.assert_close(made.tensors["decoder"], factor[:, None] * tensors()["decoder"])
    with pytest.raises(UploadMalformed):
        read(lens(finetuning_scaling_factor=factor))
