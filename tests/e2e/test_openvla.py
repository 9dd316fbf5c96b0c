"""OpenVLA in vLLM's own class, behind the real server: tokens as plain torch makes them, actions by the formulas.

Not run with the other tests, for the time that it takes: STEERSMAN_TEST_OPENVLA=1 runs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from steersman.clients.robot import HttpRobot
from steersman.clients.sdk import SteersmanError
from tests.e2e.server import Server, serve
from tests.models.tiny_openvla import PATCHES, Oracle, build_openvla, stand_in
from tests.server.policies.test_openvla import expected
from tests.server.robots import KEY

VARIABLE = "STEERSMAN_TEST_OPENVLA"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"a server of its own for one model; {VARIABLE}=1 runs it"),
]
NEURONS = {0: [3, 77], 1: [3, 77, 20], 2: [5, 120, 9]}
VALUE = 2.0
TASK = "pick up the red block"
PROMPT = f"In: What action should the robot take to {TASK}?\nOut:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_openvla(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp = tmp_path_factory.mktemp("served")
    options = ["--dtype", "float32", "--max-model-len", "384", "--max-num-seqs", "4"]
    with serve(folder, tmp, options, stand_in(tmp / "site")) as running:
        yield running


@pytest.fixture(scope="module")
def robot(server: Server) -> Iterator[HttpRobot]:
    with HttpRobot(server.url, timeout=120) as client:
        yield client


class Policy:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.oracle = Oracle(folder)
        ids = AutoTokenizer.from_pretrained(folder).encode(PROMPT)
        self.ids = [*ids, 29871]

    def tokens(self, picture: Any, neurons: Any) -> list[int]:
        raw = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
        means, deviations = [0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375]
        both = np.concatenate([(raw - np.float32(means)) / np.float32(deviations), (raw - 0.5) / 0.5], axis=2)
        return self.oracle.tokens(self.ids, torch.from_numpy(both.transpose(2, 0, 1)), 7, neurons, VALUE)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy(folder)


def scene(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def test_actions_are_the_formulas_of_plain_torchs_tokens(robot: HttpRobot, policy: Policy) -> None:
    several = set()
    for seed in range(3):
        found = robot.act({"front": scene(seed)}, TASK)
        ids = policy.tokens(scene(seed), {})
        assert found.about["token_ids"] == ids
        assert found.about["strays"] == 0
        assert all(31744 <= i <= 31999 for i in ids)
        wanted = [[expected(token, dim) for dim, token in enumerate(ids)]]
        np.testing.assert_allclose(found.actions, wanted, atol=1e-12)
        several.add(tuple(ids))
    assert len(several) > 1, "the picture moves no action, so this shows nothing"


def test_neurons_set_at_all_tokens(robot: HttpRobot, policy: Policy) -> None:
    named = [[layer, index] for layer, columns in NEURONS.items() for index in columns]
    edit = {"op": "neurons", "neurons": {"inline": named}, "mode": "set", "value": VALUE, "tokens": "all"}
    moved = 0
    for seed in range(3):
        found = robot.act({"front": scene(seed)}, TASK, steering={"interventions": [edit]})
        assert found.about["token_ids"] == policy.tokens(scene(seed), NEURONS)
        moved += found.about["token_ids"] != policy.tokens(scene(seed), {})
        (edited,) = found.about["steering"]["interventions"]
        assert edited["tokens"] == len(policy.ids) + PATCHES + 6  # the last token is not fed in
    assert moved, "the edit moves no action, so this shows nothing"


def test_a_key_without_statistics(robot: HttpRobot) -> None:
    with pytest.raises(SteersmanError) as refused:
        robot.act({"front": scene(0)}, TASK, unnorm_key="gone")
    assert (refused.value.status, refused.value.param) == (400, "unnorm_key")
    assert KEY in str(refused.value)
