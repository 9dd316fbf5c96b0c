from __future__ import annotations

import re

import pytest

from steersman.clients.selection import Selection
from steersman.clients.selection_picture import html, png
from steersman.steering.extraction_layers import Candidate

pytest.importorskip("matplotlib")
SETTINGS = {"max_kl": 0.1, "min_induce": 0.0, "last_share": 0.2, "scale": 1.0}


def found(selected: int | None = 1) -> Selection:
    candidates = [Candidate(0, 0, 2.5, -2.0, 0.01), Candidate(2, 0, -3.25, 4.0, 0.02), Candidate(2, 1, 1.0, 1.0, 0.5)]
    prompts, unsteered = {"showing": 3, "others": 2}, {"showing": 3.0, "others": -3.0}
    return Selection("<m>", 5, SETTINGS, prompts, unsteered, ["a@1", "b@1"], candidates, selected, "none & why")


def test_a_picture() -> None:
    assert png(found())[:8] == b"\x89PNG\r\n\x1a\n"
    assert png(found(None)) != png(found())


def test_a_page_of_its_own() -> None:
    page = html(found())
    assert not re.search(r"(src|href)=\"(?!data:)", page), "it refers to nothing"
    assert "&lt;m&gt;" in page
    (best,) = re.findall(r"<tr class=best>(.*)</tr>", page)
    assert re.findall(r">([^<]*)</td>", best) == ["a@1", "2", "-3.25", "4", "0.02"]
    assert "Selected: layer 2 of a@1." in page
    assert "none &amp; why." in html(found(None))
