"""What steering costs, end to end: ``vllm bench serve`` against stock vLLM and against Steersman, in pairs.

Both servers run at once, and every run of a case is next to a run of the stock server, in alternating
order; what counts is the ratio within each pair. The client is vLLM's own (``vllm.benchmarks.serve``); only
the ``steering`` field is added to its requests.

    python -m benchmarks.serving [--model DIR] [--pairs 5] [--cases idle,all_layers] [--compiled]
    python -m benchmarks.serving --shape llama-3.1-8b --concurrency 64 --name serving_llama_8b    # on a GPU

    python -m benchmarks.serving --monitor --name serving_monitor

With ``--monitor`` both servers are Steersman's: one with statistics of every layer and eight probes read for all
requests, the other with ``--steering-monitor off``; no request is steered.

On a CPU each engine computes on the first core, which nothing else uses; the rest of both servers, and the client, have
the other cores.

A shape is a model with random weights (:mod:`benchmarks.shapes`). On a GPU both servers are in vLLM's default mode:
compiled, with CUDA graphs; on a CPU both run eagerly unless ``--compiled`` is said.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from benchmarks.provenance import save
from benchmarks.shapes import SHAPES, checkpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.e2e.server import Server, serve

NAME = "bench"
CORES = sorted(os.sched_getaffinity(0))
FIRST = CORES[0]
PLANS = 16
MANY = 256
MONITORED = ["--steering-monitor-probes", ",".join(f"bench-{i}" for i in range(8))]
UNMONITORED = ["--steering-monitor", "off"]


def cases(model: Mapping[str, Any]) -> dict[str, list[Any]]:
    """For each case the steering objects that its requests take in turn. ``model``: as /v1/steering/model tells it."""
    layers = list(range(model["n_layers"]))

    def edit(op: str, index: int, at: Any = "all", **fields: Any) -> dict[str, Any]:
        return {"op": op, "vector": f"bench-{index}", "layers": at, **fields}

    def add(index: int, at: Any = "all") -> dict[str, Any]:
        return edit("add", index, at, scale=0.5)

    streams = [
        edit(op, i, site=site, **fields)
        for i, (op, fields) in enumerate((("ablate", {}), ("clamp", {"min": -1, "max": 1})))
        for site in ("resid_pre", "resid_mid", "resid_post")
    ]
    neurons = {"inline": [[layer, 7 * i] for layer in layers for i in range(32)]}
    plans = {
        "idle": [None],
        "one_layer": [[add(0, layers[len(layers) // 2])]],
        "all_layers": [[add(0)]],
        "three_vectors": [[add(i) for i in range(3)]],
        f"plans_{PLANS}": [[add(i)] for i in range(PLANS)],
        f"plans_{MANY}": [[{**add(i % PLANS), "scale": 0.5 + i / MANY}] for i in range(MANY)],
        "ablate_all_layers": [[edit("ablate", 0)]],
        "ablate_clamp_three_sites": [streams],
        "neurons_32": [[{"op": "neurons", "neurons": neurons, "mode": "set", "value": 1.0}]],
        "inject": [[{"op": "inject", "recipe": {"inline": recipe(len(layers))}}]],
    }
    return {
        name: [None if edits is None else {"interventions": edits} for edits in turn] for name, turn in plans.items()
    }


def recipe(n_layers: int) -> dict[str, Any]:
    """Random recovery rates for the op ``inject``, with the strengths that the paper has for LLaVA-1.5-7B."""
    rates = np.random.default_rng(0).uniform(0, 1, (2, n_layers))
    return {"rr_attn": rates[0].tolist(), "rr_mlp": rates[1].tolist(), "lambda_a": 0.26, "lambda_m": 0.16}


CPU_GOALS = {"monitor": 0.99, "idle": 0.99, "all_layers": 0.97, "inject": 0.98}
GPU_GOALS = {
    "monitor": 0.99,
    "idle": 0.995, "all_layers": 0.99, "three_vectors": 0.985, f"plans_{MANY}": 0.98, "ablate_clamp_three_sites": 0.975,
    "neurons_32": 0.98, "inject": 0.98,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--cases", type=lambda s: s.split(","))
    parser.add_argument("--compiled", action="store_true", help="torch.compile on, in both servers")
    parser.add_argument("--monitor", action="store_true", help="what monitoring costs, and nothing else")
    parser.add_argument("--shape", choices=SHAPES, help="a model with random weights instead of --model")
    parser.add_argument("--memory", type=float, default=0.42, help="of the GPU's, for each server")
    parser.add_argument("--name", default="serving", help="of the result file")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        tmp = Path(scratch)
        args.model = args.model or (checkpoint(args.shape, tmp) if args.shape else _smollm2())
        beside = tmp / "beside"
        baseline = serve_ours(args, beside, UNMONITORED, _variables()) if args.monitor else _stock(args, beside)
        with baseline as stock, serve_ours(args, tmp / "ours", MONITORED if args.monitor else (), _variables()) as ours:
            every = cases(upload(ours))
            if args.monitor:
                every = {"monitor": [None]}
            chosen = {k: v for k, v in every.items() if not args.cases or k in args.cases}
            runs = _run(args, stock, ours, chosen, console)
    results = {case: _summary(pairs) for case, pairs in runs.items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "cases", "name")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = save(args.name, {"model": args.model.name, "device": device, "settings": settings, "cases": results})
    console.print(table(results, CPU_GOALS if device == "cpu" else GPU_GOALS))
    console.print(f"written to {path}")


def _smollm2() -> Path:
    from steersman.clients.smollm2 import fetch

    return fetch()


def _options(args: argparse.Namespace) -> list[str]:
    longest = max(2048, args.input_len + args.output_len + 64)
    common = ["--max-model-len", str(longest), "--max-num-seqs", str(max(64, args.concurrency))]
    common += ["--no-enable-prefix-caching"]  # else a case's prompts are there from the case before
    if args.shape:
        common += ["--load-format", "dummy"]
    if torch.cuda.is_available():
        return [*common, "--gpu-memory-utilization", str(args.memory)]
    return [*common, "--no-enforce-eager" if args.compiled else "--enforce-eager"]


def _variables() -> dict[str, str]:
    return {} if torch.cuda.is_available() else {"VLLM_CPU_OMP_THREADS_BIND": str(FIRST)}


def table(results: Mapping[str, Any], goals: Mapping[str, float]) -> Table:
    out = Table("case", "output tok/s, ratio to stock", "spread of pairs", "median ITL ratio", "TTFT ratio", "goal")
    for case, r in results.items():
        goal = goals.get(case)
        low, high = r["output_throughput"]["spread"]
        out.add_row(
            case,
            f"{r['output_throughput']['median']:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{r['median_itl_ms']['median']:.3f}",
            f"{r['median_ttft_ms']['median']:.3f}",
            "" if goal is None else f">= {goal}",
        )
    return out


def _run(
    args: argparse.Namespace, stock: Server, ours: Server, chosen: Mapping[str, list[Any]], console: Console
) -> dict[str, list[tuple[Any, Any]]]:
    """(stock, case) results of each pair."""
    for server, steering in ((stock, [None]), (ours, [None]), *((ours, s) for s in chosen.values())):
        _bench(args, server, steering, prompts=args.concurrency)  # warm-up, not counted
    runs: dict[str, list[tuple[Any, Any]]] = {case: [] for case in chosen}
    schedule = list(itertools.product(range(args.pairs), enumerate(chosen.items())))
    for pair, (index, (case, steering)) in track(schedule, "measuring", console=console):
        order = [(stock, [None]), (ours, steering)]
        turn = 1 if (pair + index) % 2 == 0 else -1  # who comes first, in turn within each case
        measured = [_bench(args, *what) for what in order[::turn]]
        runs[case].append(tuple(measured[::turn]))  # type: ignore[arg-type]
    return runs


def _bench(args: argparse.Namespace, server: Server, steering: list[Any], prompts: int | None = None) -> dict[str, Any]:
    """One run of vLLM's own serving benchmark."""
    from vllm.benchmarks import serve as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    bench.add_cli_args(parser)
    given = parser.parse_args(
        [
            "--backend", "openai", "--base-url", server.url, "--model", NAME, "--tokenizer", str(args.model),
            "--dataset-name", "random", "--random-input-len", str(args.input_len),
            "--random-output-len", str(args.output_len), "--num-prompts", str(prompts or args.prompts),
            "--max-concurrency", str(args.concurrency), "--ignore-eos", "--disable-tqdm", "--seed", "0",
            "--temperature", "0",
        ]
    )  # fmt: skip
    turn = itertools.cycle(steering)
    plain = bench.get_samples

    def with_steering(*a: Any, **k: Any) -> Any:
        samples = plain(*a, **k)
        for sample in samples:
            if (asked := next(turn)) is not None:
                sample.request_overrides = {"steering": {**asked, "report": "summary"}}
        return samples

    bench.get_samples = with_steering
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = asyncio.run(bench.main_async(given))
    finally:
        bench.get_samples = plain
    if result["failed"] if "failed" in result else result["completed"] != (prompts or args.prompts):
        raise SystemExit(f"requests failed: {result.get('errors')}")
    return result


