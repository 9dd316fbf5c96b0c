"""An extraction as a picture, and as one HTML file with the picture and the numbers, from its job's result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import PurePath
from typing import Any

from steersman.clients import pictures
from steersman.clients.pictures import WIDE, number

MEASURES = {"accuracy": "accuracy", "auc": "AUC", "d_prime": "d′"}


def png(result: Mapping[str, Any]) -> bytes:
    """Layer by layer: how well held-out examples are told apart, and how long the direction is.

    Raises pictures.PlotsMissing; ValueError for a job that made no direction of a layer's own (method heads).
    """
    if not result["norms"]:
        raise ValueError("heads have no direction for each layer, so there is nothing to draw")
    layers, told = result["layers"], result["held_out"]
    figure = pictures.figure(11, 3.8)
    share, apart, length = figure.subplots(1, 3)
    if told is not None:
        share.plot(layers, told["accuracy"], "o-", markersize=3, label="accuracy")
        share.plot(layers, told["auc"], "o-", markersize=3, label="AUC")
        apart.plot(layers, [float("nan") if d is None else d for d in told["d_prime"]], "o-", markersize=3)
        layer, best = best_layer(result)
        share.plot([layer], [best], "o", markersize=11, fillstyle="none", color="black", label=f"layer {layer}")
        count = f"{told['positive']} and {told['negative']} held out"
    else:
        count = "too few to hold any out"
    share.axhline(0.5, color="0.5", linewidth=1, linestyle="--", label="chance")
    share.set(xlabel="layer", ylabel="share of held-out examples", title="told apart", ylim=(None, 1.02))
    share.legend(fontsize=8, frameon=False)
    apart.axhline(0, color="0.5", linewidth=1, linestyle="--")
    apart.set(xlabel="layer", ylabel="standard deviations", title="d′ of held-out examples")
    for ref, norms in result["norms"].items():
        length.plot(layers, norms, "o-", markersize=3, label=ref)
    length.plot(layers, result["read_norms"], ":", color="0.5", label="what was read, on average")
    every = [n for norms in (*result["norms"].values(), result["read_norms"]) for n in norms]
    if min(every) > 0 and max(every) > WIDE * min(every):
        length.set_yscale("log")
        length.yaxis.set_major_formatter("{x:g}")
        length.yaxis.set_minor_formatter("{x:g}")
    length.set(xlabel="layer", ylabel="norm", title="length of the direction")
    length.legend(fontsize=8, frameon=False)
    for axes in (share, apart, length):
        axes.xaxis.get_major_locator().set_params(integer=True)
    examples = result["examples"]
    figure.suptitle(
        f"{result['method']} at {result['site']} of {_model(result)}: {examples['positive']} and "
        f"{examples['negative']} examples, {count}",
        fontsize=10,
    )
    return pictures.png(figure)


def html(result: Mapping[str, Any]) -> str:
    """Self-contained; raises what `png` does."""
    examples, told = result["examples"], result["held_out"]
    about = (
        f"{escape(result['method'])} at {escape(result['site'])} of {escape(_model(result))}, read at token "
        f"{escape(str(result['token']))} of {examples['positive']} positive, {examples['negative']} negative examples"
    )
    head = ["layer", *(MEASURES.values() if told else ()), *map(escape, result["norms"]), "what was read"]
    marked = best_layer(result)[0] if told else None
    rows = []
    for i, layer in enumerate(result["layers"]):
        numbers = [told[name][i] for name in MEASURES] if told else []
        numbers += [norms[i] for norms in result["norms"].values()] + [result["read_norms"][i]]
        cells = "".join(f'<td class="n">{number(value)}</td>' for value in (layer, *numbers))
        rows.append(f"<tr{' class=best' if layer == marked else ''}>{cells}</tr>")
    if told is None:
        about += ", too few to hold any out"
    else:
        layer, best = best_layer(result)
        about += (
            f", of which {told['positive']} and {told['negative']} were held out.\n"
            f"<b>Told apart best at layer {layer}: AUC {best:.4g}</b>"
        )
    table = f"<table><tr>{''.join(f'<th>{each}</th>' for each in head)}</tr>\n{chr(10).join(rows)}\n</table>"
    picture = png(result)
    return pictures.page(", ".join(result["assets"]), f"{about}.", picture, "separation and norm by layer", table)


def best_layer(result: Mapping[str, Any]) -> tuple[int, float]:
    """The layer of the greatest area under the curve, of equal ones that of the greatest d′; and that area."""
    told = result["held_out"]
    apart = [-math.inf if d is None else d for d in told["d_prime"]]
    auc, _, layer = max(zip(told["auc"], apart, result["layers"], strict=True), key=lambda each: each[:2])
    return layer, auc


def _model(result: Mapping[str, Any]) -> str:
    """Its name; of a folder the last part."""
    return str(PurePath(result["model"]).name if result["model"].startswith("/") else result["model"])
