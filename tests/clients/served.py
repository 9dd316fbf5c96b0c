"""A served model that is a formula, behind the routes that calibration asks.

The stream is d wide; whatever is added along axis 0 makes an answer French: its share of French words is a step
function of that. The next token is one of two, whose odds move with the square of what is added along any axis.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np

D = 64
GAIN = {1: 1.0, 3: 0.25}  # by layer: what adding along axis 0 does to answers
REF = "french@0123456789ab"


class Served:
    def __init__(self, **changes: Any) -> None:
        rows = np.zeros((2, D), np.float32)
        rows[:, 0] = 2.0
        data = base64.b64encode(rows.tobytes()).decode()
        self.asset: dict[str, Any] = {
            "name": "french", "kind": "vector", "site": "resid_post", "layers": [1, 3],
            "model": {"id": "m", "n_layers": 4, "d_model": D}, "provenance": {"method": "mean_difference"},
            "tensors": {"vectors": {"dtype": "float32", "shape": [2, D], "data": data}}, **changes,
        }  # fmt: skip
        self.stored: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.edited = 5  # tokens that an edit is reported to have edited
        self.odds = 1.0  # how much an edit moves the next tokens
        self.predicted = 3  # tokens of a text that have something before them
        self.reach = 1.0  # how much it moves the answers

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(self))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content) if request.content else {}
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if path == "/v1/steering/assets" and request.method == "POST":
            self.stored.append(body)
            return httpx.Response(201, json={"ref": "french@fedcba987654"})
        if path.startswith("/v1/steering/assets/"):
            whole = request.url.params.get("format") == "json"
            return httpx.Response(200, json=self.asset if whole else {"ref": REF})
        self.asked.append(body)
        assert body["steering"]["default"] is False
        assert body["model"] == "m"
        edits = body["steering"]["interventions"]
        layer, added = self._added(edits[0]) if edits else (1, np.zeros(D))
        choice = self._chat(body, layer, added) if "messages" in body else self._completion(body, layer, added)
        told = [{"tokens": self.edited} for _ in edits]
        return httpx.Response(200, json={"choices": [choice], "steering": {"interventions": told}, **choice})

    def _added(self, edit: Mapping[str, Any]) -> tuple[int, np.ndarray]:
        (layer,) = edit["layers"]
        given = self.asset["tensors"]["vectors"] if edit["vector"] == REF else edit["vector"]["inline"]
        rows = np.frombuffer(base64.b64decode(given["data"]), np.float32).reshape(-1, D)
        return layer, edit["scale"] * rows[self.asset["layers"].index(layer) if edit["vector"] == REF else 0]

    def _chat(self, body: Mapping[str, Any], layer: int, added: np.ndarray) -> dict[str, Any]:
        question = body["messages"][0]["content"]
        push = self.reach * GAIN[layer] * float(added[0]) + 0.1 * (len(question) % 3)
        if "please" in question:
            push += 0.5
        french = min(max(round(10 * push), 0), 10)
        text = " ".join(["bonjour"] * french + ["hello"] * (10 - french))
        p = 1 / (1 + math.exp(3 - 4 * push))
        tops = [{"token": "Oui", "logprob": math.log(p)}, {"token": "Yes", "logprob": math.log(1 - p)}]
        ids = {"prompt_token_ids": [5, 6], "token_ids": [0] * (body["max_tokens"] if "nothing" not in question else 0)}
        return {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": tops}]}, **ids}

    def _completion(self, body: Mapping[str, Any], layer: int, added: np.ndarray) -> dict[str, Any]:
        """p of token 0 is a half, moved by the squared length of what is added."""
        p = 0.5 / (1 + self.odds * float((added**2).sum()))
        told = {"0": {"logprob": math.log(p)}, "1": {"logprob": math.log(1 - p)}}
        return {"prompt_logprobs": [None, *[told] * self.predicted]}


def kl(length: float) -> float:
    """What adding a vector of this length does to the next tokens, in nats."""
    p = 0.5 / (1 + length**2)
    return 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
