"""``steersman robot run``: its options, what it prints and writes, and its errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from steersman.clients.robot import Actions
from steersman.clients.sdk import SteersmanError
from steersman.clients.simulators import watchdog
from steersman.clients.simulators.simulator import Seen
from steersman.server import cli
from steersman.server.commands import robot_run
from tests.clients.simulators.point import Guide, Point


@pytest.fixture(autouse=True)
def point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point instead of Meta-World, and its guide instead of a server."""

    def link(url: str, *, steering: Mapping[str, Any] | None, api_key: str | None, timeout: float) -> Guide:
        return Guide(steering)

    monkeypatch.setattr(robot_run.tasks, "make", lambda task, openvla_gripper: Point())
    monkeypatch.setattr(watchdog, "link", link)


def run(*arguments: str) -> int:
    return cli.main(["robot", "run", "--episodes", "3", "--steps", "20", *arguments])


def test_a_run_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steering = tmp_path / "steering.json"
    steering.write_text('{"up": -0.5}')
    files = ["--out", str(tmp_path / "out.json"), "--video", str(tmp_path / "film.gif"), "--filmed", "2"]
    assert run("--steering", f"@{steering}", "--seed", "4", *files) == 0
    printed = capsys.readouterr().out
    assert [line.split()[1:3] for line in printed.splitlines() if line.startswith("seed")] == [
        [str(seed), f"{name}:"] for seed in (4, 5, 6) for name in ("unsteered", "steered")
    ]
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["task"], found["seed"], found["steps"], found["steering"]) == ("reach-v3", 4, 20, {"up": -0.5})
    change = found["summary"]["change"]["mean_height"]["mean"]
    (row,) = (line for line in printed.splitlines() if "mean height" in line)
    assert f"{change:+.3f}" in row
    assert change < -0.01
    assert (tmp_path / "film.gif").stat().st_size > 0


def test_without_steering_there_is_one_condition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", str(tmp_path / "out.json"), "--chunk", "1") == 0
    assert "change" not in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["episodes"]) == ["unsteered"]
    assert [e["answers"] for e in found["episodes"]["unsteered"]] == [20] * 3


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (["--video", "film.avi"], "must end in .gif or .mp4"),
        (["--plot", "plot.txt"], "must end in .png or .pdf or .svg"),
        (["--steering", "{"], "not JSON"),
        (["--steering", "@/nowhere.json"], "cannot be read"),
        (["--steps", "0"], "at least 1"),
        (["--deadline", "0"], "more than 0"),
        (["--task", "dance"], "must be one of reach-v3"),
        (["--task", "libero_spatial"], "N a number"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    bad: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*bad)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SteersmanError(404, "no such asset", "asset_not_found", "steering.x"), r"no such asset \(steering.x\)"),
        (TimeoutError(), "10 times in a row no answer within 5 seconds"),
        (ValueError("shapes"), "shapes"),
    ],
)
def test_what_goes_wrong_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self: Guide, seen: Seen, instruction: str) -> Actions:
        raise error

    monkeypatch.setattr(Guide, "ask", ask)
    with pytest.raises(SystemExit, match=f"^steersman robot run: {said}"):
        run()


def test_a_robots_own_environment_needs_no_torch() -> None:
    """A simulator's environment has what Steersman itself needs and the extra ``robot``, and no more."""
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None, transformers=None)\n"
        "from steersman.server import cli\n"
        "cli.main(['robot', 'run', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "libero_spatial/N" in done.stdout


def test_other_commands_need_no_websockets(tmp_path: Path) -> None:
    """Where the extra ``robot`` is missing, the command line still starts, and `robot run` says what to install."""
    code = (
        "import sys; sys.modules['websockets'] = None\n"
        "from steersman.server import cli\n"
        f"assert cli.main(['assets', '--store', {str(tmp_path)!r}, 'list']) == 0\n"
        "cli.main(['robot', 'run'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("steersman robot run: ")
    assert "pip install 'steersman[robots]'" in done.stderr
