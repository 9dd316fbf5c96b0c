"""The pictures of the dashboards show what Prometheus answered."""

from __future__ import annotations

import math
from pathlib import Path

import httpx
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from deploy.grafana.render import Source, _save, bands, draw, legend, matrix
from tests.deploy.exporter import LAYERS
from tests.deploy.prometheus import Prometheus, dashboards, needs_prometheus

BOARDS = dashboards()
SECONDS = 10.0


@pytest.fixture(scope="module")
def source(prometheus: Prometheus) -> Source:
    now = float(prometheus.get("query", query="time()")["result"][1])
    return Source(prometheus.http, now, SECONDS)


def series(*values: tuple[float, str], **labels: str) -> dict[str, object]:
    return {"metric": labels, "values": [[t, v] for t, v in values]}


def test_series_that_begin_late_leave_gaps() -> None:
    times, values = matrix([series((1, "5"), (2, "NaN")), series((2, "7"), (3, "8"))])
    assert times.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(values, [[5, math.nan, math.nan], [math.nan, 7, 8]])


def test_buckets_are_told_apart_in_the_order_of_their_bounds() -> None:
    bounds, _, values = bands([series((1, "9"), le="+Inf"), series((1, "4"), le="10"), series((1, "3"), le="2.5")])
    assert bounds == [2.5, 10, math.inf]
    assert values[:, 0].tolist() == [3, 1, 5]


def test_legends_are_filled_in() -> None:
    assert legend("{{asset}}: {{action}}", {"asset": "french", "action": "cap"}) == "french: cap"
    assert legend("__auto", {"layer": "003"}) == "003"


@needs_prometheus
@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_is_drawn_with_data(source: Source, name: str) -> None:
    figure = draw(BOARDS[name], source)
    frames = {axes.get_label(): axes for axes in figure.axes if axes.get_label()}
    assert set(frames) == {panel["title"] for panel in BOARDS[name]["panels"]}
    assert not [label for label, frame in frames.items() if "no data" in [text.get_text() for text in frame.texts]]
    figure.canvas.draw()  # labels and ticks are made only now


@needs_prometheus
def test_the_heat_map_holds_the_answers_layer_by_layer(source: Source, prometheus: Prometheus) -> None:
    mesh = _mesh(draw(BOARDS["layers.json"], source), "Norm of the stream")
    shown = np.asarray(mesh.get_array())[:, -1]
    means = (
        f'log10(sum(rate(steersman_activation_norm_sum{{layer="{layer}"}}[20s] @ {source.end}))'
        f' / sum(rate(steersman_activation_norm_count{{layer="{layer}"}}[20s] @ {source.end})))'
        for layer in LAYERS
    )
    np.testing.assert_allclose(shown, [prometheus.numbers(mean)[0] for mean in means], rtol=1e-6)
    assert shown[-1] - shown[0] > 1  # the page's norms grow by 2 ** 5.5 over the layers


@needs_prometheus
def test_what_cannot_be_drawn_says_so(source: Source) -> None:
    """A panel without an answer, and one whose query is wrong."""
    board = {**BOARDS["robots.json"], "panels": [_changed("steersman_actions_total", "steersman_action_total")]}
    (frame,) = draw(board, source).axes
    assert "no data" in [text.get_text() for text in frame.texts]
    board["panels"] = [_changed("sum by", "sun by")]
    with pytest.raises(RuntimeError, match=r"sun by.*parse error"):
        draw(board, source)


def answering(result: list[dict[str, object]]) -> Source:
    """A Prometheus that says the same to every query."""
    answer = httpx.MockTransport(lambda _: httpx.Response(200, json={"status": "success", "data": {"result": result}}))
    return Source(httpx.Client(base_url="http://prometheus", transport=answer), 10, SECONDS)


def panel(board: str, title: str) -> dict[str, object]:
    (found,) = (p for p in BOARDS[board]["panels"] if p["title"] == title and p["type"] != "row")
    return {**BOARDS[board], "panels": [found]}


def test_a_table_leaves_cells_without_a_number_empty() -> None:
    rows = [{"metric": {"asset": name}, "value": [10, value]} for name, value in (("calm", "0.5"), ("never", "NaN"))]
    (frame,) = draw(panel("assets.json", "Now"), answering(rows)).axes
    cells = {at: cell.get_text().get_text() for at, cell in frame.tables[0].get_celld().items()}
    assert [cells[1, column] for column in range(5)] == ["calm", "0.5", "50 %", "50 %", "50 %"]
    assert [cells[2, column] for column in range(5)] == ["never", "", "", "", ""]


def test_a_heat_map_of_nothing_but_zero_has_the_colour_of_zero() -> None:
    zeros = [series((1, "0"), (2, "0"), layer=layer) for layer in ("000", "001")]
    title = "Norms out of baseline"
    norm = _mesh(draw(panel("layers.json", title), answering(zeros)), title).norm
    assert (norm.vmin, norm.vmax) == (0, 1)


def test_curves_keep_their_colours_in_the_file(tmp_path: Path) -> None:
    """Beside heat maps, whose colours are many and take up most of the picture."""
    figure = Figure(figsize=(8, 6), dpi=90)
    axes = figure.subplots(3)
    for above, colour in zip(axes, ("turbo", "Blues"), strict=False):
        above.imshow(np.arange(10_000.0).reshape(100, 100), cmap=colour, aspect="auto")
    colours = ["tab:purple", "tab:pink", "tab:brown", "tab:orange", "tab:green"]
    for level, colour in enumerate(colours):
        axes[2].plot([0, 1], [level, level], color=colour, lw=1)
    _save(figure, tmp_path / "figure.png")
    saved = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(int)
    figure.savefig(tmp_path / "whole.png", dpi=90)
    drawn = np.asarray(Image.open(tmp_path / "whole.png").convert("RGB")).astype(int)
    for colour in colours:
        own = (drawn == np.round(255 * np.array(to_rgb(colour)))).all(-1)
        assert own.any()
        assert np.abs(saved - drawn)[own].max() <= 2, colour


def test_a_prometheus_that_is_not_there_is_an_error() -> None:
    with httpx.Client(base_url="http://127.0.0.1:1") as http, pytest.raises(httpx.ConnectError):
        draw(BOARDS["robots.json"], Source(http, 0, SECONDS))


def _changed(old: str, new: str) -> dict[str, object]:
    panel = BOARDS["robots.json"]["panels"][1]
    (target,) = panel["targets"]
    assert old in target["expr"]
    return {**panel, "targets": [{**target, "expr": target["expr"].replace(old, new)}]}


def _mesh(figure: Figure, title: str) -> QuadMesh:
    (frame,) = (axes for axes in figure.axes if axes.get_label() == title)
    (mesh,) = (
        c
        for inner in frame.child_axes
        for c in inner.collections
        if isinstance(c, QuadMesh) and inner.get_xlim()[0] < 0
    )
    return mesh
