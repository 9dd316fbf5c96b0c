import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.steering import store as store_module
from steersman.steering import store_roots
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import (
    AmbiguousVersion,
    AssetCorrupt,
    AssetExists,
    UnknownAsset,
)
from steersman.steering.store import Store, parse_ref
from steersman.steering.store_roots import METADATA, TENSORS

MODEL = {"id": "tiny", "n_layers": 4, "d_model": 6}


def make(name: str = "french", seed: int = 0, **fields: Any) -> Asset:
    meta = parse_metadata({"name": name, "kind": "vector", "model": MODEL, "layers": [1, 3], **fields})
    return Asset(meta, {"vectors": torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))})


def profile(name: str, **fields: Any) -> Asset:
    return Asset(parse_metadata({"name": name, "kind": "profile", "model": MODEL, "steering": {}, **fields}))


@pytest.fixture(params=["local", "memory"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same root again and again, as so many processes would."""
    if request.param == "local":
        yield lambda: Store(tmp_path / "store")
        return
    url = f"memory://{tmp_path.name}-{time.time_ns()}"
    yield lambda: Store(url, cache_dir=tmp_path / "cache", refresh_seconds=0)
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def same(a: Asset, b: Asset) -> bool:
    return a.meta == b.meta and a.sha256 == b.sha256 and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def test_what_is_added_comes_back(opened: Callable[[], Store]) -> None:
    asset = make(recommended={"scale": 6.0, "how": "swept"}, tokens="generated")
    store = opened()
    assert store.add(asset) == asset.ref
    for each in (store, opened()):
        for ref in ("french", asset.ref, asset.ref[:-6]):
            assert same(each.get(ref), asset)
        info = each.info("french")
        assert (info.ref, info.meta) == (asset.ref, asset.meta)
        assert info.tensors == {"vectors": {"dtype": "float32", "shape": [2, 6]}}
        assert [verdict.problem for verdict in each.verify()] == [None]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rank=st.none() | st.integers(1, 3),
    data=st.binary(min_size=8, max_size=8),
    how=st.text(max_size=20),
    scale=st.floats(allow_nan=False, allow_infinity=False),
)
def test_round_trips_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, rank: int | None, data: bytes, how: str, scale: float
) -> None:
    seed = int.from_bytes(data, "little") >> 1
    vectors = torch.randn(1, *([rank] if rank else []), 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    meta = parse_metadata(
        {
            "name": "x",
            "kind": "vector",
            "model": {"id": "m", "n_layers": 1, "d_model": 5},
            "layers": [0],
            "recommended": {"scale": scale, "how": how},
        }
    )
    asset = Asset(meta, {"vectors": vectors})
    Store(tmp_path).add(asset)
    back = Store(tmp_path).get(asset.ref)
    assert back.meta == meta
    assert back.tensors["vectors"].dtype == dtype
    assert torch.equal(back.tensors["vectors"].view(torch.uint8), vectors.view(torch.uint8))


def test_a_plain_name_is_the_version_added_last(opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.time, "time_ns", lambda: 5)  # a clock that stands still does not matter
    store = opened()
    assets = [make(seed=seed) for seed in range(5)]
    for asset in assets:
        store.add(asset)
        assert store.get("french").ref == opened().get("french").ref == asset.ref
    assert store.add(assets[0]) == assets[0].ref  # idempotent, also in what is the latest
    assert opened().get("french").ref == assets[4].ref
    assert [info.ref for info in opened().list()] == [asset.ref for asset in reversed(assets)]


def test_another_store_on_the_same_root_sees_changes(opened: Callable[[], Store]) -> None:
    one, two = opened(), opened()
    with pytest.raises(UnknownAsset):
        two.get("french")
    one.add(make(seed=1))
    assert same(two.get("french"), make(seed=1))
    one.add(make(seed=2))
    assert same(two.get("french"), make(seed=2))
    one.remove(make(seed=2).ref)
    assert same(two.get("french"), make(seed=1))
    with pytest.raises(UnknownAsset):
        two.get(make(seed=2).ref)
    assert one.remove("french") == (make(seed=1).ref,)
    with pytest.raises(UnknownAsset):
        two.get("french")
    assert two.list() == two.verify() == ()
    one.add(make(seed=2))
    one.add(make(seed=1))
    assert same(two.get("french"), make(seed=1))


def test_version_prefixes(opened: Callable[[], Store]) -> None:
    store = opened()
    by_first: dict[str, list[Asset]] = {}
    for seed in range(18):  # sixteen first digits: two of them must agree
        asset = make(seed=seed)
        store.add(asset)
        by_first.setdefault(asset.version[0], []).append(asset)
    first, several = max(by_first.items(), key=lambda item: len(item[1]))
    for operation in (store.get, store.info, store.remove):
        with pytest.raises(AmbiguousVersion, match=several[0].ref):
            operation(f"french@{first}")
    for asset in several:
        assert store.get(asset.ref).ref == asset.ref
    assert len(store.verify(f"french@{first}")) == len(several)
    missing = "0" * 12
    with pytest.raises(UnknownAsset, match=missing):
        store.get(f"french@{missing}")


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a@",
        "a@../x",
        "a@xyz",
        "a@ABC",
        "a@" + "0" * 13,
        "a@b@c",
        "a\n",
        "a@b\n",
        "@ab",
    ],
)
def test_refs_that_name_nothing(tmp_path: Path, ref: str) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "x").mkdir()
    for operation in (store.get, store.info, store.remove, store.verify):
        with pytest.raises(UnknownAsset):
            operation(ref)
    assert (tmp_path / "x").is_dir()


def test_parse_ref() -> None:
    assert parse_ref("formal") == ("formal", None)
    assert parse_ref("formal@3fa9c1") == ("formal", "3fa9c1")


def test_an_unknown_name_suggests_a_near_one(opened: Callable[[], Store]) -> None:
    store = opened()
    store.add(make("french"))
    with pytest.raises(UnknownAsset, match="did you mean 'french'"):
        store.get("frnch")


def test_list_filters(opened: Callable[[], Store]) -> None:
    store = opened()
    store.add(make("french", description="Answers in French", licence="MIT"))
    store.add(make("formal", source="paper of 2024", model={**MODEL, "id": "other/Model"}))
    store.add(profile("calm"))
    names = lambda **filters: [info.name for info in store.list(**filters)]  # noqa: E731
    assert names() == ["calm", "formal", "french"]
    assert names(kind="vector") == ["formal", "french"]
    assert names(model="OTHER/model") == ["formal"]
    assert names(text="IN FRENCH") == names(text="mit") == ["french"]
    assert names(text="2024", kind="profile") == []


def files_of(root: Path, asset: Asset) -> dict[str, Path]:
    return {file: root / asset.name / asset.version / file for file in (METADATA, TENSORS)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def reword(path: Path) -> None:
    path.write_text(path.read_text().replace('"tiny"', '"tony"'))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    (METADATA, cut),
    (METADATA, reword),
    (METADATA, Path.unlink),
    (METADATA, as_folder),
    (METADATA, lambda path: path.write_bytes(b"")),
    (METADATA, lambda path: path.write_bytes(b"[]")),
    (METADATA, lambda path: path.write_bytes(b"\xff\xfe")),
    (METADATA, lambda path: path.write_text("[" * 100_000)),
    (METADATA, lambda path: path.write_text(path.read_text().replace('"vector"', '"vektor"'))),
    (METADATA, lambda path: path.write_text(path.read_text().replace('"name": "french"', '"name": "frank"'))),
    (TENSORS, cut),
    (TENSORS, flip),
    (TENSORS, Path.unlink),
    (TENSORS, as_folder),
    (TENSORS, lambda path: path.write_bytes(b"")),
    (TENSORS, lambda path: path.write_bytes(b"\xff" * 64)),
]


@pytest.mark.parametrize("loaded", [True, False], ids=["open", "fresh"])
@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_damage_is_named_and_a_new_add_heals_it(
    tmp_path: Path, file: str, damage: Callable[[Path], object], loaded: bool
) -> None:
    writer = Store(tmp_path)
    good, bad = make("formal"), make("french")
    writer.add(good)
    writer.add(bad)
    store = writer if loaded else Store(tmp_path)
    damage(files_of(tmp_path, bad)[file])
    names = [info.name for info in store.list()]
    assert "formal" in names
    verdicts = {verdict.ref: verdict.problem for verdict in store.verify()}
    assert verdicts[good.ref] is None
    assert f"french/{bad.version}/" in (verdicts[bad.ref] or "")
    assert str(tmp_path) not in (verdicts[bad.ref] or "")
    for ref in (bad.ref, "french"):
        with pytest.raises(AssetCorrupt, match=file):
            store.get(ref)
    assert store.add(bad) == bad.ref
    assert {verdict.problem for verdict in store.verify()} == {None}
    assert same(store.get("french"), bad)
    assert len(store.list()) == 2


def test_a_damaged_version_can_be_removed_and_does_not_hide_behind_an_older_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = make(seed=1), make(seed=2)
    store.add(old)
    store.add(new)
    cut(files_of(tmp_path, new)[METADATA])
    with pytest.raises(AssetCorrupt):
        store.get("french")
    assert store.get(old.ref).ref == old.ref
    assert store.remove(new.ref) == (new.ref,)
    assert store.get("french").ref == old.ref


def test_other_content_under_the_same_version_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asset = make()
    store.add(asset)
    twin = Asset(asset.meta, {"vectors": asset.tensors["vectors"] + 1}, asset.version + "0" * 52)
    with pytest.raises(AssetExists):
        store.add(twin)


def test_strangers_in_the_root_are_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make())
    (tmp_path / "README").write_text("hello")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "french" / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert [info.name for info in store.list()] == ["french"]
    assert len(store.verify()) == 1
    with pytest.raises(UnknownAsset):
        store.get("README")


def test_threads_add_get_list_and_remove_at_once(opened: Callable[[], Store]) -> None:
    stores = [opened(), opened()]
    stores[0].add(make("steady"))
    start = threading.Barrier(8)

    def work(number: int) -> list[str]:
        start.wait()
        store, refs = stores[number % 2], []
        for step in range(6):
            refs.append(store.add(make("shared", seed=step)))  # the same content from every thread
            refs.append(store.add(make(f"own-{number}", seed=step)))
            assert store.get("steady").ref == make("steady").ref
            assert "steady" in [info.name for info in store.list()]
        store.remove(f"own-{number}@{make(f'own-{number}', seed=0).version}")
        return refs

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    fresh = opened()
    assert all(verdict.problem is None for verdict in fresh.verify())
    gone = {make(f"own-{number}", seed=0).ref for number in range(8)}
    assert {info.ref for info in fresh.list()} == {r for refs in results for r in refs} - gone | {make("steady").ref}


def test_memory_holds_what_was_used_last(tmp_path: Path) -> None:
    one = make().nbytes
    store = Store(tmp_path, memory_bytes=2 * one)
    for name in ("a", "b", "c"):
        store.add(make(name))
    a = store.get("a")
    assert store.get("a") is a
    b = store.get("b")
    assert store.get("a") is a
    store.get("c")  # pushes b out
    assert store.get("a") is a
    assert store.get("b") is not b
    tight = Store(tmp_path, memory_bytes=0)
    assert tight.get("a") is not tight.get("a")


def test_metadata_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.add(make("a"))
    store.add(make("b"))
    store.list()
    monkeypatch.setattr(store_roots.LocalRoot, "read", lambda *args: pytest.fail("read again"))
    assert len(store.list()) == 2
    assert store.info("a").name == "a"


def test_the_layout_on_disk(tmp_path: Path) -> None:
    asset = make(recommended={"scale": 2})
    Store(tmp_path).add(asset)
    value = json.loads(files_of(tmp_path, asset)[METADATA].read_text())
    assert value.pop("stored").keys() == {"sha256", "order", "at", "tensors"}
    assert parse_metadata(value) == asset.meta
    assert sorted(path.name for path in (tmp_path / "french" / asset.version).iterdir()) == [METADATA, TENSORS]
