"""Where a store's files lie: a local folder, or any other fsspec file system with a local cache of the tensors.

Both hold `<name>/<version>/{asset.json, tensors.safetensors}` and promise that a version is seen whole or not at all:

- local: written into a hidden sibling, flushed, then renamed;
- remote (an object store renames nothing): `asset.json` is put last and deleted first; without it there is no version.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from steersman.steering.assets import VERSION_LENGTH, is_name
from steersman.steering.errors import StoreUnavailable

METADATA: Final = "asset.json"
TENSORS: Final = "tensors.safetensors"
_VERSION: Final = re.compile(rf"[0-9a-f]{{{VERSION_LENGTH}}}")
_HIDDEN: Final = ".tmp-"
_ABANDONED_SECONDS: Final = 24 * 3600  # a hidden folder this old belongs to no writer that is still alive
_MIN_LISTING_AGE: Final = 0.5  # seconds; bounds how often unknown names can make a remote root be listed
_STAMP: Final = ("size", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "created")
_log = logging.getLogger(__name__)


class Root(Protocol):
    """`name` and `version` have been checked by the caller: they never lead out of the root."""

    def names(self) -> list[str]: ...

    def versions(self, name: str, fresh: bool = False) -> dict[str, object]:
        """Each version and a stamp that changes when it is written anew. `fresh`: do not answer from memory."""
        ...

    def read(self, name: str, version: str, file: str, origin: bool) -> bytes:
        """A file's bytes, `origin`: not from a local copy. OSError when this very file is missing or cannot be read."""
        ...

    def path(self, name: str, version: str, file: str, origin: bool) -> Path:
        """A local file with the same content, to be read by parts; errors as for `read`."""
        ...

    def write(self, name: str, version: str, files: Mapping[str, Iterable[bytes]], replace: bool) -> None:
        """Each file's content in parts; a list is small. `replace`: what is there is damaged, else it is kept."""
        ...

    def delete(self, name: str, version: str) -> None: ...

    def forget(self, name: str, version: str) -> bool:
        """Drops local copies; whether there was one."""
        ...


def open_root(url: str, cache_dir: str | Path | None, refresh_seconds: float) -> Root:
    with _reaching(f"opening {url}"):
        fs, path = url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        return LocalRoot(Path(path))
    base = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return RemoteRoot(fs, str(path).rstrip("/"), base / "steersman" / key, refresh_seconds)


