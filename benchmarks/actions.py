"""How long a robot waits for its actions: one robot and sixteen at once, steered and not, through the real server.

    python -m benchmarks.actions [--model models/reach-v3] [--pairs 15] [--actions 40]

Every run of steered robots is next to one of unsteered robots, in alternating order, on the same server; what counts
is the ratio within each pair. Each robot has a WebSocket of its own (openpi's protocol) and sends observations that
are all different, so that no picture and no prompt has been seen before; its next one follows its last answer.

The steered robots set ten neurons at all tokens, as the paper does, and have a report in every answer. On a CPU
the engine computes on the first core, which nothing else uses; the HTTP process and the robots have the others.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from benchmarks.provenance import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from steersman.clients.robot import SocketRobot
from tests.e2e.server import Server, serve
from tests.models.tiny_llava import without_torchvision

CORES = sorted(os.sched_getaffinity(0))
FIRST = CORES[0]
ROBOTS = (1, 16)
NEURONS = 10
PICTURE = 64  # pixels
CAMERAS = ("observation/image", "observation/wrist_image")
FIGURES = ("actions_per_second", "p50_ms", "p99_ms", "fairness")


def steering(model: Mapping[str, Any]) -> dict[str, Any]:
    """``model``: as /v1/steering/model tells it."""
    widths = model["widths"]["mlp_post"]
    draw = np.random.default_rng(0)
    layers = draw.integers(model["n_layers"], size=NEURONS)
    named = [[int(layer), int(draw.integers(widths[str(layer)]))] for layer in layers]
    edit = {"op": "neurons", "neurons": {"inline": named}, "mode": "set", "value": 1.0, "tokens": "all"}
    return {"interventions": [edit]}


def observations(robot: int, about: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Endless ones, none like another. ``about``: the server's metadata."""
    draw = np.random.default_rng(robot)
    dims = 4
    while True:
        pictures = {
            name: draw.integers(0, 256, (PICTURE, PICTURE, 3), np.uint8) for name in CAMERAS[: about["cameras"]]
        }
        yield {**pictures, "observation/state": draw.normal(size=dims), "prompt": "reach the red ball"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models" / "reach-v3")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument(
        "--actions", type=int, default=40, help="answers of each robot in a run, and twice for one alone"
    )
    parser.add_argument("--name", default="actions", help="of the result file")
    args = parser.parse_args()
    console = Console()
    variables = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if not torch.cuda.is_available():
        variables["VLLM_CPU_OMP_THREADS_BIND"] = str(FIRST)
    with tempfile.TemporaryDirectory() as scratch:
        variables |= without_torchvision(Path(scratch) / "site")
        options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32"]
        with serve(args.model, Path(scratch), options, variables) as server:
            runs = _measured(server, args, console)
    results = [_summary(robots, pairs) for robots, pairs in runs.items()]
    one, many = (statistics.median(r["unsteered"]["actions_per_second"]) for r in results)
    settings = {"pairs": args.pairs, "actions": args.actions, "neurons": NEURONS, "picture": PICTURE}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"model": args.model.name, "device": device, "settings": settings, "load": os.getloadavg()[0]}
    path = save(args.name, {**about, "results": results, "batching": many / one})
    console.print(table(results))
    console.print(f"{ROBOTS[-1]} robots: {many / one:.2f} times the actions per second of one (goal: >= 4)")
    console.print(f"written to {path}")


def _measured(server: Server, args: Any, console: Console) -> dict[int, list[tuple[Any, Any]]]:
    """By number of robots, (unsteered, steered) results of each pair."""
    asked = steering(server.http.get("/v1/steering/model").json())
    for robots in ROBOTS:  # warm-up, not counted
        for given in (None, asked):
            run(server.url, robots, 10, given)
    found: dict[int, list[tuple[Any, Any]]] = {robots: [] for robots in ROBOTS}
    schedule = [(pair, robots) for pair in range(args.pairs) for robots in ROBOTS]
    for pair, robots in track(schedule, "measuring", console=console):
        turn = 1 if pair % 2 == 0 else -1  # who comes first
        each = args.actions * (2 if robots == 1 else 1)
        measured = [run(server.url, robots, each, given) for given in (None, asked)[::turn]]
        found[robots].append(tuple(measured[::turn]))  # type: ignore[arg-type]
    return found


def run(url: str, robots: int, each: int, asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """``each`` answers of every robot, all of them flying at once."""
    together = threading.Barrier(robots)
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(SocketRobot(url.replace("http", "ws"), steering=asked, timeout=60))
            for _ in range(robots)
        ]

        def fly(robot: int) -> tuple[float, list[float], float]:
            socket, latencies = sockets[robot], []
            seen = observations(robot + int(perf_counter() * 1e6) % 2**40, socket.metadata)
            together.wait(60)
            began = perf_counter()
            for _, observation in zip(range(each), seen, strict=False):
                sent = perf_counter()
                answer = socket.infer(observation)
                latencies.append(perf_counter() - sent)
                assert ("steering" in answer.about) == (asked is not None)
            return began, latencies, perf_counter()

        with ThreadPoolExecutor(robots) as pool:
            flights = list(pool.map(fly, range(robots)))
    began, ended = min(f[0] for f in flights), max(f[2] for f in flights)
    every = np.concatenate([f[1] for f in flights])
    medians = [statistics.median(f[1]) for f in flights]
    return {
        "actions_per_second": robots * each / (ended - began),
        "p50_ms": 1e3 * float(np.quantile(every, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(every, 0.99)),
        "fairness": max(medians) / min(medians),
    }


def _summary(robots: int, pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"robots": robots}
    for i, name in enumerate(("unsteered", "steered")):
        out[name] = {figure: [pair[i][figure] for pair in pairs] for figure in FIGURES}
    for figure in ("p50_ms", "p99_ms", "actions_per_second"):
        ratios = [steered[figure] / plain[figure] for plain, steered in pairs]
        out[f"{figure}_ratio"] = {"median": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
    return out


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    out = Table("robots", "", "actions/s", "p50 ms", "p99 ms", "fairness", "p50, ratio to unsteered", "goal")
    for r in results:
        for name in ("unsteered", "steered"):
            figures = [statistics.median(r[name][figure]) for figure in FIGURES]
            row = [str(r["robots"]), name, *(f"{figure:.2f}" for figure in figures)]
            ratio = r["p50_ms_ratio"]
            low, high = ratio["spread"]
            row += [f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})", "<= 1.02"] if name == "steered" else ["", ""]
            out.add_row(*row)
    return out


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, CORES[1:] or CORES)  # the server inherits it
    torch.set_num_threads(1)
    main()
