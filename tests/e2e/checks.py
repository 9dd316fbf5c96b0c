"""What holds wherever a model's layers run: compiled, in CUDA graphs, on several ranks. Against the oracle."""

from __future__ import annotations

from typing import Any

from tests.e2e.server import Server
from tests.e2e.steered import INJECT, Asked, agree, ask, matters, together
from tests.e2e.test_oracle import interventions
from tests.oracle.hf import SITES, Oracle

PROMPT = [1, 40, 51, 62, 73, 84, 95, 106, 117, 128, 139, 31]
ADD = {"op": "add", "vector": "resid_post", "scale": 2.0, "layers": [2, 3]}
GATE = {"vector": "mlp_post", "site": "mlp_post", "layer": 1, "measure": "projection", "above": 0.0}


def check(server: Server, oracle: Oracle, steering: Any, label: str) -> None:
    """The edit is the oracle's, and it shows."""
    answer = ask(server, PROMPT, steering)
    agree(answer, oracle, steering, label)
    matters(oracle, answer, steering, label)


def ops(server: Server, oracle: Oracle, site: str) -> None:
    """Every op at a site, and nothing left of them afterwards."""
    for i, edit in enumerate(interventions(site, [0, 1, 2, 3])):
        check(server, oracle, {"interventions": [edit]}, f"{site} #{i} {edit['op']}")
    agree(ask(server, PROMPT), oracle, None, f"unsteered after edits at {site}")


def selectors_and_gates(server: Server, oracle: Oracle) -> None:
    fields: list[dict[str, Any]] = [
        {"tokens": "prompt"}, {"tokens": "generated"}, {"tokens": {"positions": [3, -1, 14]}}, {"when": GATE},
        {"when": {**GATE, "hold": True}}, {"when": {**GATE, "over": "prompt_mean", "above": -5.0}},
        {"when": {**GATE, "over": "last_prompt", "above": -5.0}},
    ]  # fmt: skip
    for extra in fields:
        steering = {"interventions": [{**ADD, **extra}], "probes": [{"vector": "attn_z"}]}
        answer = ask(server, PROMPT, steering)
        agree(answer, oracle, steering, str(extra))
        seen = answer.body["steering"]["probes"][0]["layers"]
        assert [layer["tokens"] for layer in seen.values()] == [len(PROMPT) + 4] * 4, f"{extra}: probed tokens"


def gates(server: Server, oracle: Oracle) -> None:
    """In one batch, and with probes; injections with probes as well."""
    fields: list[dict[str, Any]] = [{}, {"measure": "cosine", "below": 0.3}, {"over": "last_prompt", "above": -5.0}]
    asked = [{"interventions": [{**ADD, "when": {**GATE, **extra}}]} for extra in fields]
    batch = [Asked(PROMPT[: 6 + i], steering, 5, str(steering)) for i, steering in enumerate(asked)]
    for request, answer in zip(batch, together(server, batch), strict=True):
        agree(answer, oracle, request.steering, request.label)
    for steering in [*asked, {"interventions": [INJECT]}]:
        probed = {**steering, "probes": [{"vector": "resid_post"}]}
        agree(answer := ask(server, PROMPT, probed), oracle, probed, str(steering))
        seen = answer.body["steering"]["probes"][0]["layers"]
        assert {layer["tokens"] for layer in seen.values()} == {len(PROMPT) + 4}, f"{steering}: probed tokens"


def a_mixed_batch(server: Server, oracle: Oracle) -> None:
    """Also where the batch is larger than what graphs were made for."""
    batch = []
    for i, site in enumerate(SITES):
        chosen = interventions(site, [1, 3])[i : i + 3]
        batch += [Asked(PROMPT[: 5 + i], {"interventions": [e]}, 3 + i, f"{e['op']} at {site}") for e in chosen]
        batch.append(Asked(PROMPT[: 5 + i], None, 4, "unsteered"))
    batch += [
        Asked(PROMPT[:7], {"interventions": [INJECT]}, 5, "injection"),
        Asked(PROMPT, {"interventions": [{**INJECT, "tokens": "all"}, ADD]}, 4, "injection and an add"),
    ]
    for request, answer in zip(batch, together(server, batch), strict=True):
        agree(answer, oracle, request.steering, request.label)
