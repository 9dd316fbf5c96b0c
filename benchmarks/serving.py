"""What steering costs, end to end: ``vllm bench serve`` against stock vLLM and against Steersman, in pairs.

Both servers run at once, and every run of a case is next to a run of the stock server, in alternating
order; what counts is the ratio within each pair. A result is the median of the pairs' ratios, with an interval that
holds it in 95 of 100 resamplings of the pairs: on a noisy machine many short pairs (``--minutes``) say more than a few
long ones. Beside the clock's, there is a ratio of processor time: of what the busiest process of each server, its
engine, has used for the same tokens, which others on the machine disturb far less. The file is written after every
round. The client is vLLM's own (``vllm.benchmarks.serve``); only
the ``steering`` field is added to its requests.

    python -m benchmarks.serving [--model DIR] [--pairs 5] [--cases idle,all_layers] [--compiled]
    python -m benchmarks.serving --cases idle,all_layers --prompts 16 --minutes 12
    python -m benchmarks.serving --shape llama-3.1-8b --concurrency 64 --name serving_llama_8b    # on a GPU

    python -m benchmarks.serving --monitor --name serving_monitor

With ``--monitor`` both servers are Steersman's: one with statistics of every layer and eight probes read for all
requests, the other with ``--steering-monitor off``; no request is steered.

On a CPU each engine computes on the first core, which nothing else uses; the rest of both servers, and the client, have
the other cores.

A shape is a model with random weights (:mod:`benchmarks.shapes`). On a GPU both servers are in vLLM's default mode:
compiled, with CUDA graphs; on a CPU both run eagerly unless ``--compiled`` is said. ``--fused-norm`` is Steersman's
``--steering-fused-norm``.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from benchmarks.processes import cpu_seconds
from benchmarks.provenance import made, save
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
FEATURES = 64
DICTIONARY = "bench-dictionary"
FIGURES = ("output_throughput", "median_itl_ms", "p99_itl_ms", "median_ttft_ms", "engine_cpu_s", "cpu_s")
RESAMPLED = 10_000
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
    feature = {"op": "feature", "dictionary": DICTIONARY, "index": list(range(32)), "mode": "set", "value": 1.0}
    plans: dict[str, list[Any]] = {
        "idle": [None],
        "one_layer": [[add(0, layers[len(layers) // 2])]],
        "all_layers": [[add(0)]],
        "three_vectors": [[add(i) for i in range(3)]],
        f"plans_{PLANS}": [[add(i)] for i in range(PLANS)],
        f"plans_{MANY}": [[{**add(i % PLANS), "scale": 0.5 + i / MANY}] for i in range(MANY)],
        "ablate_all_layers": [[edit("ablate", 0)]],
        "ablate_clamp_three_sites": [streams],
        "neurons_32": [[{"op": "neurons", "neurons": neurons, "mode": "set", "value": 1.0}]],
        "features_32": [[feature]],
        "inject": [[{"op": "inject", "recipe": {"inline": recipe(len(layers))}}]],
    }
    return {
        name: [None if edits is None else {"interventions": edits} for edits in turn] for name, turn in plans.items()
    }


def recipe(n_layers: int) -> dict[str, Any]:
    """Random recovery rates for the op ``inject``, with the strengths that the paper has for LLaVA-1.5-7B."""
    rates = np.random.default_rng(0).uniform(0, 1, (2, n_layers))
    return {"rr_attn": rates[0].tolist(), "rr_mlp": rates[1].tolist(), "lambda_a": 0.26, "lambda_m": 0.16}


CPU_GOALS = {"monitor": 0.99, "idle": 0.995, "all_layers": 0.98, "inject": 0.98}
GPU_GOALS = {
    "monitor": 0.99,
    "idle": 0.995, "all_layers": 0.99, "three_vectors": 0.985, f"plans_{MANY}": 0.98, "ablate_clamp_three_sites": 0.975,
    "neurons_32": 0.98, "features_32": 0.98, "inject": 0.98,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=int, default=5, help="of runs, for each case")
    parser.add_argument("--minutes", type=float, default=0, help="more pairs than that, until so much time has passed")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--cases", type=lambda s: s.split(","))
    parser.add_argument("--compiled", action="store_true", help="torch.compile on, in both servers")
    parser.add_argument("--monitor", action="store_true", help="what monitoring costs, and nothing else")
    parser.add_argument("--shape", choices=SHAPES, help="a model with random weights instead of --model")
    parser.add_argument("--memory", type=float, default=0.42, help="of the GPU's, for each server")
    parser.add_argument("--fused-norm", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--name", default="serving", help="of the result file")
    parser.add_argument("--resume", action="store_true", help="do nothing where this commit's file is complete")
    args = parser.parse_args()
    console = Console()
    if args.resume and made(args.name):
        console.print(f"{args.name} has been measured")
        return
    with tempfile.TemporaryDirectory() as scratch:
        tmp = Path(scratch)
        args.model = args.model or (checkpoint(args.shape, tmp) if args.shape else _smollm2())
        beside = tmp / "beside"
        baseline = serve_ours(args, beside, UNMONITORED, _variables()) if args.monitor else _stock(args, beside)
        more = [*(MONITORED if args.monitor else ()), "--steering-fused-norm", args.fused_norm]
        with baseline as stock, serve_ours(args, tmp / "ours", more, _variables()) as ours:
            every = cases(upload(ours))
            if args.monitor:
                every = {"monitor": [None]}
            chosen = {k: v for k, v in every.items() if not args.cases or k in args.cases}
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            settings = {k: v for k, v in vars(args).items() if k not in ("model", "cases", "name", "resume")}
            found: dict[str, Any] = {"model": args.model.name, "device": device, "settings": settings}
            for runs, complete in _run(args, stock, ours, chosen, console):
                found["settings"]["pairs"] = min(map(len, runs.values()))
                found |= {"complete": complete, "cases": {case: summary(pairs) for case, pairs in runs.items()}}
                path = save(args.name, found)
    console.print(table(found["cases"], CPU_GOALS if device == "cpu" else GPU_GOALS))
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
    """Ratios to stock: medians, and their intervals in brackets."""
    out = Table("case", "pairs", "output tokens/s", "goal", "engine's processor time", "median ITL", "TTFT")
    for case, r in results.items():
        goal = goals.get(case)
        tokens, cpu, itl, ttft = (
            _told(r[figure]) for figure in ("output_throughput", "engine_cpu_s", "median_itl_ms", "median_ttft_ms")
        )
        out.add_row(case, str(r["pairs"]), tokens, "" if goal is None else f">= {goal}", cpu, itl, ttft)
    return out


def _told(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['median']:.3f} ({low:.3f} - {high:.3f})"


def _run(
    args: argparse.Namespace, stock: Server, ours: Server, chosen: Mapping[str, list[Any]], console: Console
) -> Iterator[tuple[dict[str, list[tuple[Any, Any]]], bool]]:
    """(stock, case) results of the pairs so far, after each round; whether it was the last one."""
    for server, steering in ((stock, [None]), (ours, [None]), *((ours, s) for s in chosen.values())):
        _bench(args, server, steering, prompts=args.concurrency)  # warm-up, not counted
    runs: dict[str, list[tuple[Any, Any]]] = {case: [] for case in chosen}
    start = time.monotonic()
    for pair in itertools.count():
        for index, (case, steering) in track(list(enumerate(chosen.items())), f"round {pair + 1}", console=console):
            order = [(stock, [None]), (ours, steering)]
            turn = 1 if (pair + index) % 2 == 0 else -1  # who comes first, in turn within each case
            measured = [_bench(args, *what) for what in order[::turn]]
            runs[case].append(tuple(measured[::turn]))  # type: ignore[arg-type]
        passed = time.monotonic() - start
        last = pair + 1 >= args.pairs and passed * (pair + 2) / (pair + 1) >= 60 * args.minutes
        yield runs, last
        if last:
            return


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
            "--temperature", "0", "--ready-check-timeout-sec", "0",
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
    before = cpu_seconds(server.process.pid)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = asyncio.run(bench.main_async(given))
    finally:
        bench.get_samples = plain
    if result["failed"] if "failed" in result else result["completed"] != (prompts or args.prompts):
        raise SystemExit(f"requests failed: {result.get('errors')}")
    used = {pid: seconds - before.get(pid, 0.0) for pid, seconds in cpu_seconds(server.process.pid).items()}
    return {**result, "engine_cpu_s": max(used.values()), "cpu_s": sum(used.values())}


def summary(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Of the (stock, steersman) figures of each pair."""
    out: dict[str, Any] = {"pairs": len(pairs)}
    for figure in FIGURES:
        ratios = [ours[figure] / stock[figure] for stock, ours in pairs]
        out[figure] = {
            "median": statistics.median(ratios),
            "interval": interval(ratios),
            "spread": [min(ratios), max(ratios)],
            "ratios": ratios,
            "stock": [stock[figure] for stock, _ in pairs],
            "steersman": [ours[figure] for _, ours in pairs],
        }
    return out


