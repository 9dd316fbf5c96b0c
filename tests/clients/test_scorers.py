from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from steersman.clients.scorers import Classifier, Scorer

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


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny one with random weights, which tells texts apart."""
    folder = tmp_path_factory.mktemp("classifier")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "oui", "yes", "merci", "thanks"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=8
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, id2label={0: "english", 1: "french"}, label2id={"english": 0, "french": 1},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return str(folder)


def test_a_classifier_of_ones_own(classifier: str) -> None:
    scorers = [Classifier(by="classifier", folder=classifier, label=name) for name in ("english", "french")]
    texts = ["oui merci", "yes thanks", "oui " * 50]
    model: Any = BertForSequenceClassification.from_pretrained(classifier).eval()
    ids = {"oui": 2, "yes": 3, "merci": 4, "thanks": 5}
    for text in texts:
        logits = model(input_ids=torch.tensor([[ids[word] for word in text.split()][:8]])).logits[0]
        told = [scorer.score({"message": {"content": text}}) for scorer in scorers]
        assert told == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
    assert len({scorers[1].score({"message": {"content": text}}) for text in texts}) == 3
    with pytest.raises(ValueError, match="no label 'german'; it has english, french"):
        Classifier(by="classifier", folder=classifier, label="german").score({"message": {"content": "oui"}})
    with pytest.raises(ValueError, match="holds no classifier"):
        Classifier(by="classifier", folder=classifier + "-not", label="french").score({"message": {"content": ""}})
