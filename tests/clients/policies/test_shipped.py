"""The policy in models/ is one that this code reads, and the documented figures are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steersman.clients.policies import model, vocabulary
from steersman.clients.simulators.episode import METRICS
from steersman.clients.simulators.study import STEERED, UNSTEERED
from steersman.server.policies.bins import Bins

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "models/reach-v3"


def test_the_shipped_policy_is_of_this_code() -> None:
    policy, action, state = model.load(FOLDER)
    assert [name for name, p in model.build(0).named_parameters() if p.shape != policy.get_parameter(name).shape] == []
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["steersman_policy"] == model.describe("reach_v3", 2, action, state)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(vocabulary.WORDS)
    assert Bins(config, tokenizer).cameras == 2
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


@pytest.mark.parametrize("name", ["up", "control"])
def test_results_are_of_the_shipped_steering_and_documented_as_they_are(name: str) -> None:
    result: Any = json.loads((ROOT / f"docs/results/closed_loop_{name}.json").read_text())
    assert result["steering"] == json.loads((FOLDER / f"steering_{name}.json").read_text())
    seeds = [[episode["seed"] for episode in result["episodes"][each]] for each in (UNSTEERED, STEERED)]
    assert seeds == [list(range(20))] * 2
    lines = (ROOT / "docs/closed-loop.md").read_text().splitlines()
    summary = result["summary"]
    for metric in METRICS:
        change = summary["change"][metric]
        low, high = change["interval_95"]
        cells = [summary[UNSTEERED][metric], summary[STEERED][metric]]
        row = [*(f"{value:.3f}" for value in cells), f"{change['mean']:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        title = f"| {name} | {metric.replace('_', ' ')}{METRICS[metric]} | "
        assert title + " | ".join(row) + " |" in lines
