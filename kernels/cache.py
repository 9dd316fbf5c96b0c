"""Where compiled kernels are kept: ``~/.cache/steersman/kernels``, or the same under ``XDG_CACHE_HOME``.

Files are written beside and renamed, so that processes that start together may all write the same one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder() -> Path:
    """The cache, or a folder of this process alone where there can be none."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "steersman" / "kernels"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="steersman-"))
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="steersman-"))


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, which takes its place when the block ends well and is removed when it does not."""
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
