import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from steersman.steering import store_roots
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import StoreUnavailable, UnknownAsset
from steersman.steering.store import Store
from steersman.steering.store_roots import METADATA, TENSORS

MODEL = {"id": "tiny", "n_layers": 4, "d_model": 6}


def make(name: str = "french", seed: int = 0, **fields: Any) -> Asset:
    meta = parse_metadata({"name": name, "kind": "vector", "model": MODEL, "layers": [1, 3], **fields})
    return Asset(meta, {"vectors": torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))})


def same(a: Asset, b: Asset) -> bool:
    return a.meta == b.meta and a.sha256 == b.sha256 and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


CRASH = """
import os, sys
from steersman.steering import store_roots
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.store import Store
import torch
def die(*args): os._exit(9)
setattr(store_roots{target}, {attribute!r}, die)
meta = {{"name": "french", "kind": "vector", "model": {model}, "layers": [1, 3]}}
Store({root!r}).add(Asset(parse_metadata(meta), {{"vectors": torch.ones(2, 6)}}))
"""


@pytest.mark.parametrize(("target", "attribute"), [(".os", "rename"), (".os", "fsync"), ("", "_flush_folder")])
def test_a_writer_that_dies_leaves_the_old_version(tmp_path: Path, target: str, attribute: str) -> None:
    store = Store(tmp_path)
    store.add(make())
    script = CRASH.format(target=target, attribute=attribute, model=MODEL, root=str(tmp_path))
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert died.returncode == 9
    left = [path for path in (tmp_path / "french").iterdir() if path.name.startswith(".tmp-")]
    assert len(left) == 1
    for each in (store, Store(tmp_path)):
        assert same(each.get("french"), make())
        assert [verdict.problem for verdict in each.verify()] == [None]
    os.utime(left[0], (0, 0))
    store.add(make(seed=3))
    assert not left[0].exists()
    assert same(Store(tmp_path).get("french"), make(seed=3))


def test_a_failing_write_cleans_up_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_roots.os, "fsync", full)
        with pytest.raises(StoreUnavailable, match="No space"):
            store.add(make())
    assert list((tmp_path / "french").iterdir()) == []
    store.add(make())
    assert same(store.get("french"), make())


def test_a_faster_process_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Store(tmp_path), Store(tmp_path)
    make_folder = store_roots._make

    def meanwhile(folder: Path) -> None:
        monkeypatch.setattr(store_roots, "_make", make_folder)
        fast.add(make())
        make_folder(folder)

    monkeypatch.setattr(store_roots, "_make", meanwhile)
    assert slow.add(make()) == make().ref
    assert same(slow.get("french"), make())
    assert [path.name for path in (tmp_path / "french").iterdir()] == [make().version]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[str, Path, Any]]:
    url = f"memory://remote-{time.time_ns()}"
    fs, _ = fsspec.core.url_to_fs(url)
    yield url, tmp_path / "cache", fs
    if fs.exists(url):
        fs.rm(url, recursive=True)


def test_a_remote_version_without_its_metadata_does_not_exist_yet(
    remote: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache, fs = remote
    store = Store(url, cache_dir=cache, refresh_seconds=0)
    store.add(make(seed=1))
    put = type(fs).pipe_file

    def dies(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        if path.endswith(METADATA):
            raise OSError("connection lost")
        put(self, path, value, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(fs), "pipe_file", dies)
        with pytest.raises(StoreUnavailable, match="connection lost"):
            store.add(make(seed=2))
    assert [info.ref for info in store.list()] == [make(seed=1).ref]
    assert same(store.get("french"), make(seed=1))
    store.add(make(seed=2))
    assert same(store.get("french"), make(seed=2))


def test_tensors_are_cached_on_disk_and_a_damaged_copy_is_fetched_again(remote: tuple[str, Path, Any]) -> None:
    url, cache, fs = remote
    asset = make()
    Store(url, cache_dir=cache).add(asset)
    assert not list(cache.rglob("*.safetensors"))
    Store(url, cache_dir=cache).get("french")
    (copy,) = cache.rglob("*.safetensors")
    path = next(path for path in fs.find(url) if path.endswith(TENSORS))
    data = fs.cat_file(path)
    fs.rm_file(path)
    assert same(Store(url, cache_dir=cache).get("french"), asset)  # out of the cache
    assert [verdict.problem is None for verdict in Store(url, cache_dir=cache).verify()] == [False]  # the origin counts
    fs.pipe_file(path, data)
    flip(copy)
    assert same(Store(url, cache_dir=cache).get("french"), asset)
    flip(copy)
    copy.parent.chmod(0o500)
    assert same(Store(url, cache_dir=cache).get("french"), asset)
    copy.parent.chmod(0o700)


def test_an_outage_stops_only_what_is_not_here_yet(
    remote: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache, fs = remote
    store = Store(url, cache_dir=cache, refresh_seconds=0)
    store.add(make("here"))
    store.add(make("there"))
    store.get("here")

    def out(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    for method in ("ls", "find", "cat_file", "pipe_file"):
        monkeypatch.setattr(type(fs), method, out)
    assert same(store.get("here"), make("here"))
    with pytest.raises(StoreUnavailable):
        Store(url, cache_dir=cache).get("there")
    with pytest.raises(StoreUnavailable):
        store.add(make("new"))


def test_unknown_names_do_not_list_a_remote_root_each_time(
    remote: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache, fs = remote
    store = Store(url, cache_dir=cache)
    store.add(make())
    store.get("french")
    listed: list[str] = []
    find = type(fs).find
    monkeypatch.setattr(type(fs), "find", lambda self, path, **kw: listed.append(path) or find(self, path, **kw))
    for _ in range(5):
        store.get("french")
        with pytest.raises(UnknownAsset):
            store.get("french@000000000000")
    assert len(listed) <= 1


@pytest.mark.parametrize("url", ["nosuchprotocol://x"])
def test_a_root_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="nosuchprotocol"):
        Store(url)
