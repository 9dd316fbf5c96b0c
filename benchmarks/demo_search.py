"""Which direction recipe, layer and scales the demo should use, measured with Hugging Face on SmolLM2-135M-Instruct.

    python benchmarks/demo_search.py [--threads 1] [--quick]

Two parts, both greedy with a repetition penalty, 40 new tokens, the chat template, v added at `resid_post` of one
layer to all tokens, v = the raw difference of means (scale 1.0 is the mean difference itself):
- sweep: recipe x layer x scale, 6 prompts. Recipes are the text alone or after its templated question ("raw", "chat"),
  mean over the text's tokens.
- confirm: the chosen settings on all 12 held-out prompts and on the first 6, beside three random directions of the
  same norm, in float32; and the direction in bfloat16, as the server runs it.
"distinct" is the share of distinct word pairs of an answer, averaged: low means that the text loops.
About 20 minutes on one core. `--quick` leaves the sweep out and keeps the one in the file, which is
docs/results/demo_search.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.clients.scores import french_share, joy_score
from steersman.clients.smollm2 import NAME, fetch
from steersman.steering.extraction import collect_hf, decoder_blocks, difference_of_means

OUT = Path(__file__).parent.parent / "docs" / "results" / "demo_search.json"
NEW_TOKENS, REPETITION_PENALTY, RANDOM_SEEDS = 40, 1.15, (0, 1, 2)


@dataclass(frozen=True)
class Case:
    name: str
    score: Callable[[str], float]
    sweep_layers: tuple[int, ...]
    sweep_scales: tuple[float, ...]
    recipe: str  # the chosen settings, from here on
    layer: int
    scales: tuple[float, ...]


CASES = (
    Case("french", french_share, (4, 12, 21), (0.4, 0.6, 0.8, 1.0), "raw-mean", 4, (0.5, 0.6, 0.8, 1.0)),
    Case("joyful", joy_score, (4, 12, 20), (0.5, 1.0, 1.5, 2.0), "raw-mean", 12, (0.5, 1.0, 2.0, 2.5)),
)
RECIPES = ("raw-mean", "chat-mean")
console = Console()


class Bench:
    """The model in one dtype, and how it is asked."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.layers = range(len(decoder_blocks(self.model)))

    def template(self, question: str) -> str:
        turns = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def direction(self, name: str, recipe: str) -> Tensor:
        """[n_layers, d] float32, raw difference of means."""
        pairs = data(name)["pairs"]
        form, token = recipe.split("-")
        prompts = [self.template(pair["prompt"]) for pair in pairs] if form == "chat" else None
        sides = [
            collect_hf(self.model, self.tokenizer, [pair[side] for pair in pairs], self.layers, token, prompts)
            for side in ("positive", "negative")
        ]
        return difference_of_means(sides[0], sides[1])

    @torch.inference_mode()
    def answers(self, prompts: Sequence[str], layer: int, add: Tensor) -> list[str]:
        """Greedy answers with `add` [d] put on `layer`'s output at every token, the sum rounded once."""

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited = (hidden.float() + add).to(hidden.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = decoder_blocks(self.model)[layer].register_forward_hook(hook)
        try:
            texts = [self.template(prompt) for prompt in prompts]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            out = self.model.generate(
                **batch, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=REPETITION_PENALTY
            )
        finally:
            handle.remove()
        return list(self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def data(name: str) -> Any:
    return json.loads((resources.files("steersman.clients") / "data" / f"{name}.json").read_text(encoding="utf-8"))


def distinct_pairs(text: str) -> float:
    words = text.split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def sweep(bench: Bench, case: Case, prompts: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for recipe in RECIPES:
        v = bench.direction(case.name, recipe)
        for layer in case.sweep_layers:
            texts = [bench.answers(prompts, layer, scale * v[layer]) for scale in case.sweep_scales]
            rows.append(
                {
                    "recipe": recipe,
                    "layer": layer,
                    "norm": round(float(v[layer].norm()), 2),
                    "scales": case.sweep_scales,
                    "score": [mean([case.score(text) for text in answer]) for answer in texts],
                    "distinct": [mean([distinct_pairs(text) for text in answer]) for answer in texts],
                }
            )
            console.print(case.name, rows[-1])
    return rows


def confirm(bench: Bench, half: Bench, case: Case, prompts: Sequence[str]) -> dict[str, Any]:
    v = bench.direction(case.name, case.recipe)[case.layer]

    def curve(bench: Bench, direction: Tensor, scales: Sequence[float], keep_texts: bool = False) -> dict[str, Any]:
        texts = [bench.answers(prompts, case.layer, scale * direction) for scale in scales]
        scored = [[case.score(text) for text in answer] for answer in texts]
        row: dict[str, Any] = {
            "scales": scales,
            "score": [mean(each) for each in scored],
            "score_first_6": [mean(each[:6]) for each in scored],
            "distinct": [mean([distinct_pairs(text) for text in answer]) for answer in texts],
        }
        console.print(case.name, row)
        return {**row, "texts": texts} if keep_texts else row

    result: dict[str, Any] = {
        "recipe": case.recipe,
        "layer": case.layer,
        "norm": round(float(v.norm()), 2),
        "direction": curve(bench, v, (0.0, *case.scales), keep_texts=True),
        "direction_bfloat16": curve(half, v, (0.0, *case.scales)),
        "random": [],
    }
    for seed in RANDOM_SEEDS:
        r = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
        result["random"].append({"seed": seed, **curve(bench, r * (v.norm() / r.norm()), case.scales)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only confirm the chosen settings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    folder = fetch()
    bench, half = Bench(folder, torch.float32), Bench(folder, torch.bfloat16)
    prompts = data("prompts")["prompts"]
    results: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8")) if args.quick and OUT.is_file() else {}
    results |= {
        "model": NAME,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "settings": {"new_tokens": NEW_TOKENS, "repetition_penalty": REPETITION_PENALTY, "tokens": "all"},
        "prompts": prompts,
    }
    results["confirm"] = {case.name: confirm(bench, half, case, prompts) for case in CASES}
    if not args.quick:
        results["sweep"] = {case.name: sweep(bench, case, prompts[:6]) for case in CASES}
    results["seconds"] = round(time.monotonic() - start)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    console.print(f"{OUT} written after {results['seconds']} s")


if __name__ == "__main__":
    main()
