"""Extraction against Hugging Face's own hidden states, on a tiny random Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.steering.extraction import collect_hf, decoder_blocks, difference_of_means


class LetterTokenizer:
    """One token per letter, plus a BOS where special tokens are asked for."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + ord(letter) % 60 for letter in text]}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def states(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Hugging Face's hidden states of "hello" with BOS: entry l+1 is block l's output, but for the last."""
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([LetterTokenizer()("hello")["input_ids"]]), output_hidden_states=True)
    return {"blocks": torch.stack(out.hidden_states[1:-1])[:, 0], "normed": out.hidden_states[-1][0]}


def test_difference_of_means_is_the_mean_difference() -> None:
    positive = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    negative = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 4.0]])
    assert torch.equal(difference_of_means(positive, negative), torch.tensor([2.0, 1.0]))


def test_difference_of_means_is_odd_and_blind_to_a_shared_shift() -> None:
    a, b, shift = torch.randn(5, 2, 8), torch.randn(7, 2, 8), torch.randn(2, 8)
    v = difference_of_means(a, b)
    assert v.shape == (2, 8)
    torch.testing.assert_close(difference_of_means(b, a), -v)
    torch.testing.assert_close(difference_of_means(a + shift, b + shift), v)


def test_difference_of_means_sums_halves_in_float32() -> None:
    many = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    v = difference_of_means(many, torch.zeros(1, 1))
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, many[0].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "d"), [(0, 4), (3, 5)])
def test_difference_of_means_refuses_empty_and_mismatched(n: int, d: int) -> None:
    with pytest.raises(ValueError):
        difference_of_means(torch.zeros(n, d), torch.zeros(3, 4))


def test_last_token_is_the_blocks_output(model: LlamaForCausalLM, states: dict[str, torch.Tensor]) -> None:
    got = collect_hf(model, LetterTokenizer(), ["hello"], [0, 1], "last")
    assert got.shape == (1, 2, 32)
    torch.testing.assert_close(got[0], states["blocks"][:, -1])


def test_final_layer_is_taken_before_the_norm(model: LlamaForCausalLM, states: dict[str, torch.Tensor]) -> None:
    got = collect_hf(model, LetterTokenizer(), ["hello"], [2], "last")[0, 0]
    torch.testing.assert_close(model.model.norm(got), states["normed"][-1])
    assert not torch.allclose(got, states["normed"][-1])


def test_mean_leaves_the_first_token_out(model: LlamaForCausalLM, states: dict[str, torch.Tensor]) -> None:
    got = collect_hf(model, LetterTokenizer(), ["hello"], [0, 1], "mean")
    torch.testing.assert_close(got[0], states["blocks"][:, 1:].mean(1))


def test_mean_over_the_answer_only(model: LlamaForCausalLM) -> None:
    """With a prompt, the mean is over the text's tokens, as they are when fed after the prompt."""
    got = collect_hf(model, LetterTokenizer(), ["xyz"], [1], "mean", prompts=["ab"])
    ids = LetterTokenizer()("abxyz", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(got[0, 0], hidden[2:].mean(0))


def test_layers_keep_the_order_asked_and_texts_are_independent(model: LlamaForCausalLM) -> None:
    both = collect_hf(model, LetterTokenizer(), ["one", "a longer one"], [2, 0])
    alone = collect_hf(model, LetterTokenizer(), ["a longer one"], [0, 2])
    torch.testing.assert_close(both[1], alone[0].flip(0))


def test_one_token_text_and_missing_text(model: LlamaForCausalLM) -> None:
    assert collect_hf(model, LetterTokenizer(), [""], [0]).isfinite().all()  # BOS alone
    with pytest.raises(ValueError, match="no tokens"):
        collect_hf(model, LetterTokenizer(), [""], [0], prompts=["ab"])
    with pytest.raises(ValueError, match="prompts"):
        collect_hf(model, LetterTokenizer(), ["a"], [0], prompts=[])


def test_hooks_are_removed_even_on_failure(model: LlamaForCausalLM) -> None:
    before = [dict(block._forward_hooks) for block in decoder_blocks(model)]
    with pytest.raises(ValueError):
        collect_hf(model, LetterTokenizer(), [""], [0, 1], prompts=["ab"])
    assert [dict(block._forward_hooks) for block in decoder_blocks(model)] == before


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no decoder blocks"):
        decoder_blocks(torch.nn.Linear(2, 2))
