"""Draws the dashboards as pictures from a Prometheus's answers, without Grafana.

    python -m deploy.grafana.render http://localhost:9090 [--out FOLDER] [--minutes 5] [--set layer=0|5] [dashboard ...]

What is drawn is what Prometheus answers to the dashboards' own queries over the last minutes, placed as on the
dashboard's grid; colours and fonts are matplotlib's, not Grafana's.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.transforms import Bbox
from PIL import Image

from deploy.grafana.generate import FOLDER
from deploy.grafana.panels import WIDTH

POINTS = 120
"""Steps of a range query."""
INCHES = (0.7, 0.32)
"""Of one column and one row of the grid."""
TITLE_INCHES = 0.5
COLOURS = {"Turbo": "turbo", "Blues": "Blues"}
UNITS = {"percentunit": (100.0, " %"), "s": (1.0, " s"), "reqps": (1.0, "/s"), "ops": (1.0, "/s"), "short": (1.0, "")}
SMALL = 7
"""Points of a letter in a panel."""
MOST_CURVES = 8
"""More do not fit in a panel's legend."""

Series = dict[str, Any]
Answers = Sequence[tuple[Mapping[str, Any], Sequence[Series]]]
"""A panel's targets, and what each was answered."""


@dataclass(frozen=True)
class Source:
    """A Prometheus, the range that is drawn, and what the dashboards' variables stand for."""

    http: httpx.Client
    end: float
    seconds: float
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> float:
        return max(1.0, self.seconds / POINTS)

    def answers(self, target: Mapping[str, Any], variables: Mapping[str, str]) -> list[Series]:
        """The series of one of a panel's queries."""
        window = f"{math.ceil(max(4 * 5, self.step))}s"  # four scrapes, as Grafana takes them
        known = {"__rate_interval": window, **variables, **self.values}
        query = re.sub(r"\$([A-Za-z_]\w*)", lambda match: known[match[1]], target["expr"])
        if target["instant"]:
            return self._get("query", query=query, time=self.end)
        return self._get("query_range", query=query, start=self.end - self.seconds, end=self.end, step=self.step)

    def _get(self, path: str, **parameters: Any) -> list[Series]:
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{parameters['query']}: {answer['error']}")
        return list(answer["data"]["result"])


def matrix(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Times [t] in seconds and values [series, t], NaN where a series has none."""
    times = sorted({float(t) for s in series for t, _ in s["values"]})
    place = {t: i for i, t in enumerate(times)}
    values = np.full((len(series), len(times)), np.nan)
    for row, s in enumerate(series):
        for t, value in s["values"]:
            values[row, place[float(t)]] = float(value)
    return np.array(times), values


def bands(series: Sequence[Series]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """A histogram's cumulative buckets as upper bounds [b], times [t] and what is in each bucket alone [b, t]."""
    ordered = sorted(series, key=lambda s: float(s["metric"]["le"]))
    times, cumulative = matrix(ordered)
    return [float(s["metric"]["le"]) for s in ordered], times, np.diff(cumulative, axis=0, prepend=0.0)


def legend(text: str, labels: Mapping[str, str]) -> str:
    if text == "__auto":
        return ", ".join(labels.values())
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), text)


def draw(board: Mapping[str, Any], source: Source) -> Figure:
    variables = {v["name"]: v["allValue"] for v in board["templating"]["list"] if "allValue" in v}
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"])
    height = rows * INCHES[1] + TITLE_INCHES
    figure = Figure(figsize=(WIDTH * INCHES[0], height))
    grid = GridSpec(rows, WIDTH, figure, left=0.015, right=0.995, bottom=0.005, top=1 - TITLE_INCHES / height)
    figure.suptitle(board["title"], x=0.015, y=1 - 0.1 / height, ha="left", va="top", weight="bold")
    for panel in board["panels"]:
        at = panel["gridPos"]
        cell = grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]]
        frame = figure.add_subplot(cell)
        frame.set_axis_off()
        frame.set_label(panel["title"])
        if panel["type"] == "row":
            frame.text(0, 0.2, panel["title"], weight="bold", size=10)
            continue
        frame.text(0.01, 0.99, panel["title"], size=9, va="top", weight="bold")
        answers = [(t, source.answers(t, variables)) for t in panel["targets"]]
        if not any(found for _, found in answers):
            frame.text(0.5, 0.5, "no data", ha="center", color="grey")
            continue
        DRAWN[panel["type"]](frame, panel, answers)
    return figure


def _unit(panel: Mapping[str, Any]) -> tuple[float, str]:
    """By what values are multiplied, and what is written after them."""
    return UNITS[panel["fieldConfig"]["defaults"]["unit"]]


