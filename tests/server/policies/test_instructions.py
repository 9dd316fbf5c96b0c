"""Instructions to token ids, with a real tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steersman.server.policies.instructions import encoded
from steersman.steering.errors import InvalidRequest


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Its image token is an added one without a name, as in LLaVA's checkpoints."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "go": 1, "<s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    made.add_tokens([AddedToken("<image>", special=True), AddedToken("<left>", special=False)])
    assert 3 not in made.all_special_ids
    return made


@pytest.mark.parametrize("word", ["<image>", "<s>"])
def test_special_tokens_with_and_without_a_name(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    with pytest.raises(InvalidRequest, match=f"own tokens in it: {word}") as error:
        encoded(tokenizer, f"go {word} go", f"{word} go")
    assert error.value.param == "instruction"


def test_added_words_are_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encoded(tokenizer, "go <left>", "<left>") == [1, 4]
