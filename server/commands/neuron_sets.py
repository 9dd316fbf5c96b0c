"""What the neuron commands share: layers from the command line, a table, a bar, and saving what was found."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steersman.steering.neurons_contrast import control_sets
from steersman.steering.neurons_labels import Neuron, neurons_asset
from steersman.steering.store import Store


def layer_list(text: str) -> tuple[int, ...]:
    """For argparse: "0-3,7"."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{part!r} is no layer and no range of layers")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(sorted(set(layers)))


def positive(text: str) -> int:
    """For argparse: 1, 2, .."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def spell(words: Iterable[str]) -> str:
    """Tokens on one line, spaces and line ends visible."""
    return " ".join(repr(word) if word != word.strip() or not word else word for word in words)


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; lines with tabs where the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        print("\t".join(columns))
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on standard error; what is given moves it on."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def save(
    args: argparse.Namespace,
    neurons: Sequence[Neuron],
    model: Mapping[str, Any],
    widths: Mapping[int, int],
    provenance: Mapping[str, Any],
    description: str,
) -> None:
    """Stores the set under ``args.save``, and ``args.controls`` random sets beside it; prints their names."""
    if not neurons:
        raise SystemExit(f"steersman neurons {args.action}: nothing was found, so nothing is saved")
    sizes = set(widths.values())
    d_ff = sizes.pop() if len(sizes) == 1 else None
    store, about = Store(args.store), {"provenance": dict(provenance), "source": f"steersman neurons {args.action}"}
    print(store.add(neurons_asset(args.save, neurons, model, d_ff, description=description, **about)))
    for i, control in enumerate(control_sets(neurons, widths, args.controls)):
        about["provenance"] = {"control_of": args.save, "seed": 0, "draw": i}
        text = f"random neurons, as many in each layer as {args.save} has, and none of its own"
        print(store.add(neurons_asset(f"{args.save}-control-{i}", control, model, d_ff, description=text, **about)))
