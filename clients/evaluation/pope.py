"""POPE (Li et al. 2023, arXiv 2305.10355): "Is there a .. in the image?", answered yes or no.

Its question files are JSON lines of ``{"question_id", "image", "text", "label"}``. An answer is read as its authors'
script reads it: up to the first full stop and without commas, ``no`` if one of the words No, no and not is in it, else
``yes``. Yes is the positive class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steersman.clients.evaluation.asking import Question
from steersman.clients.evaluation.benchmark import Counts, Scores, by_image, share

COLUMNS = 5  # true and false positives, false and true negatives, answers without a yes or a no


@dataclass(frozen=True)
class Pope:
    questions: Sequence[Question]
    labels: Sequence[bool]
    name: str = "pope"

    @classmethod
    def read(cls, file: Path, images: Path, limit: int | None = None) -> Pope:
        """``limit``: at most so many questions, the first ones."""
        questions, labels = [], []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                given = json.loads(line)
                label = {"yes": True, "no": False}[given["label"].strip().lower()]
                questions.append(Question(str(given["question_id"]), images / given["image"], given["text"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                wanted = '{"question_id", "image", "text", "label": "yes" or "no"}'
                raise ValueError(f"{file}, line {number}: must be {wanted}") from None
            labels.append(label)
        if not questions:
            raise ValueError(f"{file} has no questions")
        return cls(questions[:limit], labels[:limit])

    def counts(self, answers: Sequence[str]) -> Counts:
        rows, images = by_image(self.questions)
        out = np.zeros((images, COLUMNS), np.int64)
        for row, answer, label in zip(rows, answers, self.labels, strict=True):
            out[row, (0 if label else 1) if says_yes(answer) else (2 if label else 3)] += 1
            out[row, 4] += unclear(answer)
        return out

    def scores(self, sums: Counts) -> Scores:
        return binary(sums) | {"unclear": share(sums[..., 4], sums[..., :4].sum(-1))}

    def told(self, index: int) -> dict[str, Any]:
        return {"label": "yes" if self.labels[index] else "no"}


def says_yes(answer: str) -> bool:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def unclear(answer: str) -> bool:
    """Whether it counts as a yes only for want of a no."""
    return says_yes(answer) and "yes" not in answer.lower()


def binary(sums: Counts) -> Scores:
    """``sums`` [..., 4 or more]: true and false positives, false and true negatives."""
    tp, fp, fn, tn = (sums[..., i] for i in range(4))
    total = tp + fp + fn + tn
    return {
        "accuracy": share(tp + tn, total),
        "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn),
        "f1": share(2 * tp, 2 * tp + fp + fn),
        "yes": share(tp + fp, total),
    }
