"""The store of assets, over a local folder or any fsspec URL.

`STORE/<name>/<version>/{asset.json, tensors.safetensors}`; the version is the first 12 hex digits of the content's
SHA-256. `asset.json` is the asset's metadata and a block `stored` {sha256, order, at, tensors} that is not hashed.

A version never changes. The latest of a name is the one with the greatest `order`: a clock in nanoseconds, pushed past
every order that the name already has. It is written with the version itself, so there is no pointer that a crash could
leave behind. Adding content that is there already changes nothing, not even which version is the latest.

Content is hashed whenever it is read from disk, so a damaged file is an `AssetCorrupt` that names it, never an edit.
A dictionary stays on disk and is read by rows. It is hashed when it is opened if it has at most `HASHED_BYTES`; a
larger one is then only checked for its header and length, and hashed by `add` and `verify`.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import safetensors.torch

from steersman.steering.assets import (
    VERSION_LENGTH,
    Asset,
    AssetMeta,
    content_sha256,
    dump_metadata,
    is_name,
    parse_metadata,
    tensor_specs,
)
from steersman.steering.errors import (
    AmbiguousVersion,
    AssetCorrupt,
    AssetExists,
    SteeringError,
    StoreUnavailable,
    UnknownAsset,
)
from steersman.steering.rows import RowFile
from steersman.steering.store_roots import METADATA, TENSORS, Root, open_root

HASHED_BYTES: Final = 1 << 30
MAX_OPEN: Final = 128  # dictionaries whose file is kept open: a process may have few descriptors
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_REF: Final = re.compile(rf"(?P<name>[^@]+)(?:@(?P<version>[0-9a-f]{{1,{VERSION_LENGTH}}}))?")


@dataclass(frozen=True)
class AssetInfo:
    """A stored version without its tensors."""

    meta: AssetMeta
    sha256: str
    order: int
    created: str  # ISO 8601, when this version was first stored here
    tensors: Mapping[str, Any]  # name -> {"dtype", "shape"}

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def version(self) -> str:
        return self.sha256[:VERSION_LENGTH]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: `problem` is None when the version is sound."""

    ref: str
    problem: str | None


