"""French, from contrast texts to a recommended scale, on a running server of SmolLM2-135M-Instruct.

    python -m benchmarks.calibration [--server URL | --page]

with a server started as the README says. Extracts a direction by a job at every layer, compares it with the offline
extraction from Hugging Face's hidden states in float32, and calibrates it at three layers. Writes
benchmarks/results/calibration.json, docs/images/calibration.png and the measured part of docs/calibration.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from benchmarks.provenance import RESULTS, save

from steersman.clients.calibration import calibrate
from steersman.clients.calibration_picture import png
from steersman.clients.calibration_spec import Calibration, CalibrationSpec
from steersman.clients.directions import data
from steersman.clients.jobs import follow
from steersman.clients.sdk import Steersman
from steersman.clients.smollm2 import NAME, fetch
from steersman.clients.vector_assets import decode
from steersman.steering.extraction import collect_hf, difference_of_means

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "calibration.md"
BEGIN, END = "<!-- measured: python -m benchmarks.calibration -->\n", "<!-- end -->\n"
SPEC = CalibrationSpec.model_validate(
    {
        "vector": "french-measured",
        "prompts": data("prompts")["prompts"],
        "scorer": {"by": "lexicon", "name": "french"},
        "layers": [4, 12, 20],
        "target_kl": [0.1, 0.25, 0.5, 3.0],
        "min_standard_errors": 5.0,
        "instruction": "Answer in French.",
        "repetition_penalty": 1.15,
    }
)


class Steps:
    """Says how far it is."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def expect(self, total: int, unit: str) -> None:
        self.total = total

    def advance(self, count: int = 1) -> None:
        self.done += count
        print(f"{self.done} of {self.total} measurements", flush=True)


def offline() -> torch.Tensor:
    """[L, d], the same direction from Hugging Face in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch())
    model: Any = AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32).eval()
    layers, pairs = range(model.config.num_hidden_layers), data("french")["pairs"]
    sides = ([pair[side] for pair in pairs] for side in ("positive", "negative"))
    return difference_of_means(*(collect_hf(model, tokenizer, side, layers, "mean") for side in sides))


def extracted(server: Steersman) -> torch.Tensor:
    """[L, d], by a job of the server."""
    pairs = [{side: pair[side] for side in ("positive", "negative")} for pair in data("french")["pairs"]]
    job = {"kind": "extract", "name": SPEC.vector, "pairs": pairs, "licence": data("french")["licence"]}
    (ref,) = follow(server, job)["assets"]
    return torch.from_numpy(decode(json.loads(server.download(ref, "json"))["tensors"]["vectors"]).copy())


async def calibrated(url: str) -> Calibration:
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        return await calibrate(http, SPEC, Steps())


def measured(found: Mapping[str, Any]) -> str:
    """The part of the page that comes from the result file."""
    about, sweep = found["provenance"], found["calibration"]
    cosines = found["cosines"]
    best = sweep["cells"][sweep["recommended"]]
    made = (
        f"`python -m benchmarks.calibration`: {NAME} in bfloat16 on {about['cores']} cores of {about['cpu']}, "
        f"{len(sweep['unsteered_scores'])} prompts, {len(best['random']['by_seed'])} random directions."
    )
    same = (
        f"- Extraction by the server against the offline one in float32: cosine {min(cosines):.5f} at the worst of "
        f"{len(cosines)} layers, {max(cosines):.5f} at the best."
    )
    unsteered = (
        f"- Share of French words: unsteered {sweep['unsteered']:.3f}, asked for in words "
        f"(“{sweep['settings']['instruction']}”) {sweep['prompted']:.3f}."
    )
    chosen = (
        f"- Recommended: layer {best['layer']}, scale {best['scale']:.3f}: {best['effect']:.3f} with "
        f"{best['damage']:.3f} nats of damage, {_beaten(best['random'])} beyond the random directions."
    )
    heads = "| layer | nats wanted | scale found | damage | share of French | random directions | beaten by |"
    lines = [made, "", same, unsteered, chosen, "", heads, "|---|---|---|---|---|---|---|"]
    for cell in sweep["cells"]:
        control = cell["random"]
        random = f"{control['mean']:.3f} | {_beaten(control)}" if control else " | "
        lines.append(
            f"| {cell['layer']} | {cell['target_kl']:g} | {cell['scale']:.3f} | {cell['damage']:.3f} "
            f"| {cell['effect']:.3f} | {random} |"
        )
    return "\n".join([*lines, "", "![Effect and damage over the scale](images/calibration.png)", ""])


def page(text: str, found: Mapping[str, Any]) -> str:
    """The page with its measured part written anew."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + measured(found) + "\n" + END + rest.split(END)[1]


def _beaten(control: Mapping[str, Any]) -> str:
    by = control["beaten_by"]
    return "no spread" if by is None else f"{by:.1f} standard errors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the result file")
    args = parser.parse_args()
    if not args.page:
        measure(args.server)
    found = json.loads((RESULTS / "calibration.json").read_text())
    (DOCS / "images" / "calibration.png").write_bytes(png(Calibration.from_json(found["calibration"])))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"written to {PAGE}")


def measure(url: str) -> None:
    """Writes the result file."""
    torch.set_num_threads(1)  # the server works on the other cores
    with Steersman(url) as server:
        vectors = extracted(server)
    found = asyncio.run(calibrated(url))
    if found.best is None:
        raise SystemExit(found.refusal)
    cosines = torch.cosine_similarity(vectors, offline(), dim=1).tolist()
    save("calibration", {"cosines": cosines, "calibration": found.to_json()})


if __name__ == "__main__":
    main()
