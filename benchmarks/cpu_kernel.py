"""Microseconds that one edited place costs on the CPU: the compiled kernel, torch, and a plain ``x.add_()`` for scale.

    python -m benchmarks.cpu_kernel [--width 576] [--dtype bfloat16] [--seconds 0.5] [--name cpu_kernel]

The stream is ``x + residual``. Each number is the median over calls timed one by one, the implementations in
turns, so that what else the machine does falls on all alike. ``build`` is what a new layout of the batch costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.provenance import save
from torch import Tensor

from steersman.kernels.cpu import Table
from steersman.kernels.program import Block, Program
from steersman.steering import lower

ROWS = (1, 16, 512)
AT_LEAST = 15  # calls of each implementation, however long they take

Groups = list[tuple[Program, Tensor]]


def vector(d: int) -> Tensor:
    return torch.randn(d) / d**0.5


def programs(d: int) -> dict[str, list[Program]]:
    def one(*blocks: Block) -> Program:
        return Program(blocks, d)

    def add(i: int = 0) -> Block:
        return lower.add(i, vector(d), 0.01, False)

    def ablate(i: int = 0) -> Block:
        return lower.ablate(i, vector(d)[None], 1.0)

    kinds: list[Callable[[], Block]] = [
        add,
        ablate,
        lambda: lower.add(0, vector(d), 0.01, True),
        lambda: lower.clamp(0, vector(d), -1.0, 1.0),
    ]
    return {
        "add": [one(add())],
        "ablate": [one(ablate())],
        "3 adds": [one(add(0), add(1), add(2))],
        "3 ablates": [one(ablate(0), ablate(1), ablate(2))],
        "16 different": [one(kinds[i % 4]()) for i in range(16)],
    }


def deal(found: list[Program], n: int) -> Groups:
    return [(p, torch.arange(i, n, len(found))) for i, p in enumerate(found)]


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median microseconds of each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < AT_LEAST:
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            taken[name].append((time.perf_counter_ns() - start) / 1000)
    return {name: round(statistics.median(times), 2) for name, times in taken.items()}


def measure(d: int, dtype: torch.dtype, seconds: float) -> list[dict[str, object]]:
    out = []
    for name, found in programs(d).items():
        for n in ROWS:
            if n < len(found):
                continue
            # Edited again and again: an add that does not grow, and as much memory as a place's own.
            x, residual, groups = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), deal(found, n)
            tables = {kernel: Table.build(groups, d, kernel) for kernel in ("cpp", "torch")}
            plain = torch.zeros(d, dtype=dtype)
            calls: dict[str, Callable[[], object]] = {
                "cpp": lambda t=tables["cpp"], x=x, r=residual: t.apply(x, r),  # type: ignore[misc]
                "torch": lambda t=tables["torch"], x=x, r=residual: t.apply(x, r),  # type: ignore[misc]
                "x.add_()": lambda x=x, v=plain: x.add_(v),  # type: ignore[misc]
                "build": lambda g=groups: Table.build(g, d, "cpp"),  # type: ignore[misc]
            }
            row = {"program": name, "rows": n, **medians(calls, seconds)}
            print(f"{name:14} {n:5d}" + "".join(f" {row[k]:>11}" for k in calls), flush=True)
            out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each program and number of rows")
    parser.add_argument("--name", default="cpu_kernel", help="of the result file")
    args = parser.parse_args()
    print(f"{'program':14} {'rows':>5}" + "".join(f" {k:>11}" for k in ("cpp", "torch", "x.add_()", "build")))
    load = round(os.getloadavg()[0], 1)
    rows = measure(args.width, getattr(torch, args.dtype), args.seconds)
    path = save(
        args.name,
        {
            "unit": "microseconds", "width": args.width, "dtype": args.dtype,
            "threads": torch.get_num_threads(), "load": load, "results": rows,
        },
    )  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
