"""A calibration as a picture, and as one HTML file with the picture, the numbers and the first prompt's answers."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, Final

from steersman.clients.calibration_spec import Calibration, Cell

WIDE: Final = 10  # scales so many times apart are drawn on a logarithmic axis
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.best{background:#e8f4ea}img{max-width:100%}"""


class PlotsMissing(Exception):
    """matplotlib is not installed; the message says how to."""


def png(found: Calibration) -> bytes:
    """Effect and damage over the scale, a line for each layer; a tick for each random direction, their means dotted.

    Raises PlotsMissing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsMissing("pictures need matplotlib: pip install 'steersman[plots]'") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    effect, damage = figure.subplots(1, 2)
    for i, layer in enumerate(sorted({cell.layer for cell in found.cells})):
        cells = sorted((cell for cell in found.cells if cell.layer == layer), key=lambda cell: cell.scale)
        scales, colour = [cell.scale for cell in cells], f"C{i % 10}"
        effect.plot(scales, [cell.effect for cell in cells], "o-", color=colour, label=f"layer {layer}")
        damage.plot(scales, [cell.damage for cell in cells], "o-", color=colour, label=f"layer {layer}")
        controlled = [(cell.scale, cell.random.by_seed) for cell in cells if cell.random is not None]
        for scale, means in controlled:
            effect.plot([scale] * len(means), means, "_", color=colour, alpha=0.6)
        if controlled:
            effect.plot(*zip(*((s, sum(m) / len(m)) for s, m in controlled), strict=True), ":", color=colour,
                        label=f"random directions, layer {layer}")  # fmt: skip
    effect.axhline(found.unsteered, color="0.5", linewidth=1, label="unsteered")
    if found.prompted is not None:
        effect.axhline(found.prompted, color="0.5", linewidth=1, linestyle="--", label="asked for in words")
    damage.axhline(found.settings["max_damage"], color="0.5", linewidth=1, linestyle="--", label="most allowed")
    if (best := found.best) is not None:
        for axes, value in ((effect, best.effect), (damage, best.damage)):
            axes.plot([best.scale], [value], "o", markersize=13, fillstyle="none", color="black", label="recommended")
    effect.set(xlabel="scale", ylabel=f"mean score ({found.settings['scorer']['by']})", title="effect")
    damage.set(xlabel="scale", ylabel=f"nats per token ({found.settings['damage']})", title="damage")
    scales = [cell.scale for cell in found.cells]
    for axes in (effect, damage):
        if min(scales) > 0 and max(scales) > WIDE * min(scales):
            axes.set_xscale("log")
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.vector} on {found.model}", fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def html(found: Calibration) -> str:
    """Self-contained; raises PlotsMissing."""
    picture = base64.b64encode(png(found)).decode()
    best = found.best
    verdict = (
        f"Recommended: layer {best.layer}, scale {best.scale:.4g}." if best is not None else f"None: {found.refusal}."
    )
    head = ("layer", "scale", "effect", "damage", "found for", "random", "beaten by", "first answer")
    rows = "\n".join(_row(cell, cell is best) for cell in found.cells)
    prompted = "" if found.prompted is None else f", asked for in words {found.prompted:.4g}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(found.vector)}</title><style>{_STYLE}</style>
<h1>{escape(found.vector)}</h1>
<p>{escape(found.model)}, {len(found.unsteered_scores)} prompts. Mean score unsteered {found.unsteered:.4g}{prompted}.
<b>{escape(verdict)}</b></p>
<img alt="effect and damage over the scale" src="data:image/png;base64,{picture}">
<table><tr>{"".join(f"<th>{each}</th>" for each in head)}</tr>
{rows}
</table></html>
"""


def _row(cell: Cell, best: bool) -> str:
    control = cell.random
    numbers = (
        cell.layer,
        cell.scale,
        cell.effect,
        cell.damage,
        cell.target_kl,
        None if control is None else control.mean,
        None if control is None else control.beaten_by,
    )
    cells = "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
    return f"<tr{' class=best' if best else ''}>{cells}<td>{escape(cell.example)}</td></tr>"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
