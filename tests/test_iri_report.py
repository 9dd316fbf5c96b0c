"""The hallucination study's page says what its result file says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks import iri_report
from benchmarks.iri_report import CHOSEN, UNSTEERED
from benchmarks.provenance import RESULTS

RESULT = RESULTS / "iri.json"


def scene(number: int, *questions: tuple[bool, bool, bool]) -> dict[str, Any]:
    """Of each question the truth, and whether yes is said without steering and with it."""
    rows = [
        {"text": f"{i}", "there": there, "yes": [UNSTEERED] * before + [CHOSEN] * after}
        for i, (there, before, after) in enumerate(questions)
    ]
    return {"scene": number, "questions": rows}


def test_what_is_mended_and_what_is_broken() -> None:
    found = {
        "answers": [
            scene(4, (True, True, True), (True, False, True), (False, True, False)),
            scene(9, (False, False, True), (True, True, False), (True, False, True)),
        ]
    }
    mended, broken = iri_report.changed(found)
    assert [(s["scene"], row["text"]) for s, row in mended] == [(4, "1"), (4, "2"), (9, "2")]
    assert [(s["scene"], row["text"]) for s, row in broken] == [(9, "0"), (9, "1")]
    assert [(s["scene"], row["text"]) for s, row in iri_report.first(mended)] == [(4, "1"), (9, "2")]


@pytest.mark.parametrize(
    ("interval", "value", "said"),
    [
        ([0.01, 0.03], 0.9, "more accurate than the unsteered model, above all 2 random recipes"),
        ([-0.03, -0.01], 0.1, "less accurate than the unsteered model, below all 2 random recipes"),
        ([-0.01, 0.03], 0.5, "neither surely more nor surely less accurate than the unsteered model, within the range"),
    ],
)
def test_the_verdict_is_that_of_the_numbers(interval: list[float], value: float, said: str) -> None:
    one = {
        CHOSEN: {"accuracy": value}, "random-0": {"accuracy": 0.4}, "random-1": {"accuracy": 0.6},
        "change": {CHOSEN: {"accuracy": {"interval_95": interval}}},
    }  # fmt: skip
    text = iri_report._verdict({"pope": dict.fromkeys(iri_report.SAMPLINGS, one)})
    assert text.count(said) == 3


def test_the_page_is_written_from_the_result_file() -> None:
    assert iri_report.PAGE.read_text() == iri_report.page(json.loads(RESULT.read_text())), (
        "run python -m benchmarks.iri_report"
    )
