"""Captures that the server keeps: files in one folder, named by their content, so that every process knows them all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from steersman.steering.activations import CaptureFile
from steersman.steering.errors import PayloadTooLarge, StoreUnavailable, UnknownCapture

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class KeptCaptures:
    """``limit``: bytes of all of them together."""

    folder: Path
    limit: int

    def refuse(self, size: int) -> None:
        """Raises PayloadTooLarge where ``size`` bytes more do not fit: only what somebody asks to delete is deleted."""
        with _readable():
            used = sum(nbytes for _, nbytes in self._files())
        if used + size > self.limit:
            raise PayloadTooLarge(
                f"the capture takes {size} bytes, and {used} of {self.limit} are taken by those that are kept "
                "(--steering-max-kept-captures-mb): delete some",
                "keep",
            )

    def add(self, parts: Iterable[bytes | memoryview]) -> str:
        """Keeps a file: its id, the SHA-256 of its content."""
        with _readable():
            self.folder.mkdir(parents=True, exist_ok=True)
            hidden, digest = self.folder / f".{secrets.token_hex(8)}", hashlib.sha256()
            try:
                with hidden.open("wb") as file:
                    for part in parts:
                        digest.update(part)
                        file.write(part)
                os.replace(hidden, self._path(digest.hexdigest()))
            finally:
                hidden.unlink(missing_ok=True)
        return digest.hexdigest()

    @contextmanager
    def lent(self, parts: Sequence[bytes | memoryview]) -> Iterator[str]:
        """Keeps a file while the context lasts. One that somebody keeps already stays."""
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        known = self._path(digest.hexdigest()).is_file()
        capture_id = self.add(parts)
        try:
            yield capture_id
        finally:
            if not known:
                with suppress(UnknownCapture):
                    self.remove(capture_id)

    def path(self, capture_id: str) -> Path:
        """The file. Raises UnknownCapture."""
        if not _ID.fullmatch(capture_id) or not self._path(capture_id).is_file():
            raise UnknownCapture(f"no capture {capture_id[:80]!r} is kept")
        return self._path(capture_id)

    def open(self, capture_id: str) -> CaptureFile:
        """Raises UnknownCapture."""
        path = self.path(capture_id)
        try:
            with _readable():
                return CaptureFile(path)
        except SafetensorError as error:
            raise StoreUnavailable(f"the file of capture {capture_id} is damaged: {error}") from error

    def describe(self, capture_id: str) -> dict[str, Any]:
        """What the file's header says of it, with its id and its size."""
        found, path = self.open(capture_id), self.path(capture_id)
        with _readable():
            return {"object": "steering.capture", "id": capture_id, "bytes": path.stat().st_size, **found.about}

    def list(self) -> list[dict[str, Any]]:
        """Every capture that is kept, by id."""
        found = []
        with _readable():
            for name, _ in self._files():
                with suppress(UnknownCapture):  # another process has deleted it meanwhile
                    found.append(self.describe(name))
        return sorted(found, key=lambda about: str(about["id"]))

    def remove(self, capture_id: str) -> None:
        path = self.path(capture_id)
        with _readable():
            path.unlink(missing_ok=True)

    def _path(self, capture_id: str) -> Path:
        return self.folder / f"{capture_id}.safetensors"

    def _files(self) -> Iterator[tuple[str, int]]:
        if not self.folder.is_dir():
            return
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                yield path.stem, path.stat().st_size


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__  # without the path, which is the operator's
        raise StoreUnavailable(f"the folder of kept captures cannot be used: {reason}") from error
