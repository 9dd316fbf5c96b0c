"""MME (Fu et al. 2023, arXiv 2306.13394): two questions about an image, one answered yes and one no.

Two of its formats are read: a file for a subtask with lines ``image<TAB>question<TAB>answer``, and the folders of the
release, a subtask each, where an image has a ``.txt`` beside it, or in ``questions_answers_YN`` beside ``images``, with
lines ``question<TAB>answer``. A subtask's score is 100 · (accuracy + the share of images with both answers right), as
in its authors' script, which reads an answer by its first four letters; ``hallucination`` adds up the four subtasks
existence, count, position and color.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steersman.clients.evaluation.asking import Question
from steersman.clients.evaluation.benchmark import Counts, Scores, by_image, share

HALLUCINATION = ("existence", "count", "position", "color")
ENDINGS = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Mme:
    questions: Sequence[Question]
    labels: Sequence[bool]
    subtasks: Sequence[str]  # of each question
    name: str = "mme"

    @classmethod
    def read(cls, given: Path, images: Path, limit: int | None = None) -> Mme:
        """``given``: a file, or a folder that is searched for ``.txt``. ``images``: where the images of a file are."""
        questions, labels, subtasks = [], [], []
        files = [given] if given.is_file() else sorted(given.rglob("*.txt"))
        for file in files:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if not line.strip():
                    continue
                *named, text, answer = (part.strip() for part in line.split("\t")) if "\t" in line else ("", "")
                if len(named) > 1 or answer.lower() not in ("yes", "no"):
                    wanted = "[image<TAB>]question<TAB>answer, answer Yes or No"
                    raise ValueError(f"{file}, line {number}: must be {wanted}")
                subtask = file.stem if named else _subtask(file)
                image = _image(images, subtask, named[0]) if named else _beside(file)
                questions.append(Question(f"{subtask}/{image.name}/{number}", image, text))
                labels.append(answer.lower() == "yes")
                subtasks.append(subtask)
        if not questions:
            raise ValueError(f"{given} has no questions")
        return cls(questions[:limit], labels[:limit], subtasks[:limit])

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(self.subtasks))

    def counts(self, answers: Sequence[str]) -> Counts:
        """For each subtask in turn: questions, right answers, images, images whose answers are all right."""
        rows, images = by_image(self.questions)
        names = self._names
        out = np.zeros((images, len(names), 4), np.int64)
        for row, answer, label, subtask in zip(rows, answers, self.labels, self.subtasks, strict=True):
            out[row, names.index(subtask), :2] += (1, reads(answer) is label)
        out[..., 2] = out[..., 0] > 0
        out[..., 3] = (out[..., 0] > 0) & (out[..., 0] == out[..., 1])
        return out.reshape(images, -1)

    def scores(self, sums: Counts) -> Scores:
        each = sums.reshape(*sums.shape[:-1], -1, 4)
        found = 100 * (share(each[..., 1], each[..., 0]) + share(each[..., 3], each[..., 2]))
        out = {name: found[..., i] for i, name in enumerate(self._names)}
        if set(HALLUCINATION) <= set(out):
            out["hallucination"] = np.sum([out[name] for name in HALLUCINATION], axis=0)
        return {**out, "total": found.sum(-1)}

    def told(self, index: int) -> dict[str, Any]:
        return {"subtask": self.subtasks[index], "label": "yes" if self.labels[index] else "no"}


def reads(answer: str) -> bool | None:
    """What an answer says, None if neither."""
    start = answer.strip().lower()[:4]
    return True if "yes" in start else False if "no" in start else None


def _subtask(file: Path) -> str:
    folder = file.parent
    return (folder.parent if folder.name == "questions_answers_YN" else folder).name


def _image(images: Path, subtask: str, name: str) -> Path:
    """Where an image of a subtask is; the plainest place if it is nowhere."""
    places = [images / subtask / name, images / subtask / "images" / name, images / name]
    return next((place for place in places if place.is_file()), places[-1])


def _beside(file: Path) -> Path:
    def places() -> Iterator[Path]:
        for folder in (file.parent, file.parent.parent / "images"):
            for ending in ENDINGS:
                yield folder / (file.stem + ending)

    return next((place for place in places() if place.is_file()), file.with_suffix(ENDINGS[0]))
