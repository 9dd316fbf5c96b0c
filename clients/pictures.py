"""What pictures of measurements and the pages around them have in common."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, Final

WIDE: Final = 10  # numbers so many times apart are drawn on a logarithmic axis
_STYLE: Final = """body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.best{background:#e8f4ea}img{max-width:100%}"""


class PlotsMissing(Exception):
    """matplotlib is not installed; the message says how to."""


def figure(width: float, height: float) -> Any:
    """A matplotlib Figure that no window and no global state belongs to. Raises PlotsMissing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsMissing("pictures need matplotlib: pip install 'steersman[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def png(drawn: Any) -> bytes:
    """The figure as a file, its axes open to the right and above."""
    for axes in drawn.axes:
        axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=110)
    return out.getvalue()


def page(title: str, told: str, picture: bytes, about: str, table: str) -> str:
    """One HTML file that refers to nothing. ``told`` and ``table`` are HTML, the rest is text."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{told}</p>
<img alt="{escape(about)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
{table}</html>
"""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
