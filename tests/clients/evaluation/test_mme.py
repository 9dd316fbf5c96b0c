"""MME in the formats of its release and of its results, and its scores against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.clients.evaluation import mme
from steersman.clients.evaluation.mme import Mme

EXISTENCE = (
    "a.jpg\tIs there a dog? Please answer yes or no.\tYes\na.jpg\tIs there a cat? Please answer yes or no.\tNo\n"
)
EXISTENCE += (
    "b.jpg\tIs there a cup? Please answer yes or no.\tYes\nb.jpg\tIs there a pot? Please answer yes or no.\tNo\n"
)


def test_one_file_for_a_subtask(tmp_path: Path) -> None:
    (tmp_path / "existence.txt").write_text(EXISTENCE)
    (tmp_path / "images/existence").mkdir(parents=True)
    (tmp_path / "images/existence/a.jpg").touch()
    read = Mme.read(tmp_path / "existence.txt", tmp_path / "images")
    assert [q.text.split()[3] for q in read.questions] == ["dog?", "cat?", "cup?", "pot?"]
    assert read.questions[0].image == tmp_path / "images/existence/a.jpg"
    assert read.questions[2].image == tmp_path / "images/b.jpg"
    assert read.labels == [True, False, True, False]
    assert set(read.subtasks) == {"existence"}


def test_folders_as_released(tmp_path: Path) -> None:
    for folder, text in (("color", "red?\tYes\nblue?\tNo"), ("artwork/questions_answers_YN", "old?\tYes\nnew?\tNo\n")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0001.txt").write_text(text)
    (tmp_path / "artwork/images").mkdir()
    (tmp_path / "artwork/images/0001.png").touch()
    (tmp_path / "color/0001.jpg").touch()
    read = Mme.read(tmp_path, tmp_path)
    found = [q.image.relative_to(tmp_path).as_posix() for q in read.questions]
    assert list(zip(found, read.subtasks, strict=True)) == [
        ("artwork/images/0001.png", "artwork"), ("artwork/images/0001.png", "artwork"),
        ("color/0001.jpg", "color"), ("color/0001.jpg", "color"),
    ]  # fmt: skip


def test_scores(tmp_path: Path) -> None:
    for name in ("existence", "count", "position", "color"):
        (tmp_path / f"{name}.txt").write_text(EXISTENCE)
    (tmp_path / "scene.txt").write_text(EXISTENCE)
    read = Mme.read(tmp_path, tmp_path)
    assert list(dict.fromkeys(read.subtasks)) == ["color", "count", "existence", "position", "scene"]
    answers = ["Yes", "no", "yes.", "No, it is not"] * 5
    answers[0] = "no"  # of color: 3 of 4 right, one of two images all right
    answers[4] = answers[6] = "It is"  # of count: neither word, so wrong: 2 of 4 right, no image
    answers[16] = "maybe, yes"  # of scene: it does not begin with it
    scores = read.scores(read.counts(answers).sum(0))
    assert scores["color"] == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert scores["count"] == pytest.approx(100 * (2 / 4))
    assert scores["existence"] == scores["position"] == pytest.approx(200)
    assert scores["scene"] == pytest.approx(125)
    assert scores["hallucination"] == pytest.approx(125 + 50 + 400)
    assert scores["total"] == pytest.approx(125 + 50 + 400 + 125)


def test_an_image_of_two_subtasks_counts_in_both(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(EXISTENCE)
    read = Mme.read(tmp_path, tmp_path)
    counts = read.counts(["yes", "no", "yes", "no", "no", "no", "no", "no"])
    assert counts.tolist() == [[2, 2, 1, 1, 2, 1, 1, 0]] * 2


@pytest.mark.parametrize(("answer", "read"), [("YES", True), ("No.", False), (" yes", True), ("y", None), ("", None)])
def test_answers_are_read_by_their_start(answer: str, read: bool | None) -> None:
    assert mme.reads(answer) is read


@pytest.mark.parametrize("bad", ["no tabs", "a\tb\tc\tYes", "question\tmaybe"])
def test_a_bad_line_is_named(bad: str, tmp_path: Path) -> None:
    (tmp_path / "existence.txt").write_text(EXISTENCE + bad)
    with pytest.raises(ValueError, match="line 5: must be"):
        Mme.read(tmp_path / "existence.txt", tmp_path)