class Store:
    """Thread-safe. Several stores, in several processes, may share one root."""

    def __init__(
        self,
        root: str | Path,
        *,
        memory_bytes: int = 1 << 30,
        cache_dir: str | Path | None = None,
        refresh_seconds: float = 5.0,
    ) -> None:
        """`cache_dir` and `refresh_seconds` are for remote roots: where copies lie, how old a listing may be."""
        self._root: Root = open_root(str(root), cache_dir, refresh_seconds)
        self._memory_bytes = memory_bytes
        self._lock = threading.RLock()  # guards the two tables below; never held while a file is read
        self._infos: dict[tuple[str, str, object], AssetInfo] = {}  # (name, version, stamp)
        self._loaded: OrderedDict[str, Asset] = OrderedDict()  # ref -> asset, the latest used last
        self._adding = threading.Lock()

    def add(self, asset: Asset) -> str:
        """Stores `asset` and returns `name@version`. What is there already is left as it is; if damaged, replaced."""
        with self._adding:
            known = self._versions(asset.name, fresh=True)
            if asset.version in known:
                self._refuse_other_content(asset, known[asset.version])
                if self._check(asset.name, asset.version) is None:
                    return asset.ref
            orders = [info.order for info in known.values() if isinstance(info, AssetInfo)]
            stored = {
                "sha256": asset.sha256,
                "order": max([time.time_ns(), *(order + 1 for order in orders)]),
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "tensors": tensor_specs(asset.tensors),
            }
            text = json.dumps({**dump_metadata(asset.meta), "stored": stored}, indent=1, sort_keys=True)
            tensors = asset.tensors
            content = tensors.content() if isinstance(tensors, RowFile) else [safetensors.torch.save(dict(tensors))]
            files: dict[str, Iterable[bytes]] = {TENSORS: content, METADATA: [text.encode()]}
            self._root.write(asset.name, asset.version, files, replace=asset.version in known)
            self._root.forget(asset.name, asset.version)
        return asset.ref

    def get(self, ref: str) -> Asset:
        """The asset named `name`, `name@version` or `name@<prefix of a version>`; a plain name: the latest."""
        info = self.info(ref)
        with self._lock:
            asset = self._loaded.get(info.ref)
            if asset is not None:
                self._loaded.move_to_end(info.ref)
                return asset
        try:
            asset = self._load(info.name, info.version, origin=False)
        except AssetCorrupt:
            if info.version not in self._root.versions(info.name, fresh=True):
                raise UnknownAsset(f"asset '{info.ref}' has been removed") from None
            raise
        with self._lock:
            asset = self._loaded.setdefault(info.ref, asset)  # another thread may have been faster
            self._loaded.move_to_end(info.ref)
            total = sum(each.nbytes for each in self._loaded.values())
            while total > self._memory_bytes:
                total -= self._loaded.popitem(last=False)[1].nbytes
            for stale in [ref for ref, each in self._loaded.items() if isinstance(each.tensors, RowFile)][:-MAX_OPEN]:
                del self._loaded[stale]
        return asset

    def info(self, ref: str) -> AssetInfo:
        """As `get`, without the tensors."""
        name, prefix = parse_ref(ref)
        versions = self._versions(name)
        found = [version for version in versions if version.startswith(prefix or "")]
        if not found:  # it may have been added since a remote root was last listed
            versions = self._versions(name, fresh=True)
            found = [version for version in versions if version.startswith(prefix or "")]
        if not versions:
            raise UnknownAsset(f"no asset '{name}'{self._similar(name)}")
        if prefix is None:
            infos = [_sound(info) for info in versions.values()]
            return max(infos, key=lambda info: (info.order, info.version))
        if not found:
            raise UnknownAsset(f"asset '{name}' has no version {prefix}; it has {', '.join(sorted(versions))}")
        if len(found) > 1:
            raise AmbiguousVersion(f"'{ref}' may be any of {', '.join(f'{name}@{v}' for v in sorted(found))}")
        return _sound(versions[found[0]])

    def list(self, kind: str | None = None, model: str | None = None, text: str | None = None) -> tuple[AssetInfo, ...]:
        """Every sound version, by name and the latest first. Damaged ones are left out; `verify` names them.

        `model` is the model's id; `text` is looked for in name, description, source and licence.
        """
        found = []
        for name in sorted(self._root.names()):
            infos = [info for info in self._versions(name).values() if isinstance(info, AssetInfo)]
            found += sorted(infos, key=lambda info: (info.order, info.version), reverse=True)
        return tuple(
            info
            for info in found
            if (kind is None or info.meta.kind == kind)
            and (model is None or info.meta.model.id.casefold() == model.casefold())
            and (text is None or text.casefold() in _searchable(info.meta))
        )

    def remove(self, ref: str) -> tuple[str, ...]:
        """Removes one version, or with a plain name all of them; returns what was removed. Damaged ones go too."""
        name, prefix = parse_ref(ref)
        with self._adding:
            versions = self._root.versions(name, fresh=True)
            doomed = [v for v in versions if prefix is None or v.startswith(prefix)]
            if not doomed or (prefix is not None and len(doomed) > 1):
                self.info(ref)  # raises: unknown or ambiguous
            for version in doomed:
                self._root.delete(name, version)
                with self._lock:
                    self._loaded.pop(f"{name}@{version}", None)
        return tuple(f"{name}@{version}" for version in sorted(doomed))

    def verify(self, ref: str | None = None) -> tuple[Verdict, ...]:
        """Reads again and re-hashes one version, all versions of a name, or without `ref` the whole store."""
        wanted, prefix = (None, None) if ref is None else parse_ref(ref)
        verdicts = []
        for name in sorted(self._root.names()) if wanted is None else [wanted]:
            versions = [v for v in self._root.versions(name, fresh=True) if v.startswith(prefix or "")]
            verdicts += [Verdict(f"{name}@{version}", self._check(name, version)) for version in sorted(versions)]
        if ref is not None and not verdicts:
            raise UnknownAsset(f"no asset '{ref}'")
        return tuple(verdicts)

    def _versions(self, name: str, fresh: bool = False) -> dict[str, AssetInfo | AssetCorrupt]:
        """Every stored version of `name`. Metadata is read once: a version's stamp changes when its folder does."""
        stamps = self._root.versions(name, fresh)
        with self._lock:
            known: dict[str, AssetInfo | AssetCorrupt] = {
                version: self._infos[name, version, stamp]
                for version, stamp in stamps.items()
                if (name, version, stamp) in self._infos
            }
        read: dict[str, AssetInfo] = {}
        for version in stamps.keys() - known.keys():
            try:
                read[version] = self._read_metadata(name, version)[0]
            except AssetCorrupt as error:
                if version in self._root.versions(name, fresh=True):  # else it has been removed meanwhile
                    known[version] = error
        with self._lock:
            for key in [key for key in self._infos if key[0] == name and stamps.get(key[1]) != key[2]]:
                del self._infos[key]
            self._infos.update({(name, version, stamps[version]): info for version, info in read.items()})
        return known | read

    def _read_metadata(self, name: str, version: str) -> tuple[AssetInfo, dict[str, Any]]:
        """What `asset.json` states, and the part of it that is hashed."""
        where = f"{name}/{version}/{METADATA}"
        data = self._read_file(name, version, METADATA, origin=True)
        try:
            hashed = json.loads(data)
            stored = hashed.pop("stored")
            meta = parse_metadata(hashed)
            info = AssetInfo(meta, stored["sha256"], int(stored["order"]), str(stored["at"]), dict(stored["tensors"]))
            if not _SHA256.fullmatch(info.sha256) or (info.name, info.version) != (name, version):
                raise ValueError(f"it states {info.ref}")
        except (SteeringError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AssetCorrupt(f"{where} is damaged: {error}") from error
        return info, hashed

    def _load(self, name: str, version: str, origin: bool) -> Asset:
        """The asset as its files say, re-hashed. A damaged copy of a remote version is fetched once more."""
        try:
            return self._load_once(name, version, origin)
        except AssetCorrupt:
            if origin or not self._root.forget(name, version):
                raise
            return self._load_once(name, version, origin)

    def _load_once(self, name: str, version: str, origin: bool) -> Asset:
        info, hashed = self._read_metadata(name, version)
        where = f"{name}/{version}/{TENSORS}"
        if info.meta.kind == "dictionary":
            return self._open(info, hashed, origin)
        data = self._read_file(name, version, TENSORS, origin)
        try:
            tensors = safetensors.torch.load(data)
            if content_sha256(hashed, tensors) != info.sha256:
                raise ValueError(f"its content and {METADATA} do not have the hash {info.sha256}")
            return Asset(info.meta, tensors, info.sha256)
        except Exception as error:  # the reader of tensors documents no list of what it raises
            raise AssetCorrupt(f"{where} is damaged: {error}") from error

    def _open(self, info: AssetInfo, hashed: dict[str, Any], origin: bool) -> Asset:
        """A dictionary, whose tensors stay on disk. `origin`: whatever its size, hash it."""
        where = f"{info.name}/{info.version}/{TENSORS}"
        try:
            tensors = RowFile(self._root.path(info.name, info.version, TENSORS, origin))
            if tensor_specs(tensors) != info.tensors:
                raise ValueError(f"its tensors are not those that {METADATA} states")
            whole = origin or tensors.nbytes <= HASHED_BYTES
            if whole and content_sha256(hashed, tensors) != info.sha256:
                raise ValueError(f"its content and {METADATA} do not have the hash {info.sha256}")
            return Asset(info.meta, tensors, info.sha256)
        except FileNotFoundError as error:
            raise AssetCorrupt(f"{where} is missing") from error
        except StoreUnavailable:
            raise
        except (SteeringError, ValueError, OSError) as error:
            raise AssetCorrupt(f"{where} is damaged: {error}") from error

    def _read_file(self, name: str, version: str, file: str, origin: bool) -> bytes:
        try:
            return self._root.read(name, version, file, origin)
        except FileNotFoundError as error:
            raise AssetCorrupt(f"{name}/{version}/{file} is missing") from error
        except OSError as error:
            raise AssetCorrupt(f"{name}/{version}/{file} cannot be read: {error.strerror}") from error

    def _check(self, name: str, version: str) -> str | None:
        try:
            self._load(name, version, origin=True)
        except AssetCorrupt as error:
            return error.message
        return None

    def _refuse_other_content(self, asset: Asset, there: AssetInfo | AssetCorrupt) -> None:
        if isinstance(there, AssetInfo) and there.sha256 != asset.sha256:
            raise AssetExists(f"{asset.ref} is stored with other content, whose hash begins with the same digits")

    def _similar(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._root.names(), n=1)
        return f"; did you mean '{close[0]}'?" if close else ""


def parse_ref(ref: str) -> tuple[str, str | None]:
    """`name` or `name@version` as (name, version or None); the version may be a prefix."""
    match = _REF.fullmatch(ref)
    if match is None or not is_name(match["name"]):
        raise UnknownAsset(f"'{ref[:256]}' names no asset: wanted is name or name@version")
    return match["name"], match["version"]


def _sound(info: AssetInfo | AssetCorrupt) -> AssetInfo:
    if isinstance(info, AssetCorrupt):
        raise AssetCorrupt(info.message)
    return info


def _searchable(meta: AssetMeta) -> str:
    return "\n".join((meta.name, meta.description, meta.source, meta.licence)).casefold()
