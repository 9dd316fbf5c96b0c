"""What one edited place costs on a GPU, inside a CUDA graph: each kernel, three models' widths, many kinds of plans.

    python -m benchmarks.kernels [--kernels cuda,triton] [--widths 1536,4096,4608] [--rows 1,8,64,256,8192]

A graph holds one launch for each of ``PLACES`` layers, each on activations of its own, as a model's would; what
counts is the time of a replay divided by the launches, the median over replays, kernels in turns. ``idle`` is a batch
in which no row is edited. Where enough rows make memory the limit, the bytes that an edit must move (x read and
written, the residual read where the program reads the stream) over the time are set against a plain copy of as much
memory in the same run. ``add, norm`` and ``add+norm`` are an edit followed by the norm that vLLM's own kernel makes (in
eager mode), and both in one launch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.provenance import made, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from steersman.kernels import choice
from steersman.kernels.program import Block, Program
from steersman.kernels.tables import NONE, Tables
from steersman.steering import lower

PLACES = 32
PLANS = 256
REPLAYS = 30
LIMITED_BY_MEMORY = 4096  # rows from which the bandwidth is worth telling


def cases(width: int) -> dict[str, list[Program]]:
    """Programs that a batch's rows take in turn; none: no row is edited."""

    def v() -> Tensor:
        return torch.randn(width) / width**0.5

    def one(*blocks: Block) -> Program:
        return Program(blocks, width)

    def features() -> Block:
        rows = torch.randn(32, width) / width**0.5
        return lower.affine(0, rows, rows, torch.zeros(32), 0.01)

    return {
        "idle": [],
        "add": [one(lower.add(0, v(), 0.01, False))],
        "3 adds": [one(*(lower.add(i, v(), 0.01, False) for i in range(3)))],
        "add, relative": [one(lower.add(0, v(), 0.01, True))],
        "ablate": [one(lower.ablate(0, v()[None], 1.0))],
        "clamp": [one(lower.clamp(0, v(), -1.0, 1.0))],
        "32 neurons": [one(lower.neurons(0, torch.randperm(width)[:32], width, "set", 1.0))],
        "32 features": [one(features())],
        f"{PLANS} plans": [one(lower.add(0, v(), 0.01, False)) for _ in range(PLANS)],
    }


def graph_of(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``launch`` as a graph, after it has run by itself once, which compiles what it needs."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def microseconds(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
    """Of each replay, the graphs in turns."""
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(REPLAYS + 3):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                taken[name].append(start.elapsed_time(end) * 1000)
    return taken


def with_norms(
    edits: dict[str, Any], xs: Tensor, residual: Tensor, entries: Tensor, tables: Tables
) -> dict[str, torch.cuda.CUDAGraph]:
    """Edits that a norm follows: apart, and in one launch."""
    from vllm import _custom_ops

    weight = torch.ones_like(residual[0])

    def apart(edit: Any) -> None:
        for place in range(PLACES):
            x = xs[place % len(xs)]
            edit(x, residual, entries, tables, place)
            _custom_ops.fused_add_rms_norm(x, residual, weight, 1e-5)

    def fused(edit_and_norm: Any) -> None:
        for place in range(PLACES):
            edit_and_norm(xs[place % len(xs)], residual, weight, 1e-5, entries, tables, place)

    out = {f"{name} , norm": graph_of(partial(apart, edit)) for name, edit in edits.items()}
    return out | {f"{name} +norm": graph_of(partial(fused, choice.and_norm(edit))) for name, edit in edits.items()}


def measure(kernels: Sequence[str], width: int, rows: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    edits = {name: choice.choose(device, name) for name in kernels}
    copies = max(
        2, min(PLACES, 2**30 // (rows * width * dtype.itemsize))
    )  # more memory than caches hold, within reason
    xs = torch.randn(copies, rows, width, device=device).to(dtype)
    residual = torch.randn(rows, width, device=device).to(dtype)
    entries = torch.full((rows,), NONE, dtype=torch.int32, device=device)
    out = []
    for case, programs in cases(width).items():
        floats = (len(programs) * PLACES + 1) * width * 64
        tables = Tables(PLACES, device, entries=max(1, len(programs)), words=2**20, floats=floats)
        found = [tables.add(dict.fromkeys(range(PLACES), program)) for program in programs]
        entries.fill_(NONE)
        if found:
            entries.copy_(torch.tensor([found[i % len(found)] for i in range(rows)], dtype=torch.int32))

        def all_places(edit: Any, tables: Tables = tables) -> None:
            for place in range(PLACES):
                edit(xs[place % copies], residual, entries, tables, place)

        graphs = {name: graph_of(partial(all_places, edit)) for name, edit in edits.items()}
        if case == "add":
            graphs |= with_norms(edits, xs, residual, entries, tables)
        target = torch.empty_like(xs)

        def copy(target: Tensor = target) -> None:
            for place in range(PLACES):
                target[place % copies].copy_(xs[place % copies])

        taken = microseconds({**graphs, "copy": graph_of(copy)})
        copied = 2 * rows * width * dtype.itemsize / statistics.median(taken.pop("copy")) * PLACES
        reads = bool(programs) and programs[0].constant is None
        for named, times in taken.items():
            name, _, what = named.partition(" ")
            per_place = statistics.median(times) / PLACES
            moved = (3 if reads else 2) * rows * width * dtype.itemsize / per_place
            row = {
                "kernel": name, "case": case + what, "width": width, "rows": rows,
                "microseconds": per_place, "slowest": max(times) / PLACES,
            }  # fmt: skip
            if programs and not what and rows >= LIMITED_BY_MEMORY:
                row["bandwidth_of_copy"] = moved / copied
            out.append(row)
    return out


def table(results: Sequence[dict[str, Any]]) -> Table:
    out = Table("kernel", "case", "width", "rows", "µs a place", "bandwidth, of a copy's")
    for r in results:
        share = r.get("bandwidth_of_copy")
        numbers = (str(r["width"]), str(r["rows"]), f"{r['microseconds']:.2f}", "" if share is None else f"{share:.2f}")
        out.add_row(r["kernel"], r["case"], *numbers)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = partial(str.split, sep=",")
    parser.add_argument("--kernels", type=numbers, default=list(choice.BY_SPEED))
    parser.add_argument("--widths", type=numbers, default=["1536", "4096", "4608"])
    parser.add_argument("--rows", type=numbers, default=["1", "8", "64", "256", "8192"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--name", default="kernels", help="of the result file")
    parser.add_argument("--resume", action="store_true", help="do nothing where this commit's file is complete")
    args = parser.parse_args()
    if args.resume and made(args.name):
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels needs a CUDA GPU; benchmarks.cpu_kernel measures the CPU's")
    console = Console()
    shapes = [(int(width), int(rows)) for width in args.widths for rows in args.rows]
    results: list[dict[str, Any]] = []
    for width, rows in track(shapes, "measuring", console=console):
        results += measure(args.kernels, width, rows, getattr(torch, args.dtype))
        about = {"dtype": args.dtype, "device": torch.cuda.get_device_name(), "complete": (width, rows) == shapes[-1]}
        path = save(args.name, {**about, "results": results})
    console.print(table(results))
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
