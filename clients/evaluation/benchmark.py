"""What POPE, MME and CHAIR have in common, and what steering changes in their scores, with its uncertainty.

Scores are functions of counts that are summed over images, so that the bootstrap draws images, with all that was asked
about each: questions about one image are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steersman.clients.evaluation.asking import Question

UNSTEERED, STEERED = "unsteered", "steered"
RESAMPLES = 2_000
FORMAT = 1
Counts = NDArray[np.int64]
Scores = dict[str, NDArray[np.float64]]


class Benchmark(Protocol):
    """``scores`` takes counts summed over images, [..., columns], and gives numbers [...]."""

    @property
    def name(self) -> str: ...

    @property
    def questions(self) -> Sequence[Question]: ...

    def counts(self, answers: Sequence[str]) -> Counts:
        """[images, columns]"""

    def scores(self, sums: Counts) -> Scores: ...

    def told(self, index: int) -> dict[str, Any]:
        """What a result file says of a question beside its answers."""


def share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """0 where there is nothing."""
    out: NDArray[np.float64] = np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole != 0)
    return out


def summary(benchmark: Benchmark, answers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Scores by condition, and of each condition but the first its difference from it, with 95 % intervals."""
    counts = {name: benchmark.counts(each) for name, each in answers.items()}
    out: dict[str, Any] = {name: _numbers(benchmark.scores(each.sum(0))) for name, each in counts.items()}
    first, *others = counts
    n = len(counts[first])
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    before = benchmark.scores(drawn @ counts[first])
    out["change"] = {}
    for name in others:
        after = benchmark.scores(drawn @ counts[name])
        changes = {}
        for score, value in out[name].items():
            low, high = np.quantile(after[score] - before[score], [0.025, 0.975])
            changes[score] = {"difference": value - out[first][score], "interval_95": [float(low), float(high)]}
        out["change"][name] = changes
    return out


def result(benchmark: Benchmark, settings: Mapping[str, Any], answers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """All of it, as JSON."""
    each = [
        {
            "id": q.id,
            "image": q.image.name,
            "text": q.text,
            **benchmark.told(i),
            **{k: v[i] for k, v in answers.items()},
        }
        for i, q in enumerate(benchmark.questions)
    ]
    about = {"format": FORMAT, "benchmark": benchmark.name, **settings}
    return {**about, "summary": summary(benchmark, answers), "answers": each}


def _numbers(scores: Scores) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


def by_image(questions: Sequence[Question]) -> tuple[NDArray[np.int64], int]:
    """For each question the index of its image, and how many images there are."""
    index: dict[Any, int] = {}
    rows = [index.setdefault(q.image, len(index)) for q in questions]
    return np.array(rows, np.int64), len(index)
