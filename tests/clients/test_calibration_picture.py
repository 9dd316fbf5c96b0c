from __future__ import annotations

import base64
import re
import struct
import sys

import pytest

from steersman.clients.calibration_picture import html, png
from steersman.clients.calibration_spec import Calibration, Cell, Control
from steersman.clients.pictures import PlotsMissing

pytest.importorskip("matplotlib")
SETTINGS = {"scorer": {"by": "lexicon", "name": "french"}, "damage": "kl", "max_damage": 1.0}


@pytest.fixture
def found() -> Calibration:
    control = Control([0.1, 0.12], 0.11, 7.25)
    cells = [
        Cell(4, 0.5, 0.3, 0.2, None, [0.3], "Bonjour <b>&", control),
        Cell(4, 1.0, 0.8, 0.7, 0.7, [0.8], "Oui", control),
        Cell(12, 1.0, 0.2, 0.1, None, [0.2], "Yes"),
    ]
    return Calibration("french@1", SETTINGS, "m", 0.1, [0.1], 0.4, cells, 1)


def test_a_picture(found: Calibration) -> None:
    data = png(found)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1100, 462)


def test_a_page_of_its_own(found: Calibration) -> None:
    page = html(found)
    assert base64.b64decode(re.findall(r"base64,([^\"]+)", page)[0]) == png(found)
    assert not re.search(r"(src|href)=\"(?!data:)", page), "it refers to nothing"
    assert page.count("<tr class=best>") == 1
    assert "Bonjour &lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "7.25" in page
    found.recommended, found.refusal = None, "nothing < all"
    assert "None: nothing &lt; all." in html(found)


def test_without_matplotlib(found: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotsMissing, match=r"pip install 'steersman\[plots\]'"):
        png(found)
