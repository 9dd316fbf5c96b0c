"""Where SmolLM2-135M-Instruct keeps the capitals of countries: `steersman trace` on a running server of it.

    python -m benchmarks.tracing [--server URL | --page]

with a server started as the README says. Recovery rates of the facts of clients/data/facts.jsonl whose set is recall,
layer by layer and in windows of nine, then layers and heads taken out for all of them. Writes
benchmarks/results/tracing.json, four pictures in docs/images and the measured part of docs/tracing.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from benchmarks.provenance import RESULTS, save

from steersman.clients.smollm2 import NAME
from steersman.clients.tracing_picture import ablation_png, recovery_png
from steersman.server import cli
from steersman.steering.tracing import Falls, Rates, Table

ROOT = Path(__file__).parents[1]
FACTS, IMAGES, PAGE = ROOT / "clients/data/facts.jsonl", ROOT / "docs/images", ROOT / "docs/tracing.md"
BEGIN, END = "<!-- measured: python -m benchmarks.tracing -->\n", "<!-- end -->\n"
WINDOW = 9
WORST = 5  # heads and layers that the page names


def measure(url: str) -> None:
    """Writes the result file and the pictures."""
    with TemporaryDirectory() as folder:
        base = Path(folder)
        recall = base / "capitals.jsonl"
        lines = FACTS.read_text(encoding="utf-8").splitlines()
        recall.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["set"] == "recall"))
        found: dict[str, Any] = {}
        for name, kind, file, options in (
            ("patch", "patch", recall, []),
            ("window", "patch", recall, ["--window", str(WINDOW), "--components", "attn", "mlp"]),
            ("layers", "layers", FACTS, ["--value", "mean"]),
            ("heads", "heads", FACTS, []),
        ):
            out, start = base / name, time.monotonic()
            cli.main(["trace", "--server", url, "--questions", str(file), "--out", str(out), "--kind", kind, *options])
            seconds = time.monotonic() - start
            written = out / ("trace.json" if kind == "patch" else "ablation.json")
            found[name] = {"seconds": seconds, **json.loads(written.read_text())}
    save("tracing", found)


def draw(found: Mapping[str, Any]) -> None:
    """The pictures."""
    for name, what in (("patch", "one layer"), ("window", f"windows of {WINDOW} layers")):
        rates = {c: {g: _rates(row) for g, row in by.items()} for c, by in found[name]["recovery_rates"].items()}
        table = Table(rates, found[name]["counts"], found[name]["questions"], found[name]["used"])
        (IMAGES / f"tracing-{name}.png").write_bytes(recovery_png(table, f"capitals, {NAME}, {what} put back"))
    for name in ("layers", "heads"):
        told = found[name]
        falls = {
            each: Falls(_rates(s["probability_lost"]), _rates(s["answers_lost"]), s["questions"], s["right"])
            for each, s in told["sets"].items()
        }
        title = f"{NAME}: probability lost with {told['settings']['value']} in place of each"
        (IMAGES / f"tracing-{name}.png").write_bytes(ablation_png(told["units"], falls, title))


def _rates(row: Sequence[float | None]) -> Rates:
    return np.array([math.nan if value is None else value for value in row])


def measured(found: Mapping[str, Any]) -> str:
    """The part of the page that comes from the result file."""
    about, patch = found["provenance"], found["patch"]
    made = (
        f"`python -m benchmarks.tracing`: {NAME} in bfloat16 on {about['cores']} cores of {about['cpu']}. "
        f"{patch['used']} of {patch['questions']} capitals count: noise on the country's name costs them at least "
        f"{patch['least']:g} of their probability. The {_runs(patch)} runs took {patch['seconds']:.0f} s."
    )
    lines = [made, ""]
    for name, what in (("patch", "One layer put back"), ("window", f"{WINDOW} layers around each put back together")):
        lines += [f"{what}:", "", _best(found[name]), "", f"![Recovery rates](images/tracing-{name}.png)", ""]
    for kind, what in (("layers", "attention and MLPs, mean in their place"), ("heads", "heads, zero in their place")):
        lines += [f"Taken out, {what} ({found[kind]['seconds']:.0f} s):", "", _worst(found[kind]), ""]
        lines += [f"![What is lost without {kind}](images/tracing-{kind}.png)", ""]
    return "\n".join(lines)


def _best(traced: Mapping[str, Any]) -> str:
    lines = ["| component | tokens | best layer | its recovery rate |", "|---|---|---|---|"]
    for component, by_group in traced["recovery_rates"].items():
        for group, row in by_group.items():
            known = {layer: rate for layer, rate in enumerate(row) if rate is not None}
            best = max(known, key=lambda layer: known[layer])
            lines.append(f"| {component} | {group.replace('_', ' ')} | {best} | {known[best]:.3f} |")
    return "\n".join(lines)


def _runs(patch: Mapping[str, Any]) -> int:
    cells = sum(len(row) * patch["counts"][c][g] for c, by in patch["recovery_rates"].items() for g, row in by.items())
    return int(cells) + 2 * int(patch["questions"])


def _worst(found: Mapping[str, Any]) -> str:
    lines = [
        "| set | answered rightly | most is lost without (layer:part, share of the probability) |",
        "|---|---|---|",
    ]
    for name, told in found["sets"].items():
        pairs = sorted(zip(told["probability_lost"], found["units"], strict=True), key=lambda p: -(p[0] or 0.0))
        worst = ", ".join(f"{layer}:{part} {lost:.2f}" for lost, (layer, part) in pairs[:WORST] if lost is not None)
        lines.append(f"| {name} | {told['right']} of {told['questions']} | {worst} |")
    return "\n".join(lines)


def page(text: str, found: Mapping[str, Any]) -> str:
    """The page with its measured part written anew."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + measured(found) + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL")
    parser.add_argument("--page", action="store_true", help="measure nothing: page and pictures from the result file")
    args = parser.parse_args()
    if not args.page:
        measure(args.server)
    found = json.loads((RESULTS / "tracing.json").read_text())
    draw(found)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
