"""Milliseconds of CPU time that statistics take in one pass that is looked at, and in which part of it.

    python -m benchmarks.monitor_pass [--layers 30] [--width 576] [--vocabulary 49152] [--probes 8] [--name NAME]

The stream is ``x + residual`` in bfloat16; every probe is read at every layer. ``layers``: what is read between the
layers; ``logits``: the entropy of the next tokens; ``end``: counting it all. Each number is the median over passes, of
the CPU time of one thread, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.provenance import save

from steersman.server.engine.monitor import Monitor
from steersman.server.engine.owners import Scheduled
from steersman.steering.plan import Place, ProbeRead
from steersman.steering.sites import Site

PASSES = ((1, 1), (16, 16), (64, 64), (512, 1))  # rows, requests
PARTS = ("begin", "layers", "logits", "end")
AT_LEAST = 15


def watching(layers: int, width: int, probes: int) -> Monitor:
    """Statistics of every pass, with as many probes read for all requests at every layer."""
    monitor = Monitor(layers, every=1)
    reads = [
        ProbeRead(probe, Place(layer, Site.RESID_POST), torch.nn.functional.normalize(torch.randn(width), dim=0))
        for probe in range(probes)
        for layer in range(layers)
    ]
    plan: Any = SimpleNamespace(probes=reads, probe_names=[f"probe-{i}@0" for i in range(probes)])
    monitor.watch_probes(plan)
    return monitor


def measure(monitor: Monitor, args: argparse.Namespace, rows: int, requests: int) -> dict[str, float]:
    layers, width, vocabulary = args.layers, args.width, args.vocabulary
    each = rows // requests
    prompt = 1 if each == 1 else rows
    batch = [Scheduled(str(i), prompt if each == 1 else 0, i * each, each) for i in range(requests)]
    for entry in batch:
        monitor.enter(entry.request_id, prompt)
    streams = [(torch.randn(rows, width).bfloat16(), torch.randn(rows, width).bfloat16()) for _ in range(layers + 1)]
    logits = torch.randn(requests, vocabulary).bfloat16()
    taken: dict[str, list[float]] = {part: [] for part in PARTS}
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(taken["end"]) < AT_LEAST:
        marks = [time.thread_time()]
        monitor.begin(batch, {})
        marks.append(time.thread_time())
        for layer in range(layers):
            monitor.see(Place(layer, Site.RESID_PRE), *streams[layer])
            monitor.see(Place(layer, Site.RESID_POST), *streams[layer + 1])
        marks.append(time.thread_time())
        monitor.see_logits(logits)
        marks.append(time.thread_time())
        monitor.end(())
        marks.append(time.thread_time())
        for part, a, b in zip(PARTS, marks, marks[1:], strict=False):
            taken[part].append(1000 * (b - a))
    for entry in batch:
        monitor.leave(entry.request_id)
    assert not monitor.drain("", {})["errors"]
    return {part: round(statistics.median(times), 3) for part, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each kind of pass")
    parser.add_argument("--name", default="monitor_pass", help="of the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load, results = round(os.getloadavg()[0], 1), []
    print(f"{'rows':>5} {'requests':>8}" + "".join(f" {part:>8}" for part in PARTS))
    with torch.inference_mode():
        for rows, requests in PASSES:
            monitor = watching(args.layers, args.width, args.probes)
            found = measure(monitor, args, rows, requests)
            print(f"{rows:5d} {requests:8d}" + "".join(f" {found[part]:8.3f}" for part in PARTS), flush=True)
            results.append({"rows": rows, "requests": requests, **found})
    shape = {name: getattr(args, name) for name in ("layers", "width", "vocabulary", "probes")}
    about = {"unit": "milliseconds of CPU time of one thread", "shape": shape, "load": load}
    print(f"written to {save(args.name, {**about, 'results': results})}")


if __name__ == "__main__":
    main()
