"""A calibration as a picture, and as one HTML file with the picture, the numbers and the first prompt's answers."""

from __future__ import annotations

from html import escape

from steersman.clients import pictures
from steersman.clients.calibration_spec import Calibration, Cell
from steersman.clients.pictures import WIDE, number


def png(found: Calibration) -> bytes:
    """Effect and damage over the scale, a line for each layer; a tick for each random direction, their means dotted.

    Raises PlotsMissing.
    """
    figure = pictures.figure(10, 4.2)
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
    figure.suptitle(f"{found.vector} on {found.model}", fontsize=10)
    return pictures.png(figure)


def html(found: Calibration) -> str:
    """Self-contained; raises PlotsMissing."""
    best = found.best
    verdict = (
        f"Recommended: layer {best.layer}, scale {best.scale:.4g}." if best is not None else f"None: {found.refusal}."
    )
    head = ("layer", "scale", "effect", "damage", "found for", "random", "beaten by", "first answer")
    rows = "\n".join(_row(cell, cell is best) for cell in found.cells)
    prompted = "" if found.prompted is None else f", asked for in words {found.prompted:.4g}"
    told = f"{escape(found.model)}, {len(found.unsteered_scores)} prompts. Mean score unsteered {found.unsteered:.4g}"
    table = f"<table><tr>{''.join(f'<th>{each}</th>' for each in head)}</tr>\n{rows}\n</table>"
    return pictures.page(
        found.vector,
        f"{told}{prompted}.\n<b>{escape(verdict)}</b>",
        png(found),
        "effect and damage over the scale",
        table,
    )


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
    cells = "".join(f'<td class="n">{number(value)}</td>' for value in numbers)
    return f"<tr{' class=best' if best else ''}>{cells}<td>{escape(cell.example)}</td></tr>"
