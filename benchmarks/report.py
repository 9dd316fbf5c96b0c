"""Writes ``docs/benchmarks.md`` from the result files: no number is there that no file holds.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.provenance import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from the files in `benchmarks/results/`; each says with which command, machine,
versions and commit it was made. A ratio is that of a run and the run of the stock server next to it; a cell gives the
median over pairs and, in brackets, its 95 % interval (where a file has none, the lowest and the highest pair).
"""


def page(folder: Path = RESULTS) -> str:
    parts = [HEAD]
    parts += [_serving(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("serving*.json"))]
    for name, section in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(section(json.loads(path.read_text())))
        elif name == "kernels":
            parts.append("## Kernels on a GPU\n\nNot measured yet: `make gpu` on a machine with a CUDA GPU.\n")
    return "\n".join(parts)


def _serving(name: str, found: Mapping[str, Any]) -> str:
    s = found["settings"]
    options = "".join(
        f" --{o}" if value is True else f" --{o.replace('_', '-')} {value}"
        for o in ("shape", "compiled", "monitor", "fused_norm")
        if (value := s.get(o)) and value != "auto"
    )
    about = (
        f"`python -m benchmarks.serving{options} --name {name}`: {found['model']} on {_machine(found)}, "
        f"{s['pairs']} pairs, {s['prompts']} requests of {s['input_len']} + {s['output_len']} tokens, "
        f"{s['concurrency']} at once."
    )
    heads = {
        "output_throughput": "output tokens/s", "engine_cpu_s": "engine's processor time",
        "median_itl_ms": "inter-token latency, median", "p99_itl_ms": "p99", "median_ttft_ms": "time to first token",
    }  # fmt: skip
    figures = [f for f in heads if all(f in r for r in found["cases"].values())]
    rows = [[case, *(_spread(r[f]) for f in figures)] for case, r in found["cases"].items()]
    beside = "Statistics, against a server without" if s.get("monitor") else "Against stock vLLM"
    return f"## {beside}: {found['model']}\n\n{about}\n\n{table(['case', *(heads[f] for f in figures)], rows)}"


def _peers(found: Mapping[str, Any]) -> str:
    about = (
        f"`python -m benchmarks.peers`: one vector added at every layer of {found['model']} on {_machine(found)}, "
        f"{found['new_tokens']} new tokens, against {' and '.join(found['peers'])}. Cost: of "
        "steering, to each system's own unsteered rate."
    )
    rows = [
        [
            r["system"], r["batch"], f"{r['plain_tokens_per_second']:.0f}", f"{r['steered_tokens_per_second']:.0f}",
            f"{r['cost']:+.1%} ({r['spread'][0]:+.1%} to {r['spread'][1]:+.1%})",
        ]
        for r in found["results"]
    ]  # fmt: skip
    heads = ("system", "batch", "unsteered tokens/s", "steered tokens/s", "cost")
    return f"## Beside libraries for Hugging Face models\n\n{about}\n\n{table(heads, rows)}"


def _kernels(found: Mapping[str, Any]) -> str:
    about = f"`python -m benchmarks.kernels`: {found['device']}, {found['dtype']}, inside a CUDA graph."
    rows = [
        [
            r["kernel"], r["case"], r["width"], r["rows"], f"{r['microseconds']:.2f}",
            f"{r['bandwidth_of_copy']:.2f}" if "bandwidth_of_copy" in r else "",
        ]
        for r in found["results"]
    ]  # fmt: skip
    heads = ("kernel", "case", "width", "rows", "µs a place", "bandwidth, of a copy's")
    return f"## Kernels on a GPU\n\n{about}\n\n{table(heads, rows)}"


def _cpu_kernel(found: Mapping[str, Any]) -> str:
    about = (
        f"`python -m benchmarks.cpu_kernel`: microseconds a place, width {found['width']}, {found['dtype']}, "
        f"{found['threads']} thread(s), load {found['load']} of {_machine(found)}."
    )
    heads = ("program", "rows", "cpp", "torch", "x.add_()", "build")
    return f"## The CPU kernel\n\n{about}\n\n{table(heads, [[r[h] for h in heads] for r in found['results']])}"


def _extraction(found: Mapping[str, Any]) -> str:
    answers = found["answer_seconds"]
    return (
        "## Extraction on the server\n\n"
        f"`python -m benchmarks.extraction --pairs {found['pairs']}`: {found['model']} on {_machine(found)}. A job "
        f"with {found['pairs']} pairs, at all {found['layers']} layers, took {found['seconds']:.0f} s. A client that "
        f"asked for eight tokens at a time waited {answers['beside']:.2f} s meanwhile (median), "
        f"{answers['before']:.2f} s before.\n"
    )


def _actions(found: Mapping[str, Any]) -> str:
    s = found["settings"]
    about = (
        f"`python -m benchmarks.actions --pairs {s['pairs']} --actions {s['actions']}`: {found['model']} on "
        f"{_machine(found)}, {s['pairs']} pairs. Robots on openpi's WebSocket, two pictures of {s['picture']} × "
        f"{s['picture']} in every observation, the next one sent after the last answer; steered, {s['neurons']} "
        "neurons are set at all tokens. Medians over the runs; the ratio is within each pair. Fairness: the slowest "
        "robot's median latency to the fastest one's."
    )
    rows = []
    for r in found["results"]:
        for name in ("unsteered", "steered"):
            figures = [f"{median(r[name][f]):.2f}" for f in ("actions_per_second", "p50_ms", "p99_ms", "fairness")]
            ratio = _spread(r["p50_ms_ratio"]) if name == "steered" else ""
            rows.append([r["robots"], name, *figures, ratio])
    heads = ("robots", "", "actions/s", "p50, ms", "p99, ms", "fairness", "p50 to unsteered (goal: at most 1.02)")
    many = found["results"][-1]["robots"]
    below = (
        f"{many} robots at once, unsteered: {found['batching']:.2f} times the actions per second of one (goal: 4).\n"
    )
    return f"## Robots' actions\n\n{about}\n\n{table(heads, rows)}\n{below}"


def _machine(found: Mapping[str, Any]) -> str:
    about = found["provenance"]
    cpu = f"{about['cores']} cores of {about['cpu']}"
    device = found.get("device", "cpu")
    return cpu if device == "cpu" else f"{device}, {cpu}"


def _spread(figure: Mapping[str, Any]) -> str:
    low, high = figure.get("interval", figure["spread"])
    return f"{figure['median']:.3f} ({low:.3f} to {high:.3f})"


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [tuple(heads), *([str(c) for c in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


SECTIONS = {
    "peers": _peers, "kernels": _kernels, "cpu_kernel": _cpu_kernel, "extraction": _extraction, "actions": _actions,
}  # fmt: skip


def main() -> None:
    PAGE.write_text(page())
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
