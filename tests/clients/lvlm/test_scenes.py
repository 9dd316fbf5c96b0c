"""Scenes come in company, show what they say, and POPE's samplings ask what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steersman.clients.evaluation.chair import Chair
from steersman.clients.evaluation.pope import Pope
from steersman.clients.lvlm import questions, scenes
from steersman.clients.lvlm.scenes import KINDS, THEMES


def test_a_scene_is_its_seed_and_number() -> None:
    one, same, other = scenes.draw(3, 7), scenes.draw(3, 7), scenes.draw(3, 8)
    np.testing.assert_array_equal(one.picture, same.picture)
    assert (one.kinds, one.boxes) == (same.kinds, same.boxes)
    assert not np.array_equal(one.picture, other.picture)


def test_boxes_hold_their_objects() -> None:
    for number in range(40):
        scene = scenes.draw(1, number)
        assert 1 <= len(scene.kinds) == len(set(scene.kinds)) <= 5
        for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes, strict=True):
            assert 0 <= x0 < x1 <= scenes.SIZE
            assert 0 <= y0 < y1 <= scenes.SIZE
            rows, columns = np.nonzero(scene.shown == kind)
            assert (x0 <= columns.min(), columns.max() < x1, y0 <= rows.min(), rows.max() < y1) == (True,) * 4


def test_shapes_have_their_colours_at_all_contrasts() -> None:
    """How far an object's pixels are from the background's, of the way to its colour."""
    found = []
    for number in range(60):
        scene = scenes.draw(2, number)
        plain = scene.picture[scene.shown < 0].mean(0)
        for kind in scene.kinds:
            way = np.array(scenes.COLOURS[KINDS[kind].split()[0]]) - plain
            found.append(float((scene.picture[scene.shown == kind].mean(0) - plain) @ way / (way @ way)))
    low, high = scenes.CONTRAST
    assert np.mean(found) == pytest.approx((low + high) / 2, abs=0.06)
    assert min(found) < 0.2 < 0.7 < max(found)


def test_objects_come_in_company() -> None:
    counts = questions.together(0)
    alike = np.zeros(counts.shape, bool)
    for theme in THEMES:
        assert {kind // 4 for kind in theme} == {kind % 4 for kind in theme} == {0, 1, 2, 3}
        alike[np.ix_(theme, theme)] = True
    np.fill_diagonal(alike, False)
    apart = ~alike & ~np.eye(len(KINDS), dtype=bool)
    assert counts[alike].mean() > 8 * counts[apart].mean()
    seen = [counts.diagonal()[list(theme)].mean() for theme in THEMES]
    assert seen == sorted(seen, reverse=True)


def test_what_is_asked() -> None:
    counts = questions.together(0)
    for number, scene in questions.held_out(30):
        asked = questions.asked(number, scene)
        there = {tuple(kind for kind, yes in pairs if yes) for pairs in asked.values()}
        assert len(there) == 1  # the same in every sampling
        assert set(*there) <= set(scene.kinds)
        for sampling, pairs in asked.items():
            absent = [kind for kind, yes in pairs if not yes]
            others = [kind for kind in range(len(KINDS)) if kind not in scene.kinds]
            assert len(set(absent)) == 3
            assert set(absent) <= set(others)
            odds = counts.diagonal() if sampling == "popular" else counts[list(scene.kinds)].sum(0)
            if sampling != "random":
                assert sorted(odds[absent]) == sorted(odds[others])[-3:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    questions.main(["--out", str(out), "--scenes", "5"])
    return out


def test_files_are_those_that_eval_reads(written: Path) -> None:
    for sampling in questions.SAMPLINGS:
        pope = Pope.read(written / f"pope_{sampling}.jsonl", written / "images")
        assert len(pope.questions) == 30
        assert sum(pope.labels) == 15
        truth = {q.id: label for q, label in zip(pope.questions, pope.labels, strict=True)}
        chair = Chair.read(written / "chair.jsonl", written / "images")
        objects = {q.image.name: names for q, names in zip(chair.questions, chair.truth, strict=True)}
        for question in pope.questions:
            (named,) = [name for name in KINDS if name in question.text]
            assert truth[question.id] is (named in objects[question.image.name])
    numbers = [number for number, _ in questions.held_out(5)]
    for number, line in zip(numbers, (written / "boxes.jsonl").read_text().splitlines(), strict=True):
        scene, told = scenes.draw(questions.TEST, number), json.loads(line)
        assert told["boxes"] == {KINDS[k]: list(box) for k, box in zip(scene.kinds, scene.boxes, strict=True)}
        np.testing.assert_array_equal(np.asarray(Image.open(written / "images" / told["image"])), scene.picture)
