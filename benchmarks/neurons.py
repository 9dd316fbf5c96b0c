"""Time and memory of ``steersman neurons label`` on a checkpoint of OpenVLA's shapes with random weights.

python -m benchmarks.neurons [--layers N]

Writes ``benchmarks/results/neurons.json``. Memory does not grow with the layers and time does in proportion, so a few
of the 32 say what all take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.provenance import save
from safetensors.torch import save_file

D_MODEL, D_FF, VOCABULARY, LAYERS = 4096, 11008, 32064, 32


def build(folder: Path, layers: int) -> None:
    """The matrices that labels are made from, in bfloat16, with a tokenizer of as many tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    weights = {"language_model.lm_head.weight": draw(VOCABULARY, D_MODEL)}
    weights["language_model.model.embed_tokens.weight"] = draw(VOCABULARY, D_MODEL)
    for i in range(layers):
        weights[f"language_model.model.layers.{i}.mlp.down_proj.weight"] = draw(D_MODEL, D_FF)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(folder, args.layers)
        command = [sys.executable, "-m", "steersman.server.cli", "neurons", "label", str(folder), "--out"]
        started, before = time.monotonic(), _children_cpu()
        done = subprocess.run([*command, str(folder / "out")], capture_output=True, text=True, check=True)
        wall, cpu = time.monotonic() - started, _children_cpu() - before
    print(done.stdout, end="")
    peak = float(done.stdout.rpartition(" GiB")[0].rpartition(" ")[2])
    results = {"layers": args.layers, "of": LAYERS, "wall_s": wall, "cpu_s": cpu, "peak_gib": peak}
    print(save("neurons", {"shape": [D_MODEL, D_FF, VOCABULARY], "threads": torch.get_num_threads(), **results}))


def _children_cpu() -> float:
    """Seconds of processor time of ended children."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
