"""π0's adapter: what the model is given and how its numbers are read, against openpi's own formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steersman.server.policies.pi0 import LONGEST, Pi0
from steersman.server.policies.policy import Observation
from steersman.steering.errors import ActionsMalformed, InvalidRequest
from tests.server.robots import Tokenizer

STATS = {
    "action": {"mean": [0.1, -2.0, 5.0], "std": [0.5, 1.0, 0.0]},
    "proprio": {"mean": [1.0, -1.0], "std": [2.0, 0.25]},
}
VISION = SimpleNamespace(image_size=28, patch_size=14)
CONFIG = SimpleNamespace(
    chunk_size=5,
    max_action_dim=6,
    max_state_dim=4,
    vlm_config=SimpleNamespace(vision_config=VISION, image_token_id=900),
)


def made(stats: Any = STATS, **changes: Any) -> Pi0:
    return Pi0(CONFIG, {"type": "pi0", "cameras": 2, "norm_stats": {"arm": stats}, **changes}, Tokenizer())


def seen(instruction: str = "go", state: Any = (2.0, 0.0), **changes: Any) -> Observation:
    pictures = {"a": np.zeros((28, 28, 3), np.uint8), "b": np.full((28, 28, 3), 255, np.uint8)}
    return Observation(pictures, instruction, None if state is None else np.array(state), **changes)


def test_the_prompt_has_the_pictures_places_before_bos_and_ends_in_a_newline() -> None:
    found = made().prompt(seen(" pick_up\nit "))
    assert found.token_ids == [900] * 8 + [1, *(ord(c) for c in "pick up it\n")]
    assert [list(image.positions) for image in found.images] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (float(found.pixels[0].max()), float(found.pixels[1].min())) == (-1.0, 1.0)


def test_the_state_is_scaled_by_its_moments_and_padded() -> None:
    found = made().prompt(seen()).state
    np.testing.assert_allclose(found, [(2 - 1) / (2 + 1e-6), 1 / (0.25 + 1e-6), 0, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [(28, 28), (20, 50), (50, 20), (224, 160), (1, 1)])
def test_pictures_are_openpis(size: tuple[int, int]) -> None:
    tools = pytest.importorskip("openpi_client.image_tools")
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    observation = Observation({"a": picture, "b": picture}, "go", np.zeros(2))
    wanted = tools.resize_with_pad(picture, 28, 28).astype(np.float32) / 255 * 2 - 1
    np.testing.assert_allclose(made().prompt(observation).pixels[0].numpy(), wanted.transpose(2, 0, 1), atol=1e-6)


def test_a_picture_that_is_thinner_than_a_pixel_still_has_one() -> None:
    picture = np.full((1, 4000, 3), 255, np.uint8)
    found = made().prompt(Observation({"a": picture, "b": picture}, "go", np.zeros(2))).pixels[0]
    assert (found == 1).sum() == 3 * 28


@pytest.mark.parametrize(
    ("size", "box", "tokens"),
    [  # height, width; the picture is 28 wide and 14 high inside, between borders of 7
        ((20, 40), (0, 0, 40, 20), [0, 1, 2, 3]),
        ((20, 40), (0, 0, 20, 10), [0]),
        ((20, 40), (20, 10, 40, 20), [3]),
        ((40, 20), (0, 0, 10, 20), [0]),
        ((40, 20), (12, 0, 20, 40), [1, 3]),
        ((28, 28), (0, 0, 14, 14), [0]),
    ],
)
def test_boxes_on_pictures_with_borders(size: tuple[int, int], box: Any, tokens: list[int]) -> None:
    pictures = {"a": np.zeros((*size, 3), np.uint8), "b": np.zeros((*size, 3), np.uint8)}
    image = made().prompt(Observation(pictures, "go", np.zeros(2))).images[0]
    assert image.layout().tokens(box) == tokens


def test_noise_is_the_seeds() -> None:
    one, again, other, none = (made().prompt(seen(seed=s)).noise for s in (7, 7, 8, None))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(none, made().prompt(seen()).noise)
    assert one.shape == (5, 6)


def test_actions_are_the_first_numbers_of_each_token() -> None:
    output = np.arange(30.0).reshape(5, 6)
    found = made().decode(output, seen())
    wanted = output[:, :3] * (np.array([0.5, 1.0, 0.0]) + 1e-6) + np.array([0.1, -2.0, 5.0])
    np.testing.assert_allclose(found.actions, wanted, atol=1e-12)
    with pytest.raises(ActionsMalformed):
        made().decode(np.full((5, 6), np.inf), seen())


def test_where_the_mask_is_off_nothing_is_scaled() -> None:
    action = {**STATS["action"], "mask": [True, False, True]}
    found = made({**STATS, "action": action}).decode(np.ones((5, 6)), seen())
    np.testing.assert_array_equal(found.actions[:, 1], 1)
    assert found.moves.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("observation", "param"),
    [
        (seen(state=None), "state"),
        (seen(state=(1.0, 2.0, 3.0)), "state"),
        (seen("x" * LONGEST), "instruction"),
        (seen("go ⏹"), "instruction"),
        (seen(unnorm_key="gone"), "unnorm_key"),
    ],
)
def test_observations_that_the_policy_cannot_read(observation: Observation, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made().prompt(observation)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stats": {"action": STATS["action"]}}, "'proprio'"),
        ({"stats": {**STATS, "action": {"q01": [0.0], "q99": [1.0]}}}, "mean"),
        ({"stats": {**STATS, "action": {"mean": [0.0] * 7, "std": [1.0] * 7}}}, "7 dimensions, the model 6"),
        ({"stats": {**STATS, "action": {"mean": [0.0], "std": [-1.0]}}}, "negative"),
        ({"stats": {**STATS, "action": {"mean": [0.0], "std": [float("nan")]}}}, "finite"),
        ({"cameras": 0}, "cameras"),
        ({"type": "bins"}, "type"),
    ],
)
def test_checkpoints_that_are_described_wrongly(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**changes)
