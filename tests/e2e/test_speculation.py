"""Drafts are edited like the tokens that they may become, and one that is rejected leaves nothing behind.

An n-gram drafter, prompts that repeat themselves, and steering that does not let the model do so everywhere: drafts
are accepted and rejected, which the test makes sure of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, Answer, Asked, agree, ask, matters, metric, random_assets, together
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
DRAFTS = '{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3,"prompt_lookup_min":1}'
PROMPT = [1, *([40, 51, 62, 73] * 5), 40]
LENGTH, NEW = len(PROMPT), 40
ADD = {"op": "add", "vector": "resid_post", "scale": 1.5, "layers": [1, 2]}
GATE = {"vector": "resid_post-other", "site": "resid_post", "layer": 0, "measure": "projection"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--speculative-config", DRAFTS]
    with serve(path, tmp_path_factory.mktemp("drafts"), options, env=DEVELOPER, forked=True) as server:
        oracle = Oracle(path, {})
        random_assets(oracle, server)
        yield server, oracle
        drafted, accepted = (metric(server, f"vllm:spec_decode_num_{w}_tokens_total") for w in ("draft", "accepted"))
        assert 0 < accepted < drafted, f"{accepted} of {drafted} drafts were accepted, so this shows nothing"


SELECTORS: list[tuple[Any, int]] = [
    ("all", LENGTH + NEW - 1), ("generated", NEW - 1), ({"generated": True, "last": 1}, NEW),
    ({"positions": [LENGTH, LENGTH + 3, LENGTH + 7, LENGTH + 20]}, 4), ({"ranges": [[LENGTH + 2, LENGTH + 30]]}, 28),
    ({"exclude": {"ranges": [[LENGTH, LENGTH + 25]]}}, LENGTH + NEW - 26),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "count"), SELECTORS, ids=str)
def test_selectors(served: tuple[Server, Oracle], tokens: Any, count: int) -> None:
    server, oracle = served
    for edit in (ADD, {"op": "ablate", "vector": "mlp_post", "site": "mlp_post"}):
        steering = {"interventions": [{**edit, "tokens": tokens}]}
        label = f"{edit['op']}, {tokens}"
        answer = ask(server, PROMPT, steering, NEW)
        check(oracle, answer, steering, label)
        matters(oracle, answer, steering, label)
        assert answer.edited == [count], f"{label}: edited tokens"


def test_selected_ids(served: tuple[Server, Oracle]) -> None:
    """Which token a position holds is known for a draft when it is fed in."""
    server, oracle = served
    common = ask(server, PROMPT, None, NEW).new
    wanted = {"token_ids": [common[5], common[6], 40]}
    steering = {"interventions": [{**ADD, "scale": 0.3, "tokens": wanted}]}
    answer = ask(server, PROMPT, steering, NEW)
    check(oracle, answer, steering, str(wanted))
    count = sum(token in wanted["token_ids"] for token in answer.ids[:-1])
    assert answer.edited == [count], "edited tokens"


@pytest.mark.parametrize("over", ["token", "hold", "prompt_mean", "last_prompt"])
def test_gates(served: tuple[Server, Oracle], over: str) -> None:
    """A held gate that a rejected draft would have opened stays closed: its threshold is crossed late, if at all."""
    server, oracle = served
    for above in (-2.0, 0.0, 1.0, 2.0, 2.5, 3.0, 4.0):
        when: dict[str, Any] = {**GATE, "above": above} | ({"hold": True} if over == "hold" else {"over": over})
        steering = {"interventions": [{**ADD, "tokens": "generated", "when": when}]}
        check(oracle, ask(server, PROMPT, steering, NEW), steering, f"{over} above {above}")


def test_probes(served: tuple[Server, Oracle]) -> None:
    """Each position counts once, with the token that was accepted there."""
    server, oracle = served
    steering = {"interventions": [{**ADD, "tokens": "generated"}], "probes": [{"vector": "resid_post", "layers": [2]}]}
    answer = ask(server, PROMPT, steering, NEW)
    check(oracle, answer, steering, "with a probe")
    v = oracle.assets["resid_post"].layers[2]
    stream = oracle.capture(answer.ids[:-1], [(2, "resid_post")], steering, LENGTH)[2, "resid_post"]
    values = stream @ (v / v.norm())
    wanted = {
        "tokens": len(values),
        "mean": values.mean(),
        "min": values.min(),
        "max": values.max(),
        "last": values[-1],
    }
    found = answer.body["steering"]["probes"][0]["layers"]["2"]
    assert found == pytest.approx({k: float(x) for k, x in wanted.items()}, abs=1e-3)


def test_together(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    batch = [
        Asked(PROMPT[: LENGTH - i], {"interventions": [{**ADD, "tokens": tokens}]}, NEW - 3 * i, str(tokens))
        for i, (tokens, _) in enumerate(SELECTORS)
    ]
    hold = {**ADD, "tokens": "generated", "when": {**GATE, "above": 2.0, "hold": True}}
    batch += [Asked(PROMPT, None, NEW, "unsteered"), Asked(PROMPT, {"interventions": [hold]}, NEW, "held")]
    for request, answer in zip(batch, together(server, batch), strict=True):
        check(oracle, answer, request.steering, request.label)


def check(oracle: Oracle, answer: Answer, steering: Any, label: str) -> None:
    agree(answer, oracle, steering, label)
    n = len(answer.prompt)
    greedy = oracle.logprobs(answer.ids, steering, n)[n - 1 : -1].argmax(-1).tolist()
    assert answer.new == greedy, f"{label}: tokens {answer.new}, not {greedy}"
