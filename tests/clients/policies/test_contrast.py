"""Neurons are compared at the right tokens, between the right demonstrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steersman.clients import small_llava
from steersman.clients.policies import contrast, model, train, vocabulary
from steersman.clients.policies.demonstrations import CHUNK, Demonstrations
from steersman.clients.policies.train import Lessons
from steersman.clients.policies.vocabulary import Scale
from steersman.clients.simulators.metaworld import SIZE, MetaWorld
from steersman.steering import spec

N, DIMS = 40, 4
SCALE = Scale(-np.ones(DIMS), np.ones(DIMS), MetaWorld.moves)


@pytest.fixture
def shown() -> Demonstrations:
    draw = np.random.default_rng(3)
    pictures = draw.integers(0, 256, (N, 2, SIZE, SIZE, 3), np.uint8)
    states = draw.uniform(-1, 1, (N, DIMS)).astype(np.float32)
    return Demonstrations(pictures, states, draw.uniform(-1, 1, (N, CHUNK, DIMS)).astype(np.float32))


@pytest.fixture
def lessons(shown: Demonstrations, monkeypatch: pytest.MonkeyPatch) -> Lessons:
    monkeypatch.setattr(train, "HELD", 0)
    return Lessons(shown, "reach the red ball", SCALE, SCALE)


@pytest.mark.parametrize("motion", contrast.MOTIONS)
def test_activations_are_those_before_the_motions_tokens(lessons: Lessons, motion: str) -> None:
    policy = model.build(0).eval()
    found = contrast.activations(policy, lessons, contrast.MOTIONS[motion])
    row, kept = 5, {}
    answers = vocabulary.FIRST_ACTION + lessons.bins[row].round().long()
    ids = torch.cat([lessons.prompts[row], answers])[None]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, x, i=i: kept.__setitem__(i, x[0][0]))
        for i, layer in enumerate(policy.model.language_model.layers)
    ]
    with torch.no_grad():
        policy(input_ids=ids, pixel_values=small_llava.pixels(lessons.pictures[row : row + 1]))
    for handle in handles:
        handle.remove()
    start = lessons.prompts.shape[1]
    numbers = [2] if motion in ("up", "down") else [0, 1, 2]
    before = [start + DIMS * k + i - 1 for k in range(CHUNK) for i in numbers]  # the token after these is the motion's
    assert len(found) == model.LAYERS
    for i, rows in found.items():
        assert rows.shape == (N, 2 * model.WIDTH)
        torch.testing.assert_close(rows[row], kept[i][before].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", contrast.MOTIONS)
def test_the_neurons_found_are_those_that_follow_the_motion(
    lessons: Lessons, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = lessons.actions[:, :, 2] if name in ("up", "down") else lessons.actions[:, :, :3].square().sum(-1).sqrt()
    strength = {"up": 1, "down": -1, "fast": 1, "slow": -1}[name] * moved.mean(1)
    noise = {i: torch.randn(N, 50, generator=torch.Generator().manual_seed(i)) for i in range(2)}
    noise[0][:, 7] += 30 * strength
    noise[0][:, 9] -= 60 * strength  # the other way
    noise[1][:, 3] += 40 * strength
    monkeypatch.setattr(contrast, "activations", lambda policy, lessons, motion: noise)
    chosen, mean, beyond = contrast.find(None, lessons, contrast.MOTIONS[name], 1)
    assert chosen == [(0, 7), (1, 3)]
    assert beyond == 1.0
    top = strength.argsort()[-N // 4 :]
    assert mean == pytest.approx(float((noise[0][top, 7].mean() + noise[1][top, 3].mean()) / 2), rel=1e-5)


def test_controls_are_of_none_of_the_sets() -> None:
    chosen, other = [(0, 1), (0, 2), (3, 5)], [(0, i) for i in range(100)]
    policy = model.build(0)
    for control in contrast.controls(policy, chosen, 20, other):
        assert [layer for layer, _ in control] == [0, 0, 3]
        assert not {*control} & {*chosen, *other}


def test_what_is_written_is_a_request_and_its_control(
    shown: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "HELD", 0)
    policy = model.build(0).eval()
    model.save(policy, model.describe("reach_v3", 2, SCALE, SCALE), tmp_path / "model")
    (tmp_path / "demos").mkdir()
    shown.save(tmp_path / "demos/a.npz")
    arguments = [str(tmp_path / "model"), "--demonstrations", str(tmp_path / "demos"), "--top", "2", "--value", "2.5"]
    contrast.main([*arguments, "--out", str(tmp_path / "up.json"), "--control", str(tmp_path / "control.json")])
    edits: list[Any] = []
    for name in ("up", "control"):
        asked = json.loads((tmp_path / f"{name}.json").read_text())
        spec.parse(asked)
        edits.append(asked["interventions"][0])
    found, random = ([tuple(pair) for pair in edit["neurons"]["inline"]] for edit in edits)
    chosen, _, _ = contrast.find(policy, Lessons(shown, "reach the red ball", SCALE, SCALE), contrast.MOTIONS["up"], 2)
    assert found == chosen
    assert edits[0]["value"] == edits[1]["value"] == 2.5
    assert edits[0]["tokens"] == edits[1]["tokens"]
    length = len(vocabulary.prompts("reach the red ball", shown.states[:1], SCALE, 2 * model.PATCHES)[0])
    assert edits[0]["tokens"] == {"positions": [length + 1 + DIMS * k for k in range(CHUNK)]}
    assert sorted(layer for layer, _ in found) == sorted(layer for layer, _ in random)
    assert not set(found) & set(random)
