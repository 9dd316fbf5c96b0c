"""OpenVLA's decoding against the formulae written a second time, in fractions."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from steersman.server.policies.catalogue import load
from steersman.server.policies.openvla import OpenVla
from steersman.server.policies.policy import Observation
from steersman.steering.errors import InvalidRequest
from tests.server.robots import KEY, OPENVLA, SCENE, STATS, Tokenizer


def seen(key: str | None = KEY, instruction: str = "Pick up the Cup") -> Observation:
    return Observation({"image": SCENE}, instruction, None, key)


def normalised(token: int, vocabulary: int = 32000, bins: int = 256) -> Fraction:
    """The value of one token: half way between two of ``bins`` edges from -1 to 1."""
    low = min(max(vocabulary - token - 1, 0), bins - 2)
    return Fraction(2 * low + 1, bins - 1) - 1


def expected(token: int, dim: int, stats: Mapping[str, list[Any]] = STATS) -> float:
    a = normalised(token)
    if not stats["mask"][dim]:
        return float(a)
    low, high = Fraction(stats["q01"][dim]), Fraction(stats["q99"][dim])
    return float((a + 1) / 2 * (high - low) + low)


@pytest.fixture(scope="module")
def policy() -> OpenVla:
    return OpenVla(OPENVLA, Tokenizer())


@pytest.mark.parametrize("token", [0, 2, 31743, 31744, 31745, 31871, 31872, 31998, 31999, 32000, 32063])
def test_every_dimension_of_a_token(policy: OpenVla, token: int) -> None:
    found = policy.decode([token] * 7, seen())
    wanted = [expected(token, dim) for dim in range(7)]
    np.testing.assert_allclose(found.actions, [wanted], rtol=0, atol=1e-15)
    assert found.strays == (0 if 31744 <= token <= 31999 else 7)


def test_all_256_action_tokens_and_the_published_ends(policy: OpenVla) -> None:
    values = {t: policy.decode([t] * 7, seen()).actions[0, 6] for t in range(31744, 32000)}  # dim 6 is not scaled
    assert all(abs(values[t] - normalised(t)) < 1e-15 for t in values)
    assert values[31999] == pytest.approx(-0.99607843, abs=1e-8)
    assert values[31744] == values[31745] == pytest.approx(0.99607843, abs=1e-8)  # two ids share the last centre
    assert len(set(values.values())) == 255


def test_the_mask_and_its_default(policy: OpenVla) -> None:
    assert policy.decode([31999] * 7, seen()).moves.tolist() == [True] * 6 + [False]
    other = policy.decode([31999, 31744], seen("other"))
    assert other.moves.tolist() == [True, True]
    np.testing.assert_allclose(other.actions, [[1 / 510, 2 * 254 / 255]], atol=1e-12)


def test_the_prompt_is_openvlas(policy: OpenVla) -> None:
    prompt = policy.prompt(seen())
    text = "In: What action should the robot take to pick up the cup?\nOut:"
    assert prompt.token_ids == [1, *(ord(c) for c in text), 29871]
    assert prompt.n_tokens == 7
    assert policy.prompt(seen("other")).n_tokens == 2
    assert prompt.pictures[0] is SCENE


def test_braces_in_an_instruction_are_text(policy: OpenVla) -> None:
    assert policy.prompt(seen(instruction="{0} {x}")).token_ids[1:-1] == [
        ord(c) for c in "In: What action should the robot take to {0} {x}?\nOut:"
    ]


def test_the_extra_token_is_not_added_twice() -> None:
    class Ending(Tokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [*super().encode(text, add_special_tokens), 29871]

    assert OpenVla(OPENVLA, Ending()).prompt(seen()).token_ids.count(29871) == 1


def test_an_instruction_must_not_spell_special_tokens(policy: OpenVla) -> None:
    with pytest.raises(InvalidRequest, match="own tokens in it: ⏹") as error:
        policy.prompt(seen(instruction="go⏹ on"))
    assert error.value.param == "instruction"


@pytest.mark.parametrize("key", [None, "libero", ""])
def test_a_wrong_key_is_named(policy: OpenVla, key: str | None) -> None:
    for act in (lambda: policy.prompt(seen(key)), lambda: policy.decode([31999] * 7, seen(key))):
        with pytest.raises(InvalidRequest, match="bridge_orig, other") as error:
            act()
        assert (error.value.status, error.value.param) == (400, "unnorm_key")


def test_the_key_may_be_left_out_where_there_is_one() -> None:
    alone = OpenVla({**OPENVLA, "norm_stats": {KEY: {"action": STATS}}}, Tokenizer())
    assert alone.prompt(seen(None)).n_tokens == 7


def test_the_padded_vocabulary_is_refused() -> None:
    """Read with 32064, id 31872 would be +0.5 and not about 0, and nothing else would tell."""
    assert abs(normalised(31872)) < 0.01
    assert normalised(31872, 32064) > 0.5
    with pytest.raises(ValueError, match=r"pad_to_multiple_of 0 is 32064, but the\s+tokenizer has 32001"):
        load("auto", {**OPENVLA, "pad_to_multiple_of": 0}, Tokenizer())
    missing = {k: v for k, v in OPENVLA.items() if k != "pad_to_multiple_of"}
    assert OpenVla(missing, Tokenizer()).vocabulary == 32000


def _with(**action: Any) -> dict[str, Any]:
    return {**OPENVLA, "norm_stats": {KEY: {"action": {**STATS, **action}}}}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({**OPENVLA, "norm_stats": {}}, "at least one data set"),
        ({**OPENVLA, "norm_stats": {KEY: {}}}, "norm_stats.bridge_orig has no 'action'"),
        (_with(q01=[0.0]), "lists of one length"),
        (_with(mask=[1] * 7), "mask of booleans"),
        (_with(q01=[float("nan")] * 7), "must be finite"),
        (_with(q01=[9.0] * 7), "q01 at most q99"),
        (_with(q99="high"), "norm_stats.bridge_orig.action"),
        ({"model_type": "openvla"}, "needs 'text_config'"),
        ({"steersman_policy": {"type": "diffusion"}}, "must be one of openvla, bins"),
    ],
)
def test_a_checkpoint_that_lacks_something_does_not_start(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load("auto", config, Tokenizer())


def test_other_models_are_no_policies() -> None:
    assert load("auto", {"model_type": "llama"}, Tokenizer()) is None
    assert load("none", OPENVLA, Tokenizer()) is None
    with pytest.raises(ValueError, match="needs the tokenizer"):
        load("auto", OPENVLA, None)


def test_token_values_are_the_published_ones_and_those_of_decode(policy: OpenVla) -> None:
    values = policy.token_values()
    assert sorted(values) == [*range(31744, 32000)]
    assert values[31999] == pytest.approx(-0.99608, abs=1e-5)
    assert values[31744] == values[31745] == pytest.approx(0.99608, abs=1e-5)
    for token in (31744, 31745, 31870, 31999):
        assert policy.decode([token] * 7, seen()).actions[0, 6] == values[token]  # dim 6 is not scaled
