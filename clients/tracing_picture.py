"""Tracing as heat maps, and as one HTML file with the picture and the numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np

from steersman.clients import pictures
from steersman.steering.tracing import COMPONENTS, GROUPS, Falls, Rates, Table

NEURONS: Final = 30  # the most that are drawn, those of the largest falls
FAINT: Final = 0.05
_TITLES: Final = {"attn": "attention outputs", "mlp": "MLP outputs", "hidden": "hidden states"}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}td,th{padding:.15rem .4rem;border-bottom:1px solid #ddd}
td{text-align:right;font-variant-numeric:tabular-nums}th{text-align:left;font-weight:500}img{max-width:100%}"""


def recovery_png(table: Table, title: str) -> bytes:
    """A heat map for each component with colours of its own, groups by layers, of mean recovery rates.

    Raises pictures.PlotsMissing.
    """
    parts = {name: table.rates[name] for name in COMPONENTS if name in table.rates}
    groups = [group for group in GROUPS if any(group in rates for rates in parts.values())]
    width = max((len(row) for rates in parts.values() for row in rates.values()), default=1)
    figure = pictures.figure(min(4 + 0.28 * width, 16), 0.9 + (0.75 + 0.26 * len(groups)) * max(len(parts), 1))
    axes = figure.subplots(max(len(parts), 1), 1, squeeze=False, sharex=True)[:, 0]
    for at, (name, rates) in zip(axes, parts.items(), strict=False):
        rows = [rates.get(group, np.full(width, math.nan)) for group in groups]
        counts = table.counts[name]
        labels = [f"{group.replace('_', ' ')} ({counts.get(group, 0)})" for group in groups]
        _heat(figure, at, np.array(rows), _limit(rows), labels, _TITLES[name])
    axes[-1].set_xlabel("layer")
    figure.suptitle(title, fontsize=10)
    return pictures.png(figure)


def ablation_png(units: Sequence[Sequence[Any]], falls: Mapping[str, Falls], title: str) -> bytes:
    """Layers by parts or heads, a heat map for each set of questions; of neurons bars. Raises pictures.PlotsMissing."""
    grids = {name: _grid(units, found.probability) for name, found in falls.items()}
    rows, labels = next(iter(grids.values()))
    if len(rows) * rows.shape[1] > 4 * len(units):  # neurons: a grid would be nearly empty
        return _bars(units, falls, title)
    figure = pictures.figure(min(4 + 0.28 * rows.shape[1], 16), 1.0 + (0.8 + 0.26 * len(rows)) * len(grids))
    axes = figure.subplots(len(grids), 1, squeeze=False, sharex=True)[:, 0]
    limit = _limit([row for grid, _ in grids.values() for row in grid])
    for at, (name, (grid, _)) in zip(axes, grids.items(), strict=True):
        _heat(figure, at, grid, limit, labels, f"{name or 'questions'} ({falls[name].used})")
    axes[-1].set_xlabel("layer")
    figure.suptitle(title, fontsize=10)
    return pictures.png(figure)


def _grid(units: Sequence[Sequence[Any]], values: Rates) -> tuple[Rates, list[str]]:
    """[parts, layers]"""
    names = list(dict.fromkeys(part for _, part in units))
    out = np.full((len(names), max(layer for layer, _ in units) + 1), math.nan)
    for (layer, part), value in zip(units, values, strict=True):
        out[names.index(part), layer] = value
    return out, [name if isinstance(name, str) else f"head {name}" for name in names]


def _bars(units: Sequence[Sequence[Any]], falls: Mapping[str, Falls], title: str) -> bytes:
    worst = np.nanmax(np.nan_to_num([f.probability for f in falls.values()]), axis=0)
    chosen = np.argsort(-worst)[:NEURONS]
    figure = pictures.figure(8, 1.5 + 0.24 * len(chosen))
    axes = figure.subplots()
    size = 0.8 / len(falls)
    for i, (name, found) in enumerate(falls.items()):
        at = np.arange(len(chosen)) + size * (i - (len(falls) - 1) / 2)
        axes.barh(at, found.probability[chosen], size, label=f"{name or 'questions'} ({found.used})")
    axes.set_yticks(range(len(chosen)), [f"{units[i][0]}:{units[i][1]}" for i in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="share of the answer's probability that is lost", ylabel="layer:neuron")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return pictures.png(figure)


def page(title: str, told: str, picture: bytes, tables: Mapping[str, Sequence[tuple[str, Sequence[float]]]]) -> str:
    """``tables``: by heading rows of a name and a number for each layer, or unit."""
    parts = []
    for heading, rows in tables.items():
        count = max((len(row) for _, row in rows), default=0)
        head = "".join(f"<th>{i}</th>" for i in range(count))
        body = "\n".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{_number(v)}</td>' for v in row)}</tr>" for name, row in rows
        )
        parts.append(f"<h2>{escape(heading)}</h2>\n<table><tr><th></th>{head}</tr>\n{body}\n</table>")
    source = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(told)}</p>
<img alt="heat maps" src="data:image/png;base64,{source}">
{"".join(parts)}
</html>
"""


def _limit(rows: Sequence[Rates]) -> float:
    """Colours go from minus to plus this; the middle is 0. What is all small stays pale."""
    known = [abs(v) for row in rows for v in row if math.isfinite(v)]
    return float(max([*known, FAINT]))


def _heat(figure: Any, axes: Any, rows: Rates, limit: float, labels: Sequence[str], title: str) -> None:
    image = axes.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""
