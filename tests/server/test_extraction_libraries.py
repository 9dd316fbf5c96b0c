"""The extraction job beside the real repeng and steering-vectors: the same prompts, from texts to directions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.clients.convert import convert
from steersman.server import extraction
from steersman.server.engine.frontend import Frontend
from steersman.server.jobs import Progress
from steersman.server.routes.jobs import parse
from steersman.server.settings import Settings
from steersman.server.state import SteeringState
from steersman.steering.extraction import collect_hf, difference_of_means
from steersman.steering.sites import ModelInfo, Site
from tests.server.contrast import Captures
from tests.server.fakes import Workers, state_of
from tests.steering.foreign import DATA, FIELDS, LAYERS, D, expected, model

# The prompts that `tests/data/foreign/make.py` gave the libraries.
WORDS = ["the", "a", "cat", "dog", "sun", "rain", "is", "was", "very", "so", "happy", "sad", "glad", "angry", "warm"]
WORDS += ["cold", "calm", "loud", "day", "night", "good", "bad"]
PAIRS = [
    (f"{a} {b} {c} {d} {e} happy", f"{a} {b} {c} {d} {e} sad")
    for a, b, c, d, e in zip(WORDS, WORDS[1:], WORDS[6:], WORDS[3:], WORDS[9:], strict=False)
]
PAIRS += [(p.replace("happy", "glad"), n.replace("sad", "angry")) for p, n in PAIRS]
READ = range(LAYERS - 1)  # repeng reads Hugging Face's hidden states, of which the last has been normed
INFO = ModelInfo("tiny", "LlamaForCausalLM", LAYERS, D, 2, D // 2, {Site.RESID_POST: dict.fromkeys(range(LAYERS), D)})


class Words:
    """One token per word, no special ones."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + WORDS.index(word) for word in text.split()]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}


@pytest.fixture
def state(tmp_path: Path) -> SteeringState:
    return state_of(Frontend(Settings(store=str(tmp_path)), INFO, Words(), Workers()))


def job(state: SteeringState, method: str, layers: Sequence[int]) -> Tensor:
    """[L, d], what it stores."""
    pairs = [{"positive": positive, "negative": negative} for positive, negative in PAIRS]
    asked: dict[str, Any] = {"kind": "extract", "name": "x", "method": method, "layers": list(layers), "pairs": pairs}
    spec: Any = parse(json.dumps({**asked, "token": "last"}).encode())
    (ref,) = asyncio.run(extraction.run(spec, state, Captures(model()), Progress()))["assets"]
    return state.frontend.store.get(ref).tensors["vectors"]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.double(), b.double(), dim=-1)


def test_these_are_the_prompts_that_the_libraries_had() -> None:
    texts = [text for pair in PAIRS for text in pair]
    torch.testing.assert_close(collect_hf(model(), Words(), texts, READ, "last"), expected()["states"])


@pytest.mark.parametrize(("method", "library"), [("pca", "pca_diff"), ("pca_uncentred", "pca_center")])
def test_repeng(state: SteeringState, method: str, library: str) -> None:
    assert cosines(job(state, method, READ), expected()[f"repeng.{library}"]).min() >= 0.999


def test_the_file_that_repeng_wrote(state: SteeringState) -> None:
    wanted = convert(DATA / "repeng.gguf", FIELDS)
    rows = [wanted.meta.edited_layers.index(layer) for layer in READ[1:]]
    assert cosines(job(state, "pca", READ[1:]), wanted.tensors["vectors"][rows]).min() >= 0.999


def test_the_file_that_steering_vectors_wrote(state: SteeringState) -> None:
    """It hooks the blocks, so its last layer is the stream too: read here by our own hooks."""
    wanted = convert(DATA / "steering_vectors_decoder_block.pt", FIELDS)
    assert wanted.meta.edited_layers == (0, 2, 3)
    assert cosines(job(state, "mean_difference", [0, 2]), wanted.tensors["vectors"][:2]).min() >= 0.999
    sides = (collect_hf(model(), Words(), [pair[i] for pair in PAIRS], [3], "last") for i in (0, 1))
    assert cosines(difference_of_means(*sides), wanted.tensors["vectors"][2:]).min() >= 0.999
