"""What a policy is trained on is what the server asks it, and what it answers is what was meant."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest

from steersman.clients.policies import model, vocabulary
from steersman.clients.policies.demonstrations import CHUNK
from steersman.clients.policies.vocabulary import BINS, FIRST_ACTION, IMAGE, WORDS, Scale
from steersman.clients.simulators.metaworld import INSTRUCTIONS, MetaWorld
from steersman.server.policies.bins import Bins
from steersman.server.policies.policy import Observation
from steersman.steering.errors import InvalidRequest

DRAW = np.random.default_rng(0)
ACTION = Scale.of(DRAW.normal(0, 0.4, (500, 4)), MetaWorld.moves, 0.01)
STATE = Scale.of(np.c_[DRAW.uniform(-0.3, 0.9, (500, 3)), np.ones(500)], np.ones(4, np.bool_), 0.0)
CAMERAS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return vocabulary.tokenizer()


@pytest.fixture(scope="module")
def served(tokenizer: Any) -> Bins:
    return Bins({"steersman_policy": model.describe("reach_v3", CAMERAS, ACTION, STATE)}, tokenizer)


def seen(state: np.ndarray, instruction: str) -> Observation:
    picture = np.zeros((64, 64, 3), np.uint8)
    return Observation({"side": picture, "top": picture}, instruction, state)


@pytest.mark.parametrize("instruction", INSTRUCTIONS.values())
def test_prompts_are_those_of_the_server(served: Bins, instruction: str) -> None:
    states = np.c_[DRAW.uniform(-0.5, 1.1, (50, 3)), DRAW.uniform(0, 1, 50)]  # beyond what was seen in training too
    ours = vocabulary.prompts(instruction, states, STATE, CAMERAS * model.PATCHES)
    for state, ids in zip(states, ours, strict=True):
        assert vocabulary.UNKNOWN not in ids
        runs = [(key, len(list(run))) for key, run in groupby(ids.tolist())]
        assert (IMAGE, CAMERAS * model.PATCHES) in runs
        once = [i for key, n in runs for i in ([key] * CAMERAS if key == IMAGE else [key] * n)]
        assert served.prompt(seen(state, instruction)).token_ids == once


def test_answers_are_read_as_the_actions_that_were_meant(served: Bins) -> None:
    width = (ACTION.high - ACTION.low) / BINS
    low, high = np.where(ACTION.mask, ACTION.low, -1), np.where(ACTION.mask, ACTION.high, 1)
    for _ in range(50):
        actions = DRAW.uniform(low, high, (CHUNK, 4))
        ids = FIRST_ACTION + vocabulary.bins(actions, ACTION).round().astype(int)
        found = served.decode(ids.ravel().tolist(), seen(np.zeros(4), "reach"))
        assert found.strays == 0
        assert (np.abs(found.actions - actions) <= 0.5 * np.where(ACTION.mask, width, 2 / BINS) + 1e-12).all()


def test_standing_still_is_a_bin(served: Bins) -> None:
    even = Scale(-np.ones(4), np.ones(4), MetaWorld.moves)
    assert (vocabulary.bins(np.zeros((1, 4)), even) == BINS // 2).all()
    assert served.prompt(seen(np.zeros(4), "reach the red ball")).n_tokens == CHUNK * 4


def test_actions_are_the_vocabularys_end_and_no_instruction_spells_them(served: Bins, tokenizer: Any) -> None:
    assert len(tokenizer) == len(WORDS) == FIRST_ACTION + BINS
    assert tokenizer.convert_ids_to_tokens(FIRST_ACTION) == "<act0>"
    with pytest.raises(InvalidRequest) as refused:
        served.prompt(seen(np.zeros(4), "reach <act3>"))
    assert refused.value.param == "instruction"


def test_a_number_that_never_varies_is_in_the_middle() -> None:
    assert vocabulary.states(np.array([[0.1, 0.2, 0.3, 1.0]]), STATE)[0, 3] == vocabulary.FIRST_STATE + 128