def interval(ratios: Sequence[float]) -> list[float]:
    """Where the median lies in 95 of 100 resamplings (percentile bootstrap)."""
    drawn = np.random.default_rng(0).choice(np.asarray(ratios), (RESAMPLED, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return [float(low), float(high)]


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
    httpx.post(f"{server.url}/v1/steering/assets", json=_dictionary(model, rng)).raise_for_status()
    return model


def _dictionary(model: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A JumpReLU autoencoder of the middle layer's stream, random, with as many features as are asked for and more."""
    n, d = model["n_layers"], model["d_model"]
    tensors = {
        "encoder": rng.standard_normal((FEATURES, d)) / d**0.5, "decoder": rng.standard_normal((FEATURES, d)) / d**0.5,
        "b_enc": np.zeros(FEATURES), "b_dec": np.zeros(d), "threshold": np.full(FEATURES, 0.5),
    }  # fmt: skip
    return {
        "name": DICTIONARY, "kind": "dictionary", "architecture": "jumprelu", "layer": n // 2,
        "model": {"id": model["model"], "n_layers": n, "d_model": d},
        "tensors": {
            name: {
                "dtype": "float32", "shape": list(t.shape), "data": base64.b64encode(t.astype("<f4").tobytes()).decode()
            }
            for name, t in tensors.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, CORES[1:] or CORES)  # the servers inherit it
    torch.set_num_threads(1)  # the client's own threads would fight the servers' for the cores
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main()
