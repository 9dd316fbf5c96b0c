"""Side by side with what steers Hugging Face models: repeng's and steering-vectors' hooks in ``generate``.

    python -m benchmarks.peers [--rounds 5] [--batches 1,16]

One random vector is added at every layer of SmolLM2, in bfloat16, to the same prompts; greedy, the same number of new
tokens. Each system is also run unsteered, the two in turns: ``cost`` is the unsteered rate over the steered one, minus
one, the median over rounds. The two libraries are taken from PyPI into ``.cache/peers``, without what they depend on.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.provenance import save
from benchmarks.serving import serve_ours, upload
from rich.console import Console
from rich.progress import track
from rich.table import Table

from steersman.clients.smollm2 import fetch

PEERS = ("repeng==0.4.0", "steering-vectors==0.12.2")
FOLDER = Path(__file__).parents[1] / ".cache" / "peers"
SCALE = 0.5
PROMPTS = [f"Tell me about the number {i}, in a few words: {i} is" for i in range(16)]

Run = Callable[[int], float]
"""(batch size) -> new tokens a second."""


def peers() -> None:
    """Makes the libraries importable, behind everything that is installed."""
    if not FOLDER.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
        subprocess.run([*pip, *PEERS], check=True)
    sys.path.append(str(FOLDER))


class Generation:
    """Hugging Face's ``generate`` over a fresh copy of the model."""

    def __init__(self, folder: Path, new: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.new = new
        n, d = self.model.config.num_hidden_layers, self.model.config.hidden_size
        vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        self.vectors = vectors / vectors.norm(dim=1, keepdim=True)

    @torch.inference_mode()
    def run(self, batch: int) -> float:
        inputs = self.tokenizer(PROMPTS[:batch], return_tensors="pt", padding=True)
        start = time.perf_counter()
        out = self.model.generate(**inputs, do_sample=False, min_new_tokens=self.new, max_new_tokens=self.new)
        seconds = time.perf_counter() - start
        assert out.shape[1] == inputs["input_ids"].shape[1] + self.new
        return batch * self.new / seconds


@contextmanager
def repeng(generation: Generation) -> Iterator[None]:
    control = importlib.import_module("repeng.control")
    wrapped = control.ControlModel(generation.model, range(len(generation.vectors)))
    wrapped.set_raw_control({i: (SCALE * v).bfloat16() for i, v in enumerate(generation.vectors)})
    try:
        yield
    finally:
        wrapped.unwrap()


@contextmanager
def steering_vectors(generation: Generation) -> Iterator[None]:
    library = importlib.import_module("steering_vectors")
    vector = library.SteeringVector(dict(enumerate(generation.vectors.bfloat16())))
    with vector.apply(generation.model, multiplier=SCALE):
        yield


def over_http(server: Any, new: int, steering: Any) -> Run:
    def one(prompt: str) -> None:
        server.complete(prompt, steering, max_tokens=new)

    def run(batch: int) -> float:
        with ThreadPoolExecutor(batch) as pool:
            start = time.perf_counter()
            list(pool.map(one, PROMPTS[:batch]))
            return batch * new / (time.perf_counter() - start)

    return run


def measure(plain: Run, steered: Run, batch: int, rounds: int) -> dict[str, Any]:
    for run in (plain, steered):
        run(batch)
    pairs = []
    for i in range(rounds):
        order = (plain, steered) if i % 2 == 0 else (steered, plain)
        rates = [run(batch) for run in order]
        pairs.append(tuple(rates if i % 2 == 0 else rates[::-1]))
    costs = [a / b - 1 for a, b in pairs]
    return {
        "batch": batch,
        "plain_tokens_per_second": statistics.median(a for a, _ in pairs),
        "steered_tokens_per_second": statistics.median(b for _, b in pairs),
        "cost": statistics.median(costs),
        "spread": [min(costs), max(costs)],
    }


def hooked(generation: Generation, hooks: Callable[[Generation], Any]) -> Run:
    def run(batch: int) -> float:
        with hooks(generation):
            return generation.run(batch)

    return run


def table(results: Sequence[dict[str, Any]]) -> Table:
    out = Table("system", "batch", "unsteered tok/s", "steered tok/s", "cost", "spread")
    for r in results:
        low, high = r["spread"]
        rates = (f"{r['plain_tokens_per_second']:.0f}", f"{r['steered_tokens_per_second']:.0f}")
        out.add_row(r["system"], str(r["batch"]), *rates, f"{r['cost']:+.1%}", f"{low:+.1%} to {high:+.1%}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=lambda s: [int(n) for n in s.split(",")], default=[1, 16])
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    args = parser.parse_args()
    peers()
    folder, console = fetch(), Console()
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        serving = SimpleNamespace(
            model=folder, concurrency=max(args.batches), input_len=64, output_len=args.new,
            shape=None, compiled=False, memory=0.4,
        )  # fmt: skip
        server = stack.enter_context(serve_ours(serving, tmp / "ours"))
        upload(server)
        generation = Generation(folder, args.new)
        steering = {"interventions": [{"op": "add", "vector": "bench-0", "scale": SCALE, "layers": "all"}]}
        systems: dict[str, tuple[Run, Run]] = {
            "steersman": (over_http(server, args.new, None), over_http(server, args.new, steering)),
            "transformers + repeng": (generation.run, hooked(generation, repeng)),
            "transformers + steering-vectors": (generation.run, hooked(generation, steering_vectors)),
        }
        todo = [(name, batch) for name in systems for batch in args.batches]
        results = [
            {"system": name, **measure(*systems[name], batch, args.rounds)}
            for name, batch in track(todo, "measuring", console=console)
        ]
    path = save("peers", {"model": folder.name, "peers": PEERS, "new_tokens": args.new, "results": results})
    console.print(table(results))
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
