"""A selection as a picture, and as one HTML file with the picture and the numbers."""

from __future__ import annotations

from html import escape
from typing import Any

from steersman.clients import pictures
from steersman.clients.pictures import number
from steersman.clients.selection import Selection


def png(found: Selection) -> bytes:
    """Layer by layer, a line for each vector: what ablating and adding do, and what the ablation damages.

    Raises pictures.PlotsMissing.
    """
    figure = pictures.figure(11, 3.8)
    bypass, induce, kl = figure.subplots(1, 3)
    for position, ref in enumerate(found.vectors):
        tried = [c for c in found.candidates if c.position == position]
        layers = [c.layer for c in tried]
        for axes, values in (
            (bypass, [c.bypass for c in tried]),
            (induce, [c.induce for c in tried]),
            (kl, [c.kl for c in tried]),
        ):
            axes.plot(layers, values, "o-", markersize=3, color=f"C{position % 10}", label=ref)
    bypass.axhline(found.unsteered["showing"], color="0.5", linewidth=1, label="unsteered")
    induce.axhline(found.unsteered["others"], color="0.5", linewidth=1, label="unsteered")
    induce.axhline(found.settings["min_induce"], color="0.5", linewidth=1, linestyle="--", label="least wanted")
    kl.axhline(found.settings["max_kl"], color="0.5", linewidth=1, linestyle="--", label="most allowed")
    late = int(found.n_layers * (1 - found.settings["last_share"]))
    for axes in (bypass, induce, kl):
        if found.settings["last_share"]:
            axes.axvspan(late - 0.5, found.n_layers - 0.5, color="0.9", label="too late a layer")
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if (best := found.best) is not None:
        for axes, value in ((bypass, best.bypass), (induce, best.induce), (kl, best.kl)):
            axes.plot([best.layer], [value], "o", markersize=11, fillstyle="none", color="black", label="selected")
    for axes in (bypass, induce, kl):
        axes.legend(fontsize=7, frameon=False)
    bypass.set(ylabel="log-odds", title="ablated, where the behaviour shows")
    induce.set(ylabel="log-odds", title="added, where it does not")
    kl.set(ylabel="nats", title="ablated, where it does not: damage")
    figure.suptitle(f"{', '.join(found.vectors)} on {found.model}", fontsize=10)
    return pictures.png(figure)


def html(found: Selection) -> str:
    """Self-contained; raises pictures.PlotsMissing."""
    best = found.best
    verdict = (
        f"Selected: layer {best.layer} of {found.vectors[best.position]}." if best is not None else f"{found.refusal}."
    )
    told = (
        f"{escape(found.model)}. Unsteered log-odds {found.unsteered['showing']:.4g} on {found.prompts['showing']} "
        f"prompts that show the behaviour, {found.unsteered['others']:.4g} on {found.prompts['others']} others.\n"
        f"<b>{escape(verdict)}</b>"
    )
    head = ("vector", "layer", "ablated", "added", "damage in nats")
    rows: list[str] = []
    for candidate in found.candidates:
        numbers: tuple[Any, ...] = (candidate.layer, candidate.bypass, candidate.induce, candidate.kl)
        cells = "".join(f'<td class="n">{number(value)}</td>' for value in numbers)
        name = escape(found.vectors[candidate.position])
        rows.append(f"<tr{' class=best' if candidate is best else ''}><td>{name}</td>{cells}</tr>")
    joined = "\n".join(rows)
    table = f"<table><tr>{''.join(f'<th>{each}</th>' for each in head)}</tr>\n{joined}\n</table>"
    return pictures.page(", ".join(found.vectors), told, png(found), "what each layer's direction does", table)
