"""POPE's files, its reading of answers, and its scores against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steersman.clients.evaluation import pope
from steersman.clients.evaluation.pope import Pope

LINES = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a car in the image?", "label": "no"},
    {"question_id": 5, "image": "b.jpg", "text": "Is there a cup in the image?", "label": "no"},
]


@pytest.fixture
def read(tmp_path: Path) -> Pope:
    file = tmp_path / "coco_pope_random.json"  # its authors' files are JSON lines by this ending
    file.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return Pope.read(file, tmp_path / "val2014")


def test_a_file_is_read(read: Pope, tmp_path: Path) -> None:
    assert [(q.id, q.image, q.text) for q in read.questions] == [
        (str(line["question_id"]), tmp_path / "val2014" / str(line["image"]), line["text"]) for line in LINES
    ]
    assert read.labels == [True, False, True, False, False]
    assert [read.told(i)["label"] for i in range(5)] == [line["label"] for line in LINES]


@pytest.mark.parametrize(
    ("answer", "yes", "unclear"),
    [
        ("yes", True, False),
        ("Yes, there is a dog.", True, False),
        ("No, there is none.", False, False),
        ("There is no dog", False, False),
        ("The dog is not there", False, False),
        ("Yes. No other animal is there.", True, False),  # the first sentence
        ("nothing like it", True, True),
        ("", True, True),
    ],
)
def test_answers_are_read_as_its_authors_do(answer: str, yes: bool, unclear: bool) -> None:
    assert pope.says_yes(answer) is yes
    assert pope.unclear(answer) is unclear


def test_scores(read: Pope) -> None:
    counts = read.counts(["yes", "yes", "no", "no", "?"])
    assert counts.tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]]
    scores = read.scores(counts.sum(0))
    assert scores["accuracy"] == pytest.approx(2 / 5)
    assert scores["precision"] == pytest.approx(1 / 3)
    assert scores["recall"] == pytest.approx(1 / 2)
    assert scores["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert scores["yes"] == pytest.approx(3 / 5)
    assert scores["unclear"] == pytest.approx(1 / 5)


def test_no_yes_at_all_is_no_division_by_nothing(read: Pope) -> None:
    scores = read.scores(read.counts(["no"] * 5).sum(0))
    assert (scores["precision"], scores["recall"], scores["f1"], scores["yes"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("bad", ["{", "[]", '{"question_id": 1, "image": "a", "text": "b", "label": "maybe"}', "{}"])
def test_a_bad_line_is_named(bad: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(LINES[0]) + "\n" + bad)
    with pytest.raises(ValueError, match=r"line 2: must be \{\"question_id\""):
        Pope.read(file, tmp_path)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        Pope.read(tmp_path / "q.jsonl", tmp_path)
