"""The page of benchmarks says what the result files say."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import calibration, cast_report, provenance, tracing
from benchmarks.processes import cpu_seconds
from benchmarks.provenance import RESULTS
from benchmarks.report import PAGE, page
from benchmarks.serving import FIGURES, summary


def test_the_page_is_written_from_the_result_files() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks.report"
    assert cast_report.PAGE.read_text() == cast_report.page(), "run python -m benchmarks.cast_report"


def test_the_picture_of_conditions_is_drawn_from_the_result_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = cast_report.picture()
    assert drawn[:4] == cast_report.PICTURE.read_bytes()[:4] == b"\x89PNG"
    found = json.loads((RESULTS / "cast.json").read_text())
    found["refusals"]["profile"]["harmless"] = 0.9
    (tmp_path / "cast.json").write_text(json.dumps(found))
    assert cast_report.picture(tmp_path) != drawn


def test_the_page_of_calibration_says_what_its_result_file_says() -> None:
    found = json.loads((RESULTS / "calibration.json").read_text())
    text = calibration.PAGE.read_text(encoding="utf-8")
    assert text == calibration.page(text, found), "run python -m benchmarks.calibration"
    assert calibration.measured(found) in text


def test_the_page_of_tracing_says_what_its_result_file_says() -> None:
    found = json.loads((RESULTS / "tracing.json").read_text())
    text = tracing.PAGE.read_text(encoding="utf-8")
    assert text == tracing.page(text, found), "run python -m benchmarks.tracing"
    assert tracing.measured(found) in text


@pytest.mark.parametrize(
    ("settings", "heading", "command"),
    [
        ({"monitor": False, "shape": None}, "Against stock vLLM", "benchmarks.serving --name serving_x"),
        ({"monitor": True}, "Statistics, against a server without", "benchmarks.serving --monitor --name serving_x"),
        (
            {"shape": "qwen", "fused_norm": "auto"},
            "Against stock vLLM",
            "benchmarks.serving --shape qwen --name serving_x",
        ),
        ({"fused_norm": "on"}, "Against stock vLLM", "benchmarks.serving --fused-norm on --name serving_x"),
    ],
)
def test_a_section_says_what_was_compared_and_how_to_do_it_again(
    settings: dict[str, Any], heading: str, command: str, tmp_path: Path
) -> None:
    found = json.loads((RESULTS / "serving.json").read_text())
    found["settings"] |= settings
    (tmp_path / "serving_x.json").write_text(json.dumps(found))
    text = page(tmp_path)
    assert f"## {heading}: {found['model']}" in text
    assert f"`python -m {command}`" in text


def test_a_result_is_the_median_of_the_pairs_with_an_interval_that_many_pairs_make_narrow() -> None:
    rng = np.random.default_rng(1)

    def measured(pairs: int) -> dict[str, Any]:
        noise = np.exp(rng.normal(0, 0.05, (pairs, 2)))
        figures = [tuple(dict.fromkeys(FIGURES, n) for n in (a, b * 0.97)) for a, b in noise.tolist()]
        found: dict[str, Any] = summary(figures)["output_throughput"]
        return found

    few, many = measured(5), measured(200)
    for found in (few, many):
        low, high = found["interval"]
        assert found["spread"][0] <= low <= found["median"] <= high <= found["spread"][1]
    assert many["interval"][0] < 0.97 < many["interval"][1] < 1
    width = [found["interval"][1] - found["interval"][0] for found in (few, many)]
    assert width[1] < width[0] / 2


def test_processor_time_is_that_of_every_process_of_the_group() -> None:
    """A process and its child have each used 0.3 seconds when both have said so."""
    script = """
import subprocess, sys, time
child = None if sys.argv[1:] else subprocess.Popen([sys.executable, sys.argv[0], "child"], stdin=0)
while time.process_time() < 0.3: pass
print("done", flush=True)
sys.stdin.read()
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        command = [sys.executable, file.name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as parent:
            assert parent.stdout is not None
            assert [parent.stdout.readline() for _ in range(2)] == [b"done\n"] * 2
            used = cpu_seconds(parent.pid)
            parent.communicate()
    assert len(used) == 2
    assert parent.pid in used
    assert all(0.3 <= seconds < 3 for seconds in used.values())


def test_a_file_is_complete_at_its_own_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert not provenance.made("x")
    provenance.save("x", {"complete": False})
    assert not provenance.made("x")
    provenance.save("x", {"complete": True})
    assert provenance.made("x")
    found = json.loads((tmp_path / "x.json").read_text())
    found["provenance"]["commit"] = "another"
    (tmp_path / "x.json").write_text(json.dumps(found))
    assert not provenance.made("x")
