"""Pairs of episodes, and what is said of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steersman.clients.simulators import pictures, study
from steersman.clients.simulators.episode import METRICS, Episode, Limits
from steersman.clients.simulators.study import STEERED, UNSTEERED
from tests.clients.simulators.point import Guide, Point

SEEDS = range(5, 11)


def flown(up: float | None = 0.5, filmed: int = 0) -> dict[str, list[Episode]]:
    asked = study.conditions(None if up is None else {"up": up})
    return study.run_all(Point(), Guide, asked, SEEDS, Limits(40), 30, filmed=filmed)


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Episode]]:
    return flown()


def test_every_seed_is_run_under_each_condition(pairs: dict[str, list[Episode]]) -> None:
    assert list(pairs) == [UNSTEERED, STEERED]
    assert [[e.seed for e in each] for each in pairs.values()] == [list(SEEDS)] * 2
    assert sum(e.edited for e in pairs[UNSTEERED]) == 0
    assert all(e.edited for e in pairs[STEERED])
    assert list(flown(up=None)) == [UNSTEERED]


def test_connections_are_one_for_each_condition_and_are_closed() -> None:
    made: list[Guide] = []

    def connect(steering: study.Steering | None) -> Guide:
        made.append(Guide(steering))
        return made[-1]

    study.run_all(Point(), connect, study.conditions({"up": 1.0}), SEEDS, Limits(8), 30)
    assert [link.steering for link in made] == [None, {"up": 1.0}]
    assert all(link.closed.is_set() for link in made)


def test_the_change_is_the_mean_over_pairs(pairs: dict[str, list[Episode]]) -> None:
    found = study.summary(pairs)
    for metric in METRICS:
        values = {name: np.array([e.metrics()[metric] for e in each]) for name, each in pairs.items()}
        differences = values[STEERED] - values[UNSTEERED]
        low, high = found["change"][metric]["interval_95"]
        assert found["change"][metric]["mean"] == pytest.approx(differences.mean())
        assert differences.min() <= low <= differences.mean() <= high <= differences.max()
        assert found[STEERED][metric] == pytest.approx(values[STEERED].mean())
    assert found["change"]["mean_height"]["interval_95"][0] > 0, "it was steered up"
    assert "change" not in study.summary(flown(up=None))


def test_steering_by_nothing_changes_nothing() -> None:
    change = study.summary(flown(up=0.0))["change"]
    assert all(c == {"mean": 0.0, "interval_95": (0.0, 0.0)} for c in change.values())


def test_pairs_of_other_seeds_are_refused(pairs: dict[str, list[Episode]]) -> None:
    with pytest.raises(ValueError, match="one seed each"):
        study.summary({UNSTEERED: pairs[UNSTEERED], STEERED: pairs[STEERED][::-1]})


def test_the_interval_covers_the_mean_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples of 20; the bootstrap is known to be a little too narrow for so few."""
    monkeypatch.setattr(study, "RESAMPLES", 1000)
    draw = np.random.default_rng(1)
    covered = [low <= 1.0 <= high for low, high in (study.interval(draw.normal(1, 2, 20)) for _ in range(300))]
    assert 0.88 <= np.mean(covered) <= 0.97


def test_the_result_is_json_and_complete(pairs: dict[str, list[Episode]], tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    result = study.result({"task": "point", "steering": {"up": 0.5}}, pairs)
    study.write(result, out)
    found = json.loads(out.read_text())
    assert found == json.loads(json.dumps(result))
    assert sum('"seed"' in line for line in out.read_text().splitlines()) == 2 * len(SEEDS), "an episode is one line"
    assert (found["format"], found["task"]) == (1, "point")
    assert [e["seed"] for e in found["episodes"][STEERED]] == list(SEEDS)
    assert found["summary"]["change"].keys() == METRICS.keys()
    assert [p.name for p in out.parent.iterdir()] == ["result.json"]


def test_a_film_has_conditions_side_by_side_and_seeds_in_a_row(tmp_path: Path) -> None:
    episodes = flown(filmed=2)
    pictures.film({name: each[:2] for name, each in episodes.items()}, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.size == (20, 8)
        assert sum(film.seek(i) or film.info["duration"] for i in range(film.n_frames)) == 2 * 40 * 50
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L"))
    plain, steered = (e.frames[-1] for e in (episodes[UNSTEERED][1], episodes[STEERED][1]))
    assert abs(int(last[0, 0]) - int(plain[0, 0, 0])) <= 2
    assert abs(int(last[0, -1]) - int(steered[0, 0, 0])) <= 2
    assert last[0, -1] > last[0, 0] + 5, "steered up is brighter"
    with pytest.raises(ValueError, match="no episode was filmed"):
        pictures.film(flown(), tmp_path / "b.gif")


def test_an_mp4_has_every_frame(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="MP4 needs imageio-ffmpeg: pip install 'steersman[robots]'")
    import imageio

    episodes = flown(filmed=1)
    for each in episodes.values():  # encoders take no picture as small as these
        each[0].frames = [np.kron(frame, np.ones((8, 8, 1), np.uint8)) for frame in each[0].frames]
    pictures.film({name: each[:1] for name, each in episodes.items()}, tmp_path / "a.mp4")
    frames = imageio.mimread(tmp_path / "a.mp4")
    assert len(frames) == 40
    assert frames[0].shape == (64, 160, 3)


def test_without_the_encoder_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"MP4 needs imageio-ffmpeg.*steersman\[robots\]"):
        pictures.film(flown(filmed=len(SEEDS)), tmp_path / "a.mp4")


def test_a_plot_is_drawn(pairs: dict[str, list[Episode]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures.plot(pairs, "a point", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for name, colour in pictures.COLOURS.items():
        lines = text.count(f"stroke: {colour}; stroke-opacity: 0.2")
        assert lines == len(SEEDS), f"{lines} {name} paths are drawn"
