"""Steered requests whose every logprob is known, one by one or as one batch, and comparing them."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.e2e.server import Server
from tests.models.tiny import VOCAB_SIZE
from tests.oracle.hf import AssetData, Oracle, PromptContext

TOLERANCE = 1e-3
EVERY = {"logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True, "return_token_ids": True}
WIDE = ["--dtype", "float32", "--max-model-len", "512", "--max-logprobs", "-1"]
"""Options of a server that tells every logprob."""

INJECT: dict[str, Any] = {
    "op": "inject",
    "recipe": {"inline": {
        "rr_attn": [0.4, 0.9, 0.2, 0.1], "rr_mlp": [0.3, 0.8, 0.5, 0.1], "lambda_a": 1.5, "lambda_m": -1.2,
        "sources": {"attn": [0, 1], "mlp": [0, 2]}, "targets": {"attn": [1, 2, 3], "mlp": [1, 3]},
    }},
}  # fmt: skip
"""Of a model of four layers."""

DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
"""Variables of a server whose scheduler can be paused."""


@dataclass(frozen=True)
class Answer:
    """One generated sequence."""

    prompt: list[int]
    new: list[int]
    logprobs: Tensor  # [len(ids) - 1, vocab] float32, row p: of the token after position p; NaN where not told
    body: dict[str, Any]  # the whole response

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.new

    @property
    def edited(self) -> list[int]:
        """Tokens edited, by intervention."""
        return [entry["tokens"] for entry in self.body["steering"]["interventions"]]

    @property
    def edited_in_cache(self) -> list[int]:
        return [entry["cached_tokens"] for entry in self.body["steering"]["interventions"]]

    @property
    def cached(self) -> int:
        """Prompt tokens taken from the prefix cache."""
        return int((self.body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def ask(
    server: Server, prompt: Sequence[int], steering: Any = None, new: int = 5, *, whole: bool = True, **body: Any
) -> Answer:
    """A greedy completion. ``whole``: with the prompt's logprobs too, for which vLLM computes all of it anew."""
    if whole:
        body["prompt_logprobs"] = VOCAB_SIZE
    answer = server.complete(list(prompt), steering, max_tokens=new, **EVERY, **body)
    return read(prompt, answer)


def read(prompt: Sequence[int], body: dict[str, Any], choice: int = 0) -> Answer:
    """One choice of a completion that was asked with ``EVERY``."""
    found = next(c for c in body["choices"] if c["index"] == choice)
    new = list(found["token_ids"])
    rows = [[float("nan")] * VOCAB_SIZE for _ in range(len(prompt) + len(new) - 1)]
    for row, entries in zip(rows, (found.get("prompt_logprobs") or [None])[1:], strict=False):
        for token, entry in entries.items():
            row[int(token)] = entry["logprob"]
    for row, entries in zip(rows[len(prompt) - 1 :], found["logprobs"]["top_logprobs"], strict=True):
        for name, value in entries.items():
            row[int(name.removeprefix("token_id:"))] = value
    logprobs = torch.tensor(rows, dtype=torch.float32)
    return Answer(list(prompt), new, logprobs, body)


# -- batches ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    prompt: Sequence[int]
    steering: Any = None
    new: int = 5
    label: str = ""
    model: str | None = None  # None: the served one


def together(server: Server, requests: Sequence[Asked], spacing: float = 0.03, **body: Any) -> list[Answer]:
    """The requests as one batch, in this order: they wait in a paused scheduler until all are there."""
    with ThreadPoolExecutor(len(requests)) as pool:
        with paused(server):
            waiting = []
            for r in requests:
                own = {**body, "model": r.model or server.model}
                waiting.append(pool.submit(ask, server, r.prompt, r.steering, r.new, **own))
                time.sleep(spacing)
            time.sleep(0.5)
        return [future.result() for future in waiting]


@contextmanager
def paused(server: Server) -> Iterator[None]:
    assert server.http.post("/pause", params={"mode": "keep"}).status_code == 200
    try:
        yield
    finally:
        assert server.http.post("/resume").status_code == 200


# -- comparing --------------------------------------------------------------------------------------


def difference(a: Tensor, b: Tensor) -> str | None:
    """Where two tables of logprobs differ in any bit, in words; None when nowhere."""
    if a.shape != b.shape:
        return f"{a.shape[0]} rows against {b.shape[0]}"
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return None
    rows = (~same).any(-1).nonzero().flatten().tolist()
    return f"rows {rows} differ, by up to {(a - b).abs().nan_to_num(0).max().item():.3g}"


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, of what both tell."""
    assert a.shape == b.shape, f"{a.shape[0]} rows against {b.shape[0]}"
    known = ~(a.isnan() | b.isnan())
    assert bool(known.any())
    return float((a - b)[known].abs().max())


def agree(answer: Answer, oracle: Oracle, steering: Any, label: str, context: PromptContext | None = None) -> None:
    """Every logprob that the server told is the oracle's."""
    wanted = oracle.logprobs(answer.ids, steering, len(answer.prompt), context)[:-1]
    error = distance(answer.logprobs, wanted)
    assert error < TOLERANCE, f"{label}: logprobs differ from the oracle's by {error:.3g}"


def matters(oracle: Oracle, answer: Answer, steering: Any, label: str) -> None:
    """The edit moves what the server told, so that an agreement shows something."""
    n = len(answer.prompt)
    moved = distance(oracle.logprobs(answer.ids, steering, n)[:-1], oracle.logprobs(answer.ids, None, n)[:-1])
    assert moved > 10 * TOLERANCE, f"{label}: the edit moves nothing, so this shows nothing"


# -- assets -----------------------------------------------------------------------------------------


def random_assets(oracle: Oracle, server: Server, seed: int = 7) -> None:
    """Random directions of every site, by the site's name, in the oracle and in the server's store."""
    model = server.http.get("/v1/steering/model").json()
    generator = torch.Generator().manual_seed(seed)
    about = {"id": model["model"], "n_layers": model["n_layers"], "d_model": model["d_model"]}
    for site, layers in model["sites"].items():
        width = model["widths"][site][str(layers[0])]
        common = {"kind": "vector", "site": site, "layers": layers, "model": about}
        for name, shape in ((site, (width,)), (f"{site}-other", (width,)), (f"{site}-plane", (2, width))):
            stacked = torch.randn(len(layers), *shape, generator=generator)
            oracle.assets[name] = AssetData("vector", site, dict(zip(layers, stacked, strict=True)))
            upload(server, {**common, "name": name}, {"vectors": stacked})


def upload(server: Server, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    packed = {
        name: {"dtype": "float32", "shape": list(t.shape), "data": base64.b64encode(t.numpy().tobytes()).decode()}
        for name, t in tensors.items()
    }
    response = server.post("/v1/steering/assets", {**metadata, "tensors": packed})
    assert response.status_code == 201, response.text


# -- what the server says of itself -----------------------------------------------------------------


def metric(server: Server, name: str) -> float:
    """The sum of a Prometheus metric over its labels."""
    lines = [line for line in server.rpc_stats().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    assert lines, f"no metric {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    """The JSON events of a stream, without its end mark."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(d) for d in data if d != "[DONE]"]
