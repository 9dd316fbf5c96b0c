"""The demo's scores: by hand on short texts, and on the contrast sets that they must tell apart."""

import json
import unicodedata
from importlib import resources
from typing import Any

import pytest

from steersman.clients.scores import french_share, joy_score

DATA = resources.files("steersman.clients") / "data"


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("12 34 !?", 0.0),
        ("zzgh qwrt", 0.0),  # unknown words are not counted
        ("The house is near the river", 0.0),
        ("La maison est dans la forêt", 1.0),
        ("The house est dans", 0.5),
        ("the question est", 0.5),  # "question" is in both lists
        ("L'eau", 1.0),
        ("the d'eau", 2 / 3),  # d' and eau
        ("Qu’il", 1.0),  # curly apostrophe
        ("it's we're don't", 0.0),
        ("aujourd'hui", 1.0),
        ("the house's garden", 0.0),
    ],
)
def test_french_share_by_hand(text: str, share: float) -> None:
    assert french_share(text) == pytest.approx(share)


def test_french_share_takes_composed_and_decomposed_accents() -> None:
    text = "la forêt très près the"
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text
    assert french_share(decomposed) == french_share(text) == 0.8


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("the table", 0.0),
        ("What a Happy day", 25.0),
        ("a sad and miserable day", -40.0),
        ("happy but sad", 0.0),
        ("Joy! joy! joy!", 100.0),
    ],
)
def test_joy_score_by_hand(text: str, score: float) -> None:
    assert joy_score(text) == pytest.approx(score)


def test_french_share_tells_every_pair_apart() -> None:
    for pair in load("french")["pairs"]:
        assert french_share(pair["positive"]) > 0.9, pair
        assert french_share(pair["negative"]) < 0.1, pair


def test_joy_score_tells_every_pair_apart() -> None:
    for pair in load("joyful")["pairs"]:
        assert joy_score(pair["positive"]) >= 5, pair
        assert abs(joy_score(pair["negative"])) <= 5, pair


@pytest.mark.parametrize("name", ["french", "joyful"])
def test_contrast_sets_are_well_formed(name: str) -> None:
    held_out = load("prompts")["prompts"]
    contrast = load(name)
    assert set(contrast) == {"name", "description", "licence", "pairs"}
    assert contrast["name"] == name
    assert 40 <= len(contrast["pairs"]) <= 60
    for key in ("prompt", "positive", "negative"):
        texts = [pair[key] for pair in contrast["pairs"]]
        assert len(set(texts)) == len(texts)
        assert not set(texts) & set(held_out)
    assert len(set(held_out)) == 12


def test_lexicons_do_not_contradict_each_other() -> None:
    def words(name: str) -> set[str]:
        text = (DATA / f"{name}.txt").read_text(encoding="utf-8")
        return set(" ".join(line for line in text.splitlines() if not line.startswith("#")).split())

    assert not words("joyful_words") & words("gloomy_words")
    assert words("french_words") - words("english_words")
