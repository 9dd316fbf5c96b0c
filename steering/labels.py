"""Labels of a dictionary's features: how they are stored with it, and a text index over them.

They are two tensors: `labels` [bytes] uint8, all texts in UTF-8 one after another, and `label_ends` [m] int64, where
each feature's text ends. A feature without a label has an empty text.

The index is SQLite's FTS5, in a file of its own in the cache folder, made when a dictionary is first searched. It is
named by the dictionary's hash: it never grows stale, and may be deleted at any time.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman.steering.assets import Asset
from steersman.steering.errors import InvalidRequest, StoreUnavailable

MAX_LABEL = 4096  # characters
_BATCH = 8192
_AT_ONCE = 1000  # features in one question


class Labelled(NamedTuple):
    feature: int
    label: str


def parse(data: Any) -> dict[int, str]:
    """Labels by feature from any of: {"4231": "text"}; ["text", ..]; Neuronpedia's export, a list of objects with
    `index` and `description`. Of several descriptions of a feature the first counts."""
    if isinstance(data, Mapping) and {"index", "description"} <= data.keys():
        data = [data]  # JSON lines of one line
    if isinstance(data, Mapping):
        pairs: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, list) and all(isinstance(each, Mapping) for each in data):
        pairs = [(each.get("index"), each.get("description")) for each in data]
    elif isinstance(data, list):
        pairs = enumerate(data)
    else:
        raise InvalidRequest("must be an object by index, a list of texts, or Neuronpedia's list of objects", "labels")
    out: dict[int, str] = {}
    for index, text in pairs:
        if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10:
            index = int(index)
        if type(index) is not int or index < 0 or not isinstance(text, str):
            raise InvalidRequest(f"needs an index and a text, not {index!r:.40} and {text!r:.40}", "labels")
        if len(text) > MAX_LABEL:
            raise InvalidRequest(
                f"feature {index} has a label of {len(text)} characters, at most {MAX_LABEL}", "labels"
            )
        out.setdefault(index, text)
    return out


def parse_text(text: str | bytes) -> dict[int, str]:
    """The same from a file: JSON, or one JSON object per line as Neuronpedia exports them."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        try:
            return parse(json.loads(text))
        except json.JSONDecodeError:
            return parse([json.loads(line) for line in text.split("\n") if line.strip()])
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"neither JSON nor JSON lines: {error}", "labels") from error


def pack(labels: Mapping[int, str], count: int) -> dict[str, Tensor]:
    """The two tensors for a dictionary of `count` features."""
    if labels and max(labels) >= count:
        raise InvalidRequest(f"names feature {max(labels)}; the dictionary has {count}", "labels")
    texts = [labels.get(i, "").encode("utf-8", "replace") for i in range(count)]
    ends = torch.tensor(list(itertools.accumulate(map(len, texts))), dtype=torch.int64)
    data = np.frombuffer(b"".join(texts), dtype=np.uint8).copy()
    return {"labels": torch.from_numpy(data), "label_ends": ends}


def unpack(asset: Asset) -> Iterator[Labelled]:
    """The features that have a label, in order."""
    if "labels" not in asset.tensors:
        return
    data, start = asset.tensors["labels"].numpy().tobytes(), 0
    for index, end in enumerate(asset.tensors["label_ends"].tolist()):
        if end > start:
            yield Labelled(index, data[start:end].decode("utf-8", "replace"))
        start = end


class Labels:
    """The text index of one dictionary."""

    def __init__(self, asset: Asset, folder: str | Path | None = None) -> None:
        base = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = base.absolute() / "steersman" / "labels" / f"{asset.sha256}.sqlite"
        self._asset = asset
        self._ready()

    def search(self, query: str | None, limit: int, offset: int) -> tuple[list[Labelled], int]:
        """Features whose label has words that begin with every word of `query`, the best first, or all of them in
        order; and how many there are."""
        words = [f'"{word}"*' for word in (query or "").replace('"', " ").replace("\0", " ").split()]
        if query is not None and not words:
            raise InvalidRequest("has no word to look for", "query")
        where, order = ("WHERE label MATCH ?", "rank, rowid") if words else ("", "rowid")
        given = [" ".join(words).encode("utf-8", "replace").decode()] if words else []
        return self._retry(where, order, given, limit, offset)

    def of(self, features: Collection[int]) -> dict[int, str]:
        """The labels of these features; those without one are left out."""
        chosen = sorted(features)
        out: dict[int, str] = {}
        for at in range(0, len(chosen), _AT_ONCE):
            part = chosen[at : at + _AT_ONCE]
            found, _ = self._retry(f"WHERE rowid IN ({','.join(map(str, part))})", "rowid", [], len(part), 0)
            out.update(found)
        return out

    def _retry(self, where: str, order: str, given: list[str], limit: int, offset: int) -> tuple[list[Labelled], int]:
        try:
            return self._find(where, order, given, limit, offset)
        except sqlite3.DatabaseError:  # damaged, or deleted since
            self.path.unlink(missing_ok=True)
        self._ready()
        with _keeping():
            return self._find(where, order, given, limit, offset)

    def _find(self, where: str, order: str, given: list[str], limit: int, offset: int) -> tuple[list[Labelled], int]:
        with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as database:
            [(total,)] = database.execute(f"SELECT count(*) FROM features {where}", given)
            rows = database.execute(
                f"SELECT rowid, label FROM features {where} ORDER BY {order} LIMIT ? OFFSET ?", [*given, limit, offset]
            )
            return [Labelled(*row) for row in rows], total

    def _ready(self) -> None:
        with _keeping():
            if not self.path.exists():
                self._build(self._asset)

    def _build(self, asset: Asset) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        hidden = self.path.with_name(f".{secrets.token_hex(8)}")
        try:
            with closing(sqlite3.connect(hidden)) as database, database:
                database.execute("PRAGMA synchronous = OFF")
                database.execute("CREATE VIRTUAL TABLE features USING fts5(label)")
                entries = unpack(asset)
                while batch := list(itertools.islice(entries, _BATCH)):
                    database.executemany("INSERT INTO features (rowid, label) VALUES (?, ?)", batch)
            os.replace(hidden, self.path)
        finally:
            with suppress(OSError):
                hidden.unlink()


@contextmanager
def _keeping() -> Iterator[None]:
    """What hinders the index from being kept, as `StoreUnavailable`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path, which is the operator's
        raise StoreUnavailable(f"the labels' index cannot be kept in the cache folder: {reason}") from error
