"""The benchmark of the closed loop: its arms, what it keeps, and the page that is written from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import closed_loop, closed_loop_report
from benchmarks.closed_loop import DOSED, DOSES, MAIN, MODEL, RANDOM, SETS, UNSTEERED, Kept
from benchmarks.closed_loop_report import BEGIN, END
from benchmarks.provenance import RESULTS

from steersman.clients.simulators.episode import METRICS, Episode
from steersman.steering import spec

SEEDS = 4


def shipped() -> dict[str, Any]:
    return {name: json.loads((MODEL / f"steering_{name}.json").read_text()) for name in SETS}


@pytest.fixture(scope="module")
def arms() -> dict[str, Any]:
    return closed_loop.arms(shipped(), json.loads((MODEL / "config.json").read_text())["text_config"])


def flown(seed: int, up: float) -> Episode:
    heights = 0.2 + up * np.arange(41) + 0.002 * seed
    positions = np.stack([0.001 * np.arange(41), np.zeros(41), heights], axis=1)
    return Episode(seed, positions, 0.1, 0.1, 5 if up < 0.005 else None, 0.5, 10, 0, 0, 3, [0.1])


def test_an_arm_is_a_set_at_a_value_and_random_ones_are_alike(arms: dict[str, Any]) -> None:
    assert len(arms) == 1 + len(SETS) + 2 * RANDOM + len(DOSED) * (len(DOSES) - 1)
    assert arms[UNSTEERED] is None
    sets = {name: {tuple(pair) for pair in closed_loop.neurons(asked)} for name, asked in shipped().items()}
    every = set.union(*sets.values())
    for name, asked in arms.items():
        if asked is None:
            continue
        spec.parse(asked)
        kind, *rest = name.split()
        (edit,) = asked["interventions"]
        found = {tuple(pair) for pair in edit["neurons"]["inline"]}
        assert edit["value"] == float(rest[-1])
        if kind == "random":
            assert edit["value"] == MAIN
            assert sorted(layer for layer, _ in found) == sorted(layer for layer, _ in sets["up"])
            assert not found & every
        like = {"random": {"z": "down", "motion": "slow"}.get(rest[0 if kind != "random" else 1])}.get(kind, kind)
        assert edit["tokens"] == shipped()[like]["interventions"][0]["tokens"]
        assert kind == "random" or found == sets[kind]
    drawn = [str(arms[f"random {i} z {MAIN:g}"]["interventions"][0]["neurons"]) for i in range(RANDOM)]
    assert len({*drawn}) == RANDOM


def test_episodes_are_kept_and_those_of_other_arms_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "a.jsonl", {"steps": 40})
    kept.add(UNSTEERED, flown(3, 0.001))
    again = Kept(tmp_path / "a.jsonl", {"steps": 40})
    assert again.found == kept.found
    (one,) = again.found.values()
    assert (one["seed"], one["success"], len(one["heights"])) == (3, 1.0, 11)
    with pytest.raises(SystemExit, match="of other arms"):
        Kept(tmp_path / "a.jsonl", {"steps": 50})


@pytest.fixture
def found(arms: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A result in which up rises by its value, random sets by a tenth of it, and nothing else does anything."""
    kept = Kept(tmp_path / "a.jsonl", {})
    for arm in arms:
        kind, *rest = arm.split()
        by = {"up": 0.002, "random": 0.0002 * (1 + int(rest[0]) if kind == "random" else 0)}.get(kind, 0.0)
        for seed in range(SEEDS):
            kept.add(arm, flown(seed, by * float(rest[-1] if rest else 0)))
    settings = {"task": "reach-v3", "episodes": SEEDS, "steps": 40, "robots": 2}
    path = closed_loop.write(closed_loop.result(settings, arms, kept.found), tmp_path / "result.json")
    assert len(path.read_text().splitlines()) == len(arms) + 6
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_the_page_tells_what_was_found(found: dict[str, Any]) -> None:
    marks = [mark.format(name) for name in ("policies", "closed_loop") for mark in (BEGIN, END)]
    training = {"samples": 300, "steps": 50, "held_out_error": 0.012, "start": "reach-v3"}
    episodes = {"success": [1.0, 0.0, 1.0], "final_distance": [0.1, 0.2, 0.3]}
    policies = {"push-v3": {"training": training, "steps": 80, "episodes": episodes}}
    text = closed_loop_report.page("before\n{}old\n{}between\n{}old\n{}after\n".format(*marks), found, policies)
    assert [part in text for part in ("before\n", "between\n", "after\n", "old")] == [True, True, True, False]
    assert "| push-v3 | 300 | 50 | reach-v3 | 0.012 | 2 of 3 | 80 | 0.200 |" in text
    rise = 0.002 * MAIN * 20  # the mean over 41 heights
    assert f"| mean height (m) | 0.203 | {rise:+.3f} ({rise:+.3f} to {rise:+.3f}) |" in text
    least, most = 0.1 * rise, 0.6 * rise
    theirs, less = (least + most) / 2, f"{rise - (least + most) / 2:+.3f}"
    row = f"| up | mean height (m) | {rise:+.3f} | {theirs:+.3f} ({least:+.3f} to {most:+.3f}) | "
    row += f"{less} ({less} to {less}) | yes |"
    assert row in text
    assert "| down | mean height (m) | +0.000 | " in text
    said = "excludes 0: up. Beyond all six random sets: up, down, slow. Episodes"  # the random ones rise, and faster
    assert said in text
    assert "up: from 3; slow: at none of these; fast: at none of these" in text
    for value in DOSES:
        assert f"| up | {value:g} | {float(0.002 * value < 0.005):.3f} | {0.203 + 0.04 * value:.3f} |" in text


def test_it_is_drawn(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    closed_loop_report.plot(found, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("stroke: #bbbbbb") > RANDOM


def test_the_documented_figures_are_those_of_the_result_file() -> None:
    result = json.loads((RESULTS / "closed_loop.json").read_text())
    assert {arm: about["steering"] for arm, about in result["arms"].items()} == closed_loop.arms(
        shipped(), json.loads((MODEL / "config.json").read_text())["text_config"]
    )
    for about in result["arms"].values():
        assert about["episodes"].keys() == METRICS.keys()
        assert all(len(each) == result["settings"]["episodes"] >= 20 for each in about["episodes"].values())
    text = closed_loop_report.PAGE.read_text(encoding="utf-8")
    policies = json.loads((RESULTS / "policies.json").read_text())
    for task, about in policies.items():
        assert about["training"] == json.loads((MODEL.parent / task / "training.json").read_text())
        assert len(about["episodes"]["success"]) >= 20
    assert np.mean(policies["reach-v3"]["episodes"]["success"]) >= 0.8
    assert text == closed_loop_report.page(text, result, policies), "run python -m benchmarks.closed_loop_report"
