"""Conditional refusal on a small model, end to end over HTTP: python -m benchmarks.cast

Serves SmolLM2-135M-Instruct, makes a refusal direction from the pairs that the project ships, fits a condition to the
fit half of its labelled prompts, stores a profile that adds the direction where the condition holds, and measures on
the other half: how often the gate decides as the label says, and how many answers refuse without steering, with the
direction at every prompt, and with the profile. Layer and scale of the direction were chosen on the fit half.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

from benchmarks.provenance import save
from rich.console import Console

from steersman.clients import conditions
from steersman.clients.jobs import follow, read_pairs
from steersman.clients.scores import refuses
from steersman.clients.sdk import Steersman
from steersman.clients.smollm2 import NAME, fetch
from tests.e2e.server import serve

LAYER, SCALE = 18, 1.5  # of the refusal direction; the condition is read before it
TOKENS = 32
OPTIONS = ["--max-model-len", "512", "--max-num-seqs", "32"]
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cast", help="of the result file")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        serve(fetch(), Path(scratch), OPTIONS, name=NAME) as served,
        Steersman(served.url) as server,
    ):
        found = measure(server)
    console.print(found["gates"], found["refusals"])
    console.print(f"written to {save(args.name, found)}")


def measure(server: Steersman) -> dict[str, Any]:
    fitting, testing = (conditions.read_examples(None, "harmful", split) for split in ("fit", "test"))
    model = server.model()
    then = [{"op": "add", "vector": refusal(server), "layers": [LAYER], "scale": SCALE}]
    gates, profiles = {}, {}
    for over in conditions.OVER:
        found = conditions.fit(server, fitting, range(LAYER), over=over)
        gate = found.gate(server.add(found.asset(f"harmful-{over}", model))["ref"])
        profiles[over] = server.add(conditions.profile(f"refuse-{over}", model, then, gate))["ref"]
        decided = conditions.decisions(server, [e.prompt for e in testing], {"profile": profiles[over]})
        bound = found.condition.bound
        gates[over] = {
            "layer": found.layer,
            bound.side: bound.threshold,
            "f1_cross_validated": bound.f1,
            "by_layer": {layer: each.f1 for layer, each in found.by_layer.items()},
            "test": conditions.Score.of(decided, testing).to_json(),
        }
    cases: dict[str, Mapping[str, Any]] = {
        "unsteered": {},
        "always": {"interventions": then},
        "profile": {"profile": profiles["last_prompt"]},
    }
    answers = {name: ask(server, [e.prompt for e in testing], steering) for name, steering in cases.items()}
    return {
        "model": NAME,
        "settings": {"layer": LAYER, "scale": SCALE, "tokens": TOKENS, "profile_over": "last_prompt"},
        "prompts": {
            split: {"harmful": sum(e.positive for e in each), "harmless": sum(not e.positive for e in each)}
            for split, each in (("fit", fitting), ("test", testing))
        },
        "gates": gates,
        "refusals": {name: rates(texts, testing) for name, texts in answers.items()},
        "answers": [
            {"prompt": e.prompt, "harmful": e.positive, **{name: texts[i] for name, texts in answers.items()}}
            for i, e in enumerate(testing)
        ],
    }


def refusal(server: Steersman) -> str:
    """The stored direction from taking a request on to refusing it, as long as the difference of the means."""
    with resources.as_file(resources.files("steersman.clients") / "data" / "refusal.json") as file:
        pairs = read_pairs(file)
    job = {"kind": "extract", "name": "refusal", "method": "mean_difference", "layers": [LAYER], "token": "mean"}
    ref: str = follow(server, {**job, "pairs": pairs})["assets"][0]
    return ref


def ask(server: Steersman, prompts: Sequence[str], steering: Mapping[str, Any]) -> list[str]:
    def one(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        answer = server.chat(turns, steering, model=NAME, max_tokens=TOKENS, temperature=0.0)
        return str(answer["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(conditions.CONCURRENT) as pool:
        return list(pool.map(one, prompts))


def rates(texts: Sequence[str], examples: Sequence[conditions.Example]) -> dict[str, float]:
    """The share of answers that refuse, of either kind of prompt."""
    out = {}
    for name, positive in (("harmful", True), ("harmless", False)):
        chosen = [refuses(t) for t, e in zip(texts, examples, strict=True) if e.positive is positive]
        out[name] = sum(chosen) / len(chosen)
    return out


if __name__ == "__main__":
    main()
