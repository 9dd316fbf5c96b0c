"""The page of benchmarks says what the result files say."""

from benchmarks.report import PAGE, page


def test_the_page_is_written_from_the_result_files() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks.report"
