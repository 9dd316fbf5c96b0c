"""Scorers of answers, for calibration: a number for each answer, the higher the more of what is looked for.

- lexicon: one of the word-list scores of ``scores.py``;
- regex: matches per answer, or 0 and 1;
- classifier: the probability of a label, by a text classifier of one's own in Hugging Face's form;
- tokens: the probability that the answer begins with one of some tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from steersman.clients.scores import french_share, joy_score

LEXICONS: Final[Mapping[str, Callable[[str], float]]] = {"french": french_share, "joyful": joy_score}
TOP: Final = 20  # likeliest first tokens that a server tells of by default (--max-logprobs)


class _Scorer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Lexicon(_Scorer):
    by: Literal["lexicon"]
    name: Literal["french", "joyful"]

    def ask(self) -> dict[str, Any]:
        """What a request needs beside the usual."""
        return {}

    def score(self, choice: Mapping[str, Any]) -> float:
        """Of one choice of a chat completion."""
        return LEXICONS[self.name](_text(choice))


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return pattern


class Regex(_Scorer):
    by: Literal["regex"]
    pattern: Annotated[str, AfterValidator(_pattern)]
    count: bool = Field(False, description="matches per answer; else 1 where there is one and 0 where there is none")

    def ask(self) -> dict[str, Any]:
        return {}

    def score(self, choice: Mapping[str, Any]) -> float:
        found = sum(1 for _ in re.finditer(self.pattern, _text(choice)))
        return float(found if self.count else found > 0)


class Classifier(_Scorer):
    by: Literal["classifier"]
    folder: str = Field(description="of a sequence classifier and its tokenizer, on the machine that scores")
    label: str = Field(description="one of its labels")

    def ask(self) -> dict[str, Any]:
        return {}

    def score(self, choice: Mapping[str, Any]) -> float:
        """Raises ValueError for a folder that holds none, and a label that it does not have."""
        probabilities = _classifier(self.folder)(_text(choice))
        if self.label not in probabilities:
            raise ValueError(f"the classifier has no label '{self.label}'; it has {', '.join(probabilities)}")
        return probabilities[self.label]


@cache
def _classifier(folder: str) -> Callable[[str], Mapping[str, float]]:
    """From a text to the probability of each label. Nothing of the folder is run as code, and nothing is fetched."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no classifier: {str(error).splitlines()[0]}") from None
    labels: Mapping[int, str] = model.config.id2label

    def probabilities(text: str) -> Mapping[str, float]:
        tokens = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.inference_mode():
            found = model(**tokens).logits[0].float().softmax(-1).tolist()
        return {labels[i]: p for i, p in enumerate(found)}

    return probabilities


class TokenSet(_Scorer):
    by: Literal["tokens"]
    tokens: Annotated[list[str], Field(min_length=1)] = Field(
        description="as the server spells them, spaces included; those below the 20 likeliest count as impossible"
    )

    def ask(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": TOP, "max_tokens": 1}

    def score(self, choice: Mapping[str, Any]) -> float:
        first = choice["logprobs"]["content"][0]
        return math.fsum(math.exp(each["logprob"]) for each in first["top_logprobs"] if each["token"] in self.tokens)


Scorer = Annotated[Lexicon | Regex | Classifier | TokenSet, Field(discriminator="by")]


def _text(choice: Mapping[str, Any]) -> str:
    return str(choice["message"]["content"] or "")