def _summary(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"pairs": len(pairs)}
    for figure in ("output_throughput", "median_itl_ms", "p99_itl_ms", "median_ttft_ms"):
        ratios = [ours[figure] / stock[figure] for stock, ours in pairs]
        out[figure] = {
            "median": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "ratios": ratios,
            "stock": [stock[figure] for stock, _ in pairs],
            "steersman": [ours[figure] for _, ours in pairs],
        }
    return out


@contextlib.contextmanager
def serve_ours(
    args: Any, tmp: Path, more: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """``args``: the command line's. ``more``: further options."""
    tmp.mkdir()
    with serve(args.model, tmp, [*_options(args), *more], variables, NAME) as server:
        yield server


@contextlib.contextmanager
def _stock(args: Any, tmp: Path) -> Iterator[Server]:
    """vLLM's own server, with no plugin loaded."""
    tmp.mkdir()
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model)]
    variables = {"VLLM_PLUGINS": "none", **_variables()}
    with serve(args.model, tmp, _options(args), variables, NAME, command=module) as server:
        yield server


def upload(server: Server) -> dict[str, Any]:
    """Random unit directions for every layer; what the server says of its model."""
    model: dict[str, Any] = server.http.get("/v1/steering/model").json()
    n, d = model["n_layers"], model["d_model"]
    rng = np.random.default_rng(0)
    for i in range(PLANS):
        v = rng.standard_normal((n, d)).astype("<f4")
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        body = {
            "name": f"bench-{i}", "kind": "vector", "layers": list(range(n)),
            "model": {"id": model["model"], "n_layers": n, "d_model": d},
            "tensors": {
                "vectors": {"dtype": "float32", "shape": [n, d], "data": base64.b64encode(v.tobytes()).decode()}
            },
        }  # fmt: skip
        httpx.post(f"{server.url}/v1/steering/assets", json=body).raise_for_status()
    return model


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, CORES[1:] or CORES)  # the servers inherit it
    torch.set_num_threads(1)  # the client's own threads would fight the servers' for the cores
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main()
