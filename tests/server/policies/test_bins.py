"""The plain token-action policy: bins, chunks, and the state in the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steersman.server.policies.bins import Bins
from steersman.server.policies.policy import Observation
from steersman.steering.errors import InvalidRequest
from tests.server.robots import SCENE, Tokenizer

STATS = {
    "reach": {
        "action": {"q01": [-1.0, 0.0], "q99": [1.0, 10.0], "mask": [True, True]},
        "proprio": {"q01": [0.0, 5.0], "q99": [4.0, 5.0]},
    }
}
ABOUT = {
    "type": "bins",
    "prompt": "{state}|{instruction}",
    "first_token": 500,
    "bins": 7,
    "chunk": 3,
    "image_token": 99,
    "cameras": 2,
    "norm_stats": STATS,
}


def made(**changes: Any) -> Bins:
    return Bins({"steersman_policy": {**ABOUT, **changes}}, Tokenizer())


def seen(state: Any = (2.0, 5.0), instruction: str = "go") -> Observation:
    numbers = None if state is None else np.array(state, np.float64)
    return Observation({"a": SCENE, "b": SCENE}, instruction, numbers)


def test_seven_bins_cut_the_range_into_equal_cells() -> None:
    found = made(chunk=7).decode([t for i in range(7) for t in (500 + i, 506 - i)], seen())
    for i in range(7):
        centre = (i + 0.5) / 7  # of [0, 1]
        np.testing.assert_allclose(found.actions[i], [2 * centre - 1, 10 * (1 - centre)], atol=1e-12)
    assert found.actions.shape == (7, 2)
    assert found.strays == 0


def test_tokens_of_no_bin_are_counted() -> None:
    found = made().decode([499, 507, 500, 506, 0, 503], seen())
    assert found.strays == 3
    np.testing.assert_array_equal(found.actions[0], made().decode([500, 506] * 3, seen()).actions[0])


def test_the_prompt_has_images_after_bos_and_the_state_as_integers() -> None:
    prompt = made().prompt(seen())
    assert prompt.token_ids == [1, 99, 99, *(ord(c) for c in "128 128|go")]  # a state that never varied is the middle
    assert (prompt.n_tokens, len(prompt.pictures)) == (6, 2)
    assert made(image_token=None).prompt(seen()).token_ids[:2] == [1, ord("1")]


@pytest.mark.parametrize(("value", "cell"), [(-9.0, 0), (0.0, 0), (3.99, 255), (4.0, 255), (99.0, 255), (1.0, 64)])
def test_the_state_stays_within_its_cells(value: float, cell: int) -> None:
    text = "".join(chr(i) for i in made().prompt(seen((value, 5.0))).token_ids[3:])
    assert text.startswith(f"{cell} ")


def test_an_instruction_is_not_a_template() -> None:
    text = "".join(chr(i) for i in made().prompt(seen(instruction="{state}")).token_ids[3:])
    assert text == "128 128|{state}"


@pytest.mark.parametrize("state", [None, (1.0,), (1.0, 2.0, 3.0)])
def test_a_state_of_the_wrong_size_is_named(state: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be 2 numbers") as error:
        made().prompt(seen(state))
    assert error.value.param == "state"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bins": 1}, "bins"),
        ({"bins": "7"}, "bins"),
        ({"first_token": 31995}, "must be at most 32001"),
        ({"unknown": 1}, "unknown"),
        ({"norm_stats": {"reach": {"action": STATS["reach"]["action"]}}}, "no 'proprio'"),
    ],
)
def test_descriptions_that_are_wrong(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        made(**changes)


def test_token_values_are_what_decode_reads() -> None:
    policy = made(chunk=7)
    values = policy.token_values()
    assert sorted(values) == [*range(500, 507)]
    found = policy.decode([t for i in range(7) for t in (500 + i, 500 + i)], seen())
    np.testing.assert_allclose([*values.values()], np.linspace(-6 / 7, 6 / 7, 7))
    other = policy.stats.actions[policy.stats.key(None)]
    np.testing.assert_allclose(
        found.actions[:, 0], other.unnormalise(np.array([[v, v] for v in values.values()]))[:, 0]
    )
