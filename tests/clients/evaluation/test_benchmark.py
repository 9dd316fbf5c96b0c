"""What steering changes, with intervals over images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steersman.clients.evaluation import benchmark
from steersman.clients.evaluation.asking import Question
from steersman.clients.evaluation.pope import Pope

N = 60  # images, of four questions each


def pope() -> Pope:
    questions = [Question(f"{i}-{j}", Path(f"{i}.jpg"), "Is it?") for i in range(N) for j in range(4)]
    return Pope(questions, [True, True, False, False] * N)


def answers(wrong: float, seed: int) -> list[str]:
    """All the answers about an image are wrong together, so that an image is worth one question."""
    off = np.random.default_rng(seed).random(N) < wrong
    return [
        ["yes", "yes", "no", "no"][j] if not off[i] else ["no", "no", "yes", "yes"][j]
        for i in range(N)
        for j in range(4)
    ]


def test_the_same_answers_are_no_change() -> None:
    given = answers(0.3, 0)
    found = benchmark.summary(pope(), {"unsteered": given, "steered": given})
    assert found["unsteered"] == found["steered"]
    for change in found["change"]["steered"].values():
        assert change == {"difference": 0.0, "interval_95": [0.0, 0.0]}


def test_the_interval_is_that_of_images_and_not_of_questions() -> None:
    before, after = answers(0.4, 1), answers(0.2, 2)
    found = benchmark.summary(pope(), {"unsteered": before, "steered": after})
    change = found["change"]["steered"]["accuracy"]
    right = [
        np.reshape([a == b for a, b in zip(each, ["yes", "yes", "no", "no"] * N, strict=True)], (N, 4))
        for each in (before, after)
    ]
    each = right[1].mean(1) - right[0].mean(1)
    assert change["difference"] == pytest.approx(each.mean())
    low, high = change["interval_95"]
    spread = 1.96 * each.std() / np.sqrt(N)
    assert (low + high) / 2 == pytest.approx(each.mean(), abs=0.2 * spread)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)


def test_every_condition_is_compared_with_the_first() -> None:
    given = {"unsteered": answers(0.4, 1), "a": answers(0.2, 2), "b": answers(0.1, 3)}
    found = benchmark.summary(pope(), given)
    assert list(found["change"]) == ["a", "b"]
    for name in ("a", "b"):
        wanted = found[name]["f1"] - found["unsteered"]["f1"]
        assert found["change"][name]["f1"]["difference"] == pytest.approx(wanted)


def test_a_result_holds_every_answer() -> None:
    given = answers(0.5, 4)
    found = benchmark.result(pope(), {"model": "m"}, {"unsteered": given})
    assert (found["benchmark"], found["model"], len(found["answers"])) == ("pope", "m", 4 * N)
    assert found["answers"][5] == {
        "id": "1-1", "image": "1.jpg", "text": "Is it?", "label": "yes", "unsteered": given[5]
    }  # fmt: skip
    assert found["summary"]["change"] == {}
