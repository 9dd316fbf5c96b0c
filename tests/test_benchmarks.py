"""The page of benchmarks says what the result files say."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import calibration, cast_report, tracing
from benchmarks.provenance import RESULTS
from benchmarks.report import PAGE, page


def test_the_page_is_written_from_the_result_files() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks.report"
    assert cast_report.PAGE.read_text() == cast_report.page(), "run python -m benchmarks.cast_report"


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
        ({"shape": "llama-3.1-8b"}, "Against stock vLLM", "benchmarks.serving --shape llama-3.1-8b --name serving_x"),
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
