"""Stored dictionaries, which stay on disk: rows of a file far larger than memory, each checked when it is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from steersman.steering import dictionaries
from steersman.steering.assets import Asset, content_sha256, dump_metadata, parse_metadata
from steersman.steering.errors import AssetCorrupt, NonFinite
from steersman.steering.formats import dictionary_files, native
from steersman.steering.rows import RowFile
from steersman.steering.store import Store
from tests.steering.small_dictionary import META, M, asset, tensors


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
