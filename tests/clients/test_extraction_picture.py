from __future__ import annotations

import base64
import re
import struct
import sys
from typing import Any

import pytest

from steersman.clients.extraction_picture import best_layer, html, png
from steersman.clients.pictures import PlotsMissing

pytest.importorskip("matplotlib")


@pytest.fixture
def result() -> dict[str, Any]:
    """Of three layers; at the last one nothing varies."""
    told = {"accuracy": [0.5, 0.875, 0.75], "auc": [0.4, 1.0, 1.0], "d_prime": [-0.2, 3.25, None]}
    return {
        "assets": ["calm@1"], "model": "<m>", "method": "pca", "site": "resid_post", "token": "last",
        "layers": [2, 5, 9], "examples": {"positive": 20, "negative": 20},
        "held_out": {"positive": 4, "negative": 4, **told},
        "norms": {"calm@1": [1.5, 2.5, 3.5]}, "read_norms": [30.0, 60.0, 90.0],
    }  # fmt: skip


def test_a_picture(result: dict[str, Any]) -> None:
    data = png(result)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1210, 418)
    assert png({**result, "norms": {"calm@1": [1.5, 2.5, 60.0]}}) != data
    assert png({**result, "held_out": {**result["held_out"], "auc": [0.4, 0.9, 1.0]}}) != data


def test_a_page_of_its_own(result: dict[str, Any]) -> None:
    page = html(result)
    assert base64.b64decode(re.findall(r"base64,([^\"]+)", page)[0]) == png(result)
    assert not re.search(r"(src|href)=\"(?!data:)", page), "it refers to nothing"
    assert "&lt;m&gt;" in page
    assert "<m>" not in page
    assert best_layer(result) == (5, 1.0)
    result["held_out"]["d_prime"] = [-0.2, 3.25, 4.0]
    assert best_layer(result) == (9, 1.0)
    assert "/home" not in html({**result, "model": "/home/someone/models/tiny"})
    (best,) = re.findall(r"<tr class=best>(.*)</tr>", page)
    assert re.findall(r">([^<]*)</td>", best) == ["5", "0.875", "1", "3.25", "2.5", "60"]
    (last,) = re.findall(r"<tr>(<td class=\"n\">9<.*)</tr>", page)
    assert re.findall(r">([^<]*)</td>", last) == ["9", "0.75", "1", "", "3.5", "90"]


def test_where_nothing_was_held_out_lengths_are_drawn(result: dict[str, Any]) -> None:
    few = {**result, "held_out": None, "norms": {"calm-a@1": [1.5, 2.5, 3.5], "calm-b@2": [1.0, 2.0, 3.0]}}
    assert png(few) != png(result)
    page = html(few)
    assert "too few to hold any out" in page
    assert "<tr class=best>" not in page
    assert page.count("<th>") == 4


def test_heads_have_nothing_to_draw(result: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        png({**result, "norms": {}})


def test_without_matplotlib(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotsMissing, match=r"pip install 'steersman\[plots\]'"):
        html(result)