def _chart(frame: Axes, width: float, minutes: np.ndarray) -> Axes:
    """Axes inside a panel's frame; ``width`` is their share of it."""
    axes = frame.inset_axes((0.085, 0.13, width, 0.73))
    axes.set_xlim(minutes[0], minutes[-1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    axes.tick_params(which="both", labelsize=SMALL)
    return axes


def _curves(frame: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    factor, unit = _unit(panel)
    custom = panel["fieldConfig"]["defaults"]["custom"]
    found = [(legend(t["legendFormat"], s["metric"]), s) for t, series in answers for s in series]
    times, values = matrix([s for _, s in found])
    minutes, values = (times - times[-1]) / 60, values * factor
    axes = _chart(frame, 0.9, minutes)
    if "stacking" in custom:
        axes.stackplot(minutes, np.nan_to_num(values), labels=[name for name, _ in found], alpha=0.7)
    else:
        for (name, _), row in zip(found, values, strict=True):
            axes.plot(minutes, row, label=name, lw=1)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    elif "axisSoftMin" in custom:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}{unit}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}{unit}" if _labelled(value) else "")
    axes.grid(alpha=0.3)
    if len(found) <= MOST_CURVES:
        axes.legend(fontsize=SMALL, loc="best", framealpha=0.7, labelspacing=0.2, handlelength=1.2, borderpad=0.3)


def _labelled(value: float) -> bool:
    """Of what lies between the powers of ten on a logarithmic axis, 2 and 5 times one: more labels would touch."""
    return value > 0 and round(value / 10 ** math.floor(math.log10(value)), 6) in (2, 5)


def _heat(frame: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    ((target, series),) = answers
    options = panel["options"]
    factor, unit = UNITS[options.get("cellValues", {}).get("unit", "short")]
    if target["format"] == "heatmap":
        bounds, times, values = bands(series)
        names = ["∞" if math.isinf(bound) else f"{bound:g}" for bound in bounds]
    else:
        times, values = matrix(series)
        names = [legend(target["legendFormat"], s["metric"]) for s in series]
    values = np.where(values <= options["filterValues"]["le"], np.nan, values * factor)
    minutes = (times - times[-1]) / 60
    axes = _chart(frame, 0.84, minutes)
    power = options["color"]["exponent"] if options["color"]["scale"] == "exponential" else 1.0
    shown = values[np.isfinite(values)]
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 0.0)
    image = axes.pcolormesh(
        minutes,
        np.arange(len(names)),
        values,
        cmap=COLOURS[options["color"]["scheme"]],
        norm=mpl.colors.PowerNorm(power, low, high if high > low else low + 1),
        shading="nearest",
    )
    every = math.ceil(len(names) / 12)
    axes.set_yticks(range(0, len(names), every), names[::every])
    bar = frame.figure.colorbar(image, cax=frame.inset_axes((0.935, 0.13, 0.012, 0.73)))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}{unit}")
    bar.ax.tick_params(labelsize=SMALL)


def _number(frame: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    factor, unit = _unit(panel)
    _, values = matrix(answers[0][1])
    latest = values[0, -1]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    colour = [step["color"] for step in steps if step["value"] is None or latest >= step["value"]][-1]
    frame.text(0.5, 0.42, f"{latest * factor:.3g}{unit}", size=18, ha="center", va="center", color=f"tab:{colour}")


def _table(frame: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    (label,) = {name for _, series in answers for s in series for name in s["metric"]}
    rows = sorted({s["metric"][label] for _, series in answers for s in series})
    titles = [target["legendFormat"] for target, _ in answers]
    units = {o["matcher"]["options"]: o["properties"][0]["value"] for o in panel["fieldConfig"]["overrides"]}
    cells = []
    for row in rows:
        found = [
            next((float(s["value"][1]) for s in series if s["metric"][label] == row), math.nan) for _, series in answers
        ]
        scaled = [
            (value * UNITS[units[title]][0], UNITS[units[title]][1]) for value, title in zip(found, titles, strict=True)
        ]
        cells.append([row, *("" if math.isnan(value) else f"{value:.3g}{unit}" for value, unit in scaled)])
    tall = min(0.86, 0.11 * (len(rows) + 1))
    place = Bbox.from_bounds(0.01, 0.88 - tall, 0.98, tall)
    table = frame.table(cells, colLabels=[label, *titles], colLoc="right", bbox=place, edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(SMALL)


DRAWN = {"timeseries": _curves, "heatmap": _heat, "stat": _number, "table": _table}


def render(url: str, out: Path, seconds: float, values: Mapping[str, str], names: Sequence[str] = ()) -> list[Path]:
    """Writes one PNG for each dashboard, or for those named, and gives their paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with httpx.Client(base_url=url, timeout=60) as http:
        now = float(http.get("/api/v1/query", params={"query": "time()"}).json()["data"]["result"][1])
        source = Source(http, now, seconds, values)
        for file in sorted(FOLDER.glob("*.json")):
            if names and file.stem not in names:
                continue
            path = out / f"{file.stem}.png"
            _save(draw(json.loads(file.read_text(encoding="utf-8")), source), path)
            written.append(path)
    return written


def _save(figure: Figure, path: Path) -> None:
    """With 256 colours, a third of the bytes. They are chosen to keep the colours of thin lines, rare as those are."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the dashboards from a Prometheus's answers.")
    parser.add_argument("url")
    parser.add_argument("dashboards", nargs="*", help="all, when none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a dashboard's variable")
    arguments = parser.parse_args()
    values = dict(pair.split("=", 1) for pair in arguments.set)
    for path in render(arguments.url, arguments.out, 60 * arguments.minutes, values, arguments.dashboards):
        print(path)


if __name__ == "__main__":
    main()
