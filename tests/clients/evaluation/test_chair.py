"""CHAIR's objects in captions, its files, and its formulae against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steersman.clients.evaluation.chair import Chair, Objects

SYNONYMS = """person, man, woman, child, player
dog, puppy
bird
tie
toilet
chair, seat
traffic light, stop light
hot dog
knife
bus
wine glass
train
"""


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    return Objects.read(tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A man and two women with a puppy.", ["person", "person", "dog"]),
        ("Hot dogs, not dogs!", ["hot dog", "dog"]),
        ("Three buses wait at the stop lights", ["bus", "traffic light"]),
        ("knives beside wine glasses", ["knife", "wine glass"]),
        ("a baby bird and an adult elephant", ["bird"]),  # a qualifier is no person; an unknown animal no object
        ("a baby dog on a toilet seat", ["dog", "toilet"]),
        ("a bow tie", ["tie"]),
        ("the passenger trains", ["train"]),
        ("The players' chairs. Birds", ["chair", "bird"]),
        ("nothing at all", []),
    ],
)
def test_objects_in_a_caption(objects: Objects, caption: str, found: list[str]) -> None:
    assert objects.mentioned(caption) == found


def lines(file: Path) -> Path:
    file.write_text(
        "\n".join(
            json.dumps(each)
            for each in (
                {"image": "a.jpg", "objects": ["person", "puppy"]},
                {"image": "b.jpg", "objects": ["chair"]},
                {"image": "c.jpg", "objects": []},
            )
        )
    )
    return file


def test_formulae(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    read = Chair.read(lines(tmp_path / "q.jsonl"), tmp_path, tmp_path / "synonyms.txt")
    assert [q.image.name for q in read.questions] == ["a.jpg", "b.jpg", "c.jpg"]
    assert read.truth[0] == {"person", "dog"}
    counts = read.counts(["A dog, a dog, a bird.", "A seat", "Hello"])
    assert counts.tolist() == [[3, 1, 1, 1, 2, 1], [1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]]
    scores = read.scores(counts.sum(0))
    assert scores["chair_i"] == pytest.approx(1 / 4)  # mentions
    assert scores["chair_s"] == pytest.approx(1 / 3)  # captions
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["mentions"] == pytest.approx(4 / 3)


def test_cocos_files(tmp_path: Path) -> None:
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "elsewhere.jpg"}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "chair"}],
        "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 8}],
    }
    captions = {
        "images": instances["images"],
        "annotations": [
            {"image_id": 1, "caption": "Somebody waits for the hot"},
            {"image_id": 1, "caption": "dogs and a man"},  # of two captions no phrase is made
            {"image_id": 2, "caption": "a knife"},
        ],
    }
    (tmp_path / "a.jpg").touch()
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    for name, content in (("instances", instances), ("captions", captions)):
        (tmp_path / f"{name}_val2014.json").write_text(json.dumps(content))
    read = Chair.read(
        tmp_path / "instances_val2014.json", tmp_path, tmp_path / "synonyms.txt", tmp_path / "captions_val2014.json"
    )
    assert [q.image.name for q in read.questions] == ["a.jpg"]
    assert read.truth == [{"dog", "person"}]


def test_without_synonyms_the_named_objects_are_all(tmp_path: Path) -> None:
    read = Chair.read(lines(tmp_path / "q.jsonl"), tmp_path)
    assert read.objects.mentioned("puppies and a bird on chairs") == ["puppy", "chair"]


@pytest.mark.parametrize("bad", ["{", '{"image": 1, "objects": []}', '{"image": "a", "objects": "dog"}'])
def test_a_bad_line_is_named(bad: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(bad)
    with pytest.raises(ValueError, match="line 1: must be"):
        Chair.read(tmp_path / "q.jsonl", tmp_path)


def test_a_json_file_must_be_cocos(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(ValueError, match="must be one of COCO's files"):
        Chair.read(tmp_path / "q.json", tmp_path)
