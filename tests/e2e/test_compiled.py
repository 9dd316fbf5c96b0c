"""With torch.compile the same edits reach the same places: nothing is folded away, reordered or traced out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, Asked, agree, ask, matters, together
from tests.e2e.test_oracle import assets, interventions
from tests.models.tiny import tiny_model
from tests.oracle.hf import SITES, Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PROMPT = [1, 40, 51, 62, 73, 84, 95, 106, 117, 128, 139, 31]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--no-enforce-eager"]
    with serve(path, tmp_path_factory.mktemp("compiled"), options, env=DEVELOPER) as server:
        oracle = Oracle(path, {})
        assets(oracle, server, server.http.get("/v1/steering/model").json())
        yield server, oracle


def test_it_is_compiled(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    log = server.log.read_text(errors="replace")
    assert "enforce_eager=False" in log
    assert "AOT compil" in log, "nothing was compiled, so this module shows nothing"
    agree(ask(server, PROMPT), oracle, None, "unsteered")


@pytest.mark.parametrize("site", SITES)
def test_ops(served: tuple[Server, Oracle], site: str) -> None:
    server, oracle = served
    for i, edit in enumerate(interventions(site, [0, 1, 2, 3])):
        steering = {"interventions": [edit]}
        label = f"{site} #{i} {edit['op']}"
        answer = ask(server, PROMPT, steering)
        agree(answer, oracle, steering, label)
        matters(oracle, answer, steering, label)
    agree(ask(server, PROMPT), oracle, None, f"unsteered after edits at {site}")


def test_selectors_and_gates(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    add = {"op": "add", "vector": "resid_post", "scale": 2.0, "layers": [2, 3]}
    gate = {"vector": "mlp_post", "site": "mlp_post", "layer": 1, "measure": "projection", "above": 0.0}
    fields: list[dict[str, Any]] = [
        {"tokens": "prompt"}, {"tokens": "generated"}, {"tokens": {"positions": [3, -1, 14]}}, {"when": gate},
        {"when": {**gate, "hold": True}}, {"when": {**gate, "over": "prompt_mean", "above": -5.0}},
        {"when": {**gate, "over": "last_prompt", "above": -5.0}},
    ]  # fmt: skip
    for extra in fields:
        steering = {"interventions": [{**add, **extra}], "probes": [{"vector": "attn_z"}]}
        answer = ask(server, PROMPT, steering)
        agree(answer, oracle, steering, str(extra))
        seen = answer.body["steering"]["probes"][0]["layers"]
        assert [layer["tokens"] for layer in seen.values()] == [len(PROMPT) + 4] * 4, f"{extra}: probed tokens"


def test_a_mixed_batch(served: tuple[Server, Oracle]) -> None:
    """Also where the batch is larger than what the graphs were warmed up with."""
    server, oracle = served
    batch = []
    for i, site in enumerate(SITES):
        chosen = interventions(site, [1, 3])[i : i + 3]
        batch += [Asked(PROMPT[: 5 + i], {"interventions": [e]}, 3 + i, f"{e['op']} at {site}") for e in chosen]
        batch.append(Asked(PROMPT[: 5 + i], None, 4, "unsteered"))
    for request, answer in zip(batch, together(server, batch), strict=True):
        agree(answer, oracle, request.steering, request.label)