class LocalRoot:
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        return [entry.name for entry in _scan(self._path) if is_name(entry.name) and entry.is_dir()]

    def versions(self, name: str, fresh: bool = False) -> dict[str, object]:
        found: dict[str, object] = {}
        for entry in _scan(self._path / name):
            if _VERSION.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    stat = entry.stat()
                    found[entry.name] = (stat.st_ino, stat.st_mtime_ns)
        return found

    def read(self, name: str, version: str, file: str, origin: bool) -> bytes:
        return (self._path / name / version / file).read_bytes()

    def path(self, name: str, version: str, file: str, origin: bool) -> Path:
        return self._path / name / version / file

    def write(self, name: str, version: str, files: Mapping[str, Iterable[bytes]], replace: bool) -> None:
        folder = self._path / name
        hidden = folder / f"{_HIDDEN}{version}-{secrets.token_hex(8)}"
        try:
            with _reaching(f"writing {name}/{version}"):
                _make(hidden)
                for file, parts in files.items():
                    _write_flushed(hidden / file, parts)
                _flush_folder(hidden)
                self._publish(hidden, folder / version, replace)
                _flush_folder(folder)
                _flush_folder(self._path)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        self._sweep(folder)

    def _publish(self, hidden: Path, final: Path, replace: bool) -> None:
        if replace:
            aside = hidden.with_name(hidden.name + "-old")
            with contextlib.suppress(FileNotFoundError):
                os.rename(final, aside)
            os.rename(hidden, final)
            shutil.rmtree(aside, ignore_errors=True)
            return
        try:
            os.rename(hidden, final)
        except OSError:
            if not final.is_dir():  # else another process was faster, with the same content
                raise

    def delete(self, name: str, version: str) -> None:
        folder = self._path / name
        hidden = folder / f"{_HIDDEN}{version}-{secrets.token_hex(8)}"
        with _reaching(f"deleting {name}/{version}"), contextlib.suppress(FileNotFoundError):
            os.rename(folder / version, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
            with contextlib.suppress(OSError):  # other versions are left
                folder.rmdir()

    def forget(self, name: str, version: str) -> bool:
        return False

    def _sweep(self, folder: Path) -> None:
        for entry in _scan(folder):
            with contextlib.suppress(OSError):
                if entry.name.startswith(_HIDDEN) and time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(entry.path, ignore_errors=True)


class RemoteRoot:
    """Tensors are copied into `cache`, one file per version, and never grow stale: a version's content is fixed.

    Listings are kept for `refresh_seconds`. While the root cannot be reached the last listing stays in force, so that
    an outage of the bucket does not stop requests whose assets are here already.
    """

    def __init__(self, fs: Any, path: str, cache: Path, refresh_seconds: float) -> None:
        self._fs = fs
        self._path = path
        self._cache = cache
        self._refresh = refresh_seconds
        self._lock = threading.Lock()
        self._listings: dict[str, tuple[float, dict[str, object]]] = {}  # name, or "" for the names -> (time, listing)

    def names(self) -> list[str]:
        return list(self._listing("", self._refresh))

    def versions(self, name: str, fresh: bool = False) -> dict[str, object]:
        return self._listing(name, min(_MIN_LISTING_AGE, self._refresh) if fresh else self._refresh)

    def read(self, name: str, version: str, file: str, origin: bool) -> bytes:
        copy = self._copy(name, version)
        if file == TENSORS and not origin:
            with contextlib.suppress(OSError):
                return copy.read_bytes()
        try:
            with _reaching(f"reading {name}/{version}/{file}"):
                data = bytes(self._fs.cat_file(f"{self._path}/{name}/{version}/{file}"))
        except FileNotFoundError:
            self._changed(name)  # the listing that led here is out of date
            raise
        if file == TENSORS and not origin:
            _keep_copy(copy, data)
        return data

    def path(self, name: str, version: str, file: str, origin: bool) -> Path:
        copy = self._copy(name, version)
        if copy.exists() and not origin:
            return copy
        hidden = copy.with_name(f"{_HIDDEN}{secrets.token_hex(8)}")
        try:
            with _reaching(f"reading {name}/{version}/{file}"):
                copy.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._path}/{name}/{version}/{file}", str(hidden))
                os.replace(hidden, copy)
        except FileNotFoundError:
            self._changed(name)
            raise
        finally:
            with contextlib.suppress(OSError):
                hidden.unlink()
        return copy

    def write(self, name: str, version: str, files: Mapping[str, Iterable[bytes]], replace: bool) -> None:
        folder = f"{self._path}/{name}/{version}"
        with _reaching(f"writing {name}/{version}"):
            self._fs.makedirs(folder, exist_ok=True)
            for file in sorted(files, key=lambda file: file == METADATA):  # last
                self._put(f"{folder}/{file}", files[file])
        self._changed(name)

    def _put(self, path: str, parts: Iterable[bytes]) -> None:
        if isinstance(parts, list):
            self._fs.pipe_file(path, b"".join(parts))
            return
        with self._fs.open(path, "wb") as target:  # becomes visible when it is closed
            for part in parts:
                target.write(part)

    def delete(self, name: str, version: str) -> None:
        folder = f"{self._path}/{name}/{version}"
        with _reaching(f"deleting {name}/{version}"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{folder}/{METADATA}")
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(folder, recursive=True)
        self.forget(name, version)
        self._changed(name)

    def forget(self, name: str, version: str) -> bool:
        try:
            self._copy(name, version).unlink()
        except OSError:
            return False
        return True

    def _copy(self, name: str, version: str) -> Path:
        return self._cache / name / f"{version}.safetensors"

    def _changed(self, name: str) -> None:
        with self._lock:
            self._listings.pop(name, None)
            self._listings.pop("", None)

    def _listing(self, name: str, max_age: float) -> dict[str, object]:
        with self._lock:
            at, listing = self._listings.get(name, (0.0, None))
        if listing is not None and time.monotonic() - at < max_age:
            return dict(listing)
        now = time.monotonic()
        try:
            with _reaching(f"listing {name or 'the store'}"):
                fresh = self._list_versions(name) if name else self._list_names()
        except StoreUnavailable as error:
            if listing is None:
                raise
            _log.warning("%s; the last listing stays in force", error.message)
            fresh = listing
        with self._lock:
            if fresh or not name:  # an unknown name is not remembered
                self._listings[name] = (now, fresh)
            else:
                self._listings.pop(name, None)
        return dict(fresh)

    def _list_names(self) -> dict[str, object]:
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            paths = self._fs.ls(self._path, detail=False)
            return {name: None for path in paths if is_name(name := _last(path))}
        return {}

    def _list_versions(self, name: str) -> dict[str, object]:
        self._fs.invalidate_cache()
        found: dict[str, object] = {}
        with contextlib.suppress(FileNotFoundError):
            for path, info in self._fs.find(f"{self._path}/{name}", maxdepth=2, detail=True).items():
                folder, _, file = str(path).rpartition("/")
                if file == METADATA and _VERSION.fullmatch(_last(folder)):
                    found[_last(folder)] = tuple(str(info.get(key)) for key in _STAMP)
        return found


def _last(path: str) -> str:
    return str(path).rstrip("/").rpartition("/")[2]


@contextlib.contextmanager
def _reaching(what: str) -> Iterator[None]:
    """Whatever a file system raises, but for a missing file, as `StoreUnavailable`."""
    try:
        yield
    except (FileNotFoundError, StoreUnavailable):
        raise
    except Exception as error:  # each file system has its own tree of errors
        reason = error.strerror if isinstance(error, OSError) else None  # without the path, which is the operator's
        raise StoreUnavailable(f"{what}: {type(error).__name__}: {reason or error}") from error


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with _reaching(f"listing {folder.name}"):
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _make(folder: Path) -> None:
    """Makes `folder` and its parents, even while another process removes an empty parent."""
    for attempt in range(5):
        try:
            folder.mkdir(parents=True)
        except FileNotFoundError:
            if attempt == 4:
                raise
        else:
            return


def _write_flushed(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_copy(copy: Path, data: bytes) -> None:
    """A cache that cannot be written is no reason to fail: the next read asks the origin again."""
    hidden = copy.with_name(f"{_HIDDEN}{secrets.token_hex(8)}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_bytes(data)
        os.replace(hidden, copy)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        _log.warning("cannot keep a copy of %s: %s", copy.name, error.strerror)
