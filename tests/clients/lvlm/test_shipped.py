"""The model in models/ is one that this code makes, and answers as its training says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steersman.clients.lvlm import lessons, model, train, vocabulary

FOLDER = Path(__file__).parents[3] / "models/scenes"


def test_the_shipped_model_is_of_this_code() -> None:
    from transformers import AutoTokenizer

    about = json.loads((FOLDER / "training.json").read_text())
    shipped = model.load(FOLDER)
    made = model.deepen(model.build(0), 0)
    assert [n for n, p in made.named_parameters() if p.shape != shipped.get_parameter(n).shape] == []
    assert about["parameters"] == sum(p.numel() for p in shipped.parameters())
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(vocabulary.WORDS)
    assert tokenizer.chat_template == vocabulary.TEMPLATE
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


def test_it_answers_as_its_training_says() -> None:
    """Its weights are rounded to bfloat16 after that was measured."""
    about = json.loads((FOLDER / "training.json").read_text())
    shares = lessons.right(model.load(FOLDER), lessons.batch(about["seed"] + train.TEST, 0, train.HELD))
    assert shares == pytest.approx(about["held_out"], abs=0.02)
