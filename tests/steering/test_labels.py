from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.steering import labels
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import InvalidRequest, StoreUnavailable
from steersman.steering.formats import native
from steersman.steering.labels import Labels

M = 12
META = {"name": "sae", "kind": "dictionary", "model": {"id": "m", "n_layers": 2, "d_model": 3}, "layer": 0,
        "architecture": "basis"}  # fmt: skip
TEXTS = {0: "French words", 3: "the Eiffel Tower in Paris", 4: "", 7: "frenzied wörds", 11: 'a "quoted" AND text'}


def asset(texts: dict[int, str]) -> Asset:
    return Asset(parse_metadata(META), {"decoder": torch.ones(M, 3), "b_dec": torch.zeros(3), **labels.pack(texts, M)})


@given(st.dictionaries(st.integers(0, M - 1), st.text(st.characters(codec="utf-8"), max_size=20)))
def test_labels_come_back(texts: dict[int, str]) -> None:
    found = {each.feature: each.label for each in labels.unpack(asset(texts))}
    assert found == {index: text for index, text in texts.items() if text}


def test_they_belong_to_the_version_and_survive_a_file() -> None:
    one = asset(TEXTS)
    assert one.sha256 != asset({**TEXTS, 0: "other"}).sha256
    back = native.from_safetensors(native.to_safetensors(one))
    assert back.sha256 == native.from_json(native.to_json(one)).sha256 == one.sha256


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("french", [0]),
        ("fren", [0, 7]),
        ("eiffel par", [3]),
        ("paris french", []),
        ("WÖRDS", [0, 7]),
        ("AND", [11]),
        ('"quoted"', [11]),
        ("fren*) OR (", []),
        (None, [0, 3, 7, 11]),
    ],
)
def test_search(query: str | None, found: list[int], tmp_path: Path) -> None:
    rows, total = Labels(asset(TEXTS), tmp_path).search(query, 10, 0)
    assert (sorted(row.feature for row in rows), total) == (found, len(found))
    assert all(row.label == TEXTS[row.feature] for row in rows)


def test_pages_and_the_index_is_made_once(tmp_path: Path) -> None:
    made = Labels(asset(TEXTS), tmp_path)
    stamp = made.path.stat().st_mtime_ns
    again = Labels(asset(TEXTS), tmp_path)
    pages = [again.search(None, 1, at)[0] for at in range(5)]
    assert [row.feature for page in pages for row in page] == [0, 3, 7, 11]
    assert again.path.stat().st_mtime_ns == stamp
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]
    with pytest.raises(InvalidRequest):
        again.search("  ", 1, 0)


def test_a_dictionary_without_labels_has_none(tmp_path: Path) -> None:
    bare = Asset(parse_metadata(META), {"decoder": torch.ones(M, 3), "b_dec": torch.zeros(3)})
    assert Labels(bare, tmp_path).search(None, 5, 0) == ([], 0)


@pytest.mark.parametrize(
    "text",
    [
        '{"0": "a", "5": "b"}',
        '["a", "", "", "", "", "b"]',
        '[{"index": "0", "description": "a", "layer": "x"}, {"index": 5, "description": "b"}]',
        '{"index": "0", "description": "a"}\n\n{"index": "5", "description": "b"}\n{"index": "5", "description": "c"}',
    ],
)
def test_the_forms_of_a_file(text: str) -> None:
    assert {i: t for i, t in labels.parse_text(text).items() if t} == {0: "a", 5: "b"}


def test_lines_of_a_file_end_where_json_lines_do() -> None:
    """JSON texts may hold other separators of lines as they are."""
    assert labels.parse_text('{"index": 0, "description": "a\u2028b\x85c"}\r\n{"index": 5, "description": "b"}') == {
        0: "a\u2028b\x85c",
        5: "b",
    }
    assert labels.parse_text('{"index": "5", "description": "b"}\n') == {5: "b"}


@pytest.mark.parametrize("damage", ["empty", "noise", "gone"])
def test_an_index_that_is_damaged_is_made_again(damage: str, tmp_path: Path) -> None:
    made = Labels(asset(TEXTS), tmp_path)
    if damage == "gone":
        made.path.unlink()
    else:
        made.path.write_bytes(b"" if damage == "empty" else b"\xff" * 8192)
    assert made.search("french", 5, 0) == ([labels.Labelled(0, TEXTS[0])], 1)
    assert Labels(asset(TEXTS), tmp_path).search("eiffel", 5, 0)[1] == 1


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "steersman").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="cache") as raised:
        Labels(asset(TEXTS), tmp_path)
    assert str(tmp_path) not in raised.value.message


@pytest.mark.parametrize("ends", [[2, 1, 4], [-1, 2, 4], [1, 2, 3], [1, 2, 2**62]])
def test_ends_that_are_none(ends: list[int]) -> None:
    """Overlapping texts would make an index far larger than the file."""
    tensors = {"decoder": torch.ones(3, 3), "b_dec": torch.zeros(3), "labels": torch.full((4,), 65, dtype=torch.uint8)}
    with pytest.raises(InvalidRequest) as raised:
        Asset(parse_metadata(META), {**tensors, "label_ends": torch.tensor(ends)})
    assert raised.value.param == "tensors.label_ends"
    Asset(parse_metadata(META), {**tensors, "label_ends": torch.tensor([0, 2, 4])})


@pytest.mark.parametrize(
    "data", ["{", "3", '{"x": "a"}', '{"0": 1}', '[{"index": -1, "description": "a"}]', b"\xff", '["a", 3]']
)
def test_bad_files(data: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        labels.parse_text(data)
    assert raised.value.param == "labels"


def test_labels_that_do_not_fit() -> None:
    for bad in ({M: "x"}, {0: "x" * (labels.MAX_LABEL + 1)}):
        with pytest.raises(InvalidRequest):
            labels.pack(labels.parse(json.loads(json.dumps(bad))), M)
