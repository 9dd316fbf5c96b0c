from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from steersman.clients.scorers import Scorer

ADAPTER: TypeAdapter[Any] = TypeAdapter(Scorer)


def score(scorer: dict[str, Any], text: str = "", tops: dict[str, float] | None = None) -> float:
    told = [{"token": token, "logprob": math.log(p)} for token, p in (tops or {}).items()]
    choice = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": told}]}}
    return float(ADAPTER.validate_python(scorer).score(choice))


def test_lexicons() -> None:
    assert score({"by": "lexicon", "name": "french"}, "bonjour le monde") == 1
    assert score({"by": "lexicon", "name": "joyful"}, "the table") == 0


@pytest.mark.parametrize(("count", "expected"), [(True, 3), (False, 1)])
def test_patterns(count: bool, expected: float) -> None:
    scorer = {"by": "regex", "pattern": r"\bsea\b", "count": count}
    assert score(scorer, "sea, sea and sea; seaside") == expected
    assert score(scorer, "seaside") == 0


def test_first_tokens() -> None:
    scorer = {"by": "tokens", "tokens": ["Yes", " yes"]}
    assert score(scorer, tops={"Yes": 0.5, " yes": 0.25, "No": 0.2}) == pytest.approx(0.75)
    assert score(scorer, tops={"No": 0.9}) == 0


def test_a_refusal_without_text_is_an_empty_answer() -> None:
    found = ADAPTER.validate_python({"by": "regex", "pattern": "^$"})
    assert found.score({"message": {"content": None}}) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"by": "regex", "pattern": "("},
        {"by": "lexicon", "name": "klingon"},
        {"by": "tokens", "tokens": []},
        {"by": "mood"},
        {"by": "lexicon", "name": "french", "x": 1},
    ],
)
def test_bad_scorers(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(bad)
