"""The policies in models/ are such as this code reads, and their steering is such as the server takes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.clients.policies import contrast, model, train, vocabulary
from steersman.clients.policies.demonstrations import CHUNK, Demonstrations
from steersman.clients.simulators.metaworld import INSTRUCTIONS, SIZE, TASKS
from steersman.server.policies.bins import Bins
from steersman.steering import spec

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "models/reach-v3"
SHIPPED = [task for task in TASKS if (ROOT / "models" / task).exists()]


@pytest.mark.parametrize("task", SHIPPED)
def test_a_shipped_policy_is_of_this_code(task: str) -> None:
    folder = ROOT / "models" / task
    policy, action, state = model.load(folder)
    assert [name for name, p in model.build(0).named_parameters() if p.shape != policy.get_parameter(name).shape] == []
    config = json.loads((folder / "config.json").read_text())
    assert config["steersman_policy"] == model.describe(task.replace("-", "_"), 2, action, state)
    assert json.loads((folder / "training.json").read_text())["task"] == task
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(vocabulary.WORDS)
    assert Bins(config, tokenizer).cameras == 2


def test_the_policies_are_small() -> None:
    assert sum(file.stat().st_size for task in SHIPPED for file in (ROOT / "models" / task).iterdir()) < 15e6


@pytest.mark.parametrize("name", contrast.MOTIONS)
def test_the_shipped_steering_is_of_this_code(name: str) -> None:
    asked: Any = json.loads((FOLDER / f"steering_{name}.json").read_text())
    spec.parse(asked)
    (edit,) = asked["interventions"]
    assert Counter(layer for layer, _ in edit["neurons"]["inline"]) == dict.fromkeys(range(model.LAYERS), 3)
    _, action, state = model.load(FOLDER)
    draw = np.random.default_rng(0)
    pictures = np.zeros((train.HELD + train.BATCH, 2, SIZE, SIZE, 3), np.uint8)
    actions = draw.uniform(-1, 1, (len(pictures), CHUNK, 4)).astype(np.float32)
    shown = Demonstrations(pictures, actions[:, 0], actions)
    lessons = train.Lessons(shown, INSTRUCTIONS["reach-v3"], action, state)
    assert edit["tokens"] == {"positions": contrast.MOTIONS[name].places(lessons)}
