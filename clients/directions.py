"""Two real directions of SmolLM2-135M-Instruct, from contrast texts that the project ships, as assets.

    python -m steersman.clients.directions [--out DIR] [NAME ...]

writes ``NAME.json`` files that ``steersman assets add`` and ``POST /v1/steering/assets`` take. Each is the difference
of the means of the texts' states at one layer, so scale 1 adds the mean difference itself. Layer and scales were chosen
by ``benchmarks/demo_search.py`` on the same questions that the demo asks.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.clients.scores import french_share, joy_score
from steersman.clients.smollm2 import NAME, fetch
from steersman.steering.extraction import collect_hf, difference_of_means


@dataclass(frozen=True)
class Direction:
    """A direction, how to see that it works, and the scales to show it at."""

    name: str
    score: Callable[[str], float]
    unit: str
    layer: int
    scales: tuple[float, ...]
    recommended: float


DIRECTIONS = {
    "french": Direction("french", french_share, "share of French words", 4, (0.5, 0.6, 0.8, 1.0), 0.8),
    "joyful": Direction("joyful", joy_score, "joyful less gloomy words per 100", 12, (1.0, 2.0, 2.5), 2.0),
}


def data(name: str) -> Any:
    """A JSON file that the package ships."""
    return json.loads((resources.files("steersman.clients") / "data" / f"{name}.json").read_text(encoding="utf-8"))


def build(folder: Path, names: Iterable[str], advance: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """[d] float32 for each name. ``advance`` is called once per text, of which each direction has ``texts(name)``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out: dict[str, Tensor] = {}
    for name in names:
        sides = []
        for side in ("positive", "negative"):
            states = []
            for pair in data(name)["pairs"]:
                states.append(collect_hf(model, tokenizer, [pair[side]], [DIRECTIONS[name].layer], "mean"))
                advance()
            sides.append(torch.cat(states))
        out[name] = difference_of_means(*sides)[0]
    return out


def texts(name: str) -> int:
    return 2 * len(data(name)["pairs"])


def asset(name: str, vector: Tensor, layer: int, n_layers: int, model: str = NAME, **fields: Any) -> dict[str, Any]:
    """The JSON of a vector asset that holds ``vector`` [d] at one layer."""
    array = vector.float().numpy().astype("<f4")
    encoded = {"dtype": "float32", "shape": [1, len(array)], "data": base64.b64encode(array.tobytes()).decode()}
    return {
        "name": name,
        "kind": "vector",
        "model": {"id": model, "n_layers": n_layers, "d_model": len(array)},
        "layers": [layer],
        "tensors": {"vectors": encoded},
        **fields,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *DIRECTIONS], metavar="NAME", help=", ".join(DIRECTIONS))
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    folder = fetch()
    n_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    for name, vector in build(folder, args.names or DIRECTIONS).items():
        d = DIRECTIONS[name]
        about = {
            "description": data(name)["description"],
            "licence": data(name)["licence"],
            "source": "difference of means over the contrast texts that Steersman ships",
            "recommended": {"scale": d.recommended, "how": "benchmarks/demo_search.py"},
        }
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(asset(name, vector, d.layer, n_layers, **about)) + "\n")
        print(path)


if __name__ == "__main__":
    main()
