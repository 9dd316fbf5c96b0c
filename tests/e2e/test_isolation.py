"""What a request is answered depends on its own steering alone, bit for bit.

vLLM's float32 kernels on the CPU are batch-invariant, which the first test makes sure of: so a request in
a batch is compared with the same request run alone, and no difference in a single bit is excused.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server import Server, serve
from tests.e2e.steered import (
    DEVELOPER,
    INJECT,
    WIDE,
    Answer,
    Asked,
    agree,
    ask,
    difference,
    distance,
    random_assets,
    together,
)
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OPTIONS = [*WIDE, "--max-num-seqs", "64"]
STOCK = ["-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--model"]
SITES = ("resid_post", "resid_pre", "attn_z", "mlp_post", "resid_mid", "attn_out", "mlp_out")


def prompts(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    chance = random.Random(seed)
    return [[1, *(chance.randrange(8, 512) for _ in range(chance.randrange(3, longest)))] for _ in range(count)]


def numbers(answer: Answer) -> list[dict[str, float]]:
    """What its probes have read, layer by layer."""
    probes = answer.body["steering"].get("probes") or []
    return [statistics for probe in probes for statistics in probe["layers"].values()]


def plain(count: int, seed: int) -> list[Asked]:
    return [Asked(p, new=3 + i % 5, label=f"unsteered {i}") for i, p in enumerate(prompts(count, seed))]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What vLLM answers where Steersman is not loaded."""
    path, folder = tiny_model("llama"), tmp_path_factory.mktemp("stock")
    env = {**DEVELOPER, "VLLM_PLUGINS": ""}
    with serve(path, folder, OPTIONS, env=env, command=[*STOCK, str(path)]) as server:
        assert server.http.get("/v1/steering/model").status_code == 404, "the plugin is loaded"
        return together(server, plain(8, seed=1))


@pytest.fixture(scope="module")
def served(stock: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    """Started when the stock server has ended."""
    path = tiny_model("llama")
    with serve(path, tmp_path_factory.mktemp("served"), OPTIONS, env=DEVELOPER) as server:
        oracle = Oracle(path, {})
        random_assets(oracle, server)
        yield server, oracle


def test_vllm_is_batch_invariant(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    asked = plain(33, seed=2)
    for request, answer in zip(asked[:8], together(server, asked), strict=False):
        assert_same(answer, ask(server, request.prompt, new=request.new), f"{request.label}, in a batch and alone")


def test_idle_identity(served: tuple[Server, Oracle], stock: list[Answer]) -> None:
    """With nothing steered, vLLM with the plugin tells what it tells without, before and after steering something."""
    server, _ = served
    for _ in range(2):
        for request, ours, theirs in zip(plain(8, seed=1), together(server, plain(8, seed=1)), stock, strict=True):
            assert_same(ours, theirs, f"{request.label}, with the plugin and without")
        together(server, steered()[:4])


def test_a_steered_request_is_the_same_in_any_company(served: tuple[Server, Oracle]) -> None:
    """32 plans, four of them used twice, beside unsteered requests, against each request run alone."""
    server, oracle = served
    batch = mixed()
    answers = together(server, batch)
    for request, answer in zip(batch, answers, strict=True):
        alone = ask(server, request.prompt, request.steering, request.new)
        assert_same(answer, alone, f"{request.label}, in a batch and alone")
        if request.steering:
            assert answer.edited == alone.edited, f"{request.label}: edited tokens"
            for mine, its in zip(numbers(answer), numbers(alone), strict=True):  # one product for all rows of a plan
                assert mine == pytest.approx(its, rel=1e-5, abs=1e-5), f"{request.label}: probes"
    for request, answer in zip(batch, answers, strict=True):
        agree(answer, oracle, request.steering, request.label)


def test_unsteered_neighbours_are_not_touched(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    batch = mixed()
    without = [Asked(r.prompt, None, r.new, r.label) for r in batch]
    for request, beside, never in zip(batch, together(server, batch), together(server, without), strict=True):
        if request.steering is None:
            assert_same(beside, never, f"{request.label}, beside steered requests and beside unsteered ones")
        elif any(beside.edited):
            assert difference(beside.logprobs, never.logprobs), f"{request.label}: the edit did nothing"


def test_zero_strength_is_no_edit(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    batch = [
        Asked(prompt, {"interventions": [edit]}, 5, f"zero {edit}")
        for prompt, edit in zip(prompts(len(zeros()), seed=5), zeros(), strict=True)
    ]
    company = [*batch, *steered()[:8]]
    for request, answer in zip(batch, together(server, company), strict=False):
        error = distance(answer.logprobs, ask(server, request.prompt, new=request.new).logprobs)
        assert error < 1e-6, f"{request.label}: logprobs differ from the unsteered ones by {error:.3g}"
        assert answer.edited == [len(answer.ids) - 1], f"{request.label}: edited tokens"


def assert_same(a: Answer, b: Answer, label: str) -> None:
    assert a.new == b.new, f"{label}: other tokens"
    found = difference(a.logprobs, b.logprobs)
    assert found is None, f"{label}: {found}"


# -- requests ---------------------------------------------------------------------------------------

SELECTORS: list[Any] = [
    "all", "prompt", "generated", "last_prompt", {"generated": True, "last": 1}, {"positions": [2, -2, 31]},
    {"ranges": [[1, 4], [-2, 40]]}, {"exclude": {"positions": [3]}},
]  # fmt: skip

GATES: list[dict[str, Any] | None] = [
    None,
    {"vector": "resid_post-other", "layer": 0, "measure": "projection", "above": 0.0},
    None,
    {"vector": "resid_post-other", "layer": 1, "above": 0.0, "hold": True},
    None,
    {"vector": "resid_post", "layer": 1, "measure": "projection", "above": -2.0, "over": "prompt_mean"},
    {"vector": "attn_z", "site": "attn_z", "layer": 0, "below": 0.1, "over": "last_prompt"},
]


def edits(site: str) -> list[dict[str, Any]]:
    where = {"site": site, "vector": site, "layers": [2, 3]}
    found: list[dict[str, Any]] = [
        {"op": "add", **where, "scale": 1.5},
        {"op": "add", **where, "scale": 0.3, "relative": "norm", "preserve_norm": True},
        {"op": "ablate", **where, "vector": f"{site}-plane", "strength": 0.8},
        {"op": "clamp", **where, "min": -0.4, "max": 0.4},
        {"op": "multiply", **where, "factor": -1.5},
        {"op": "rotate", **where, "toward": f"{site}-other", "degrees": 70.0},
    ]
    if site == "attn_z":
        found.insert(0, {"op": "heads", "site": site, "heads": [[2, 1], [3, 0]], "factor": 0.0})
    if site in ("attn_out", "mlp_out"):
        found.insert(0, {**INJECT, "layers": [2, 3], "scale": {"attn_out": 1.0, "mlp_out": -0.7}[site]})
    if site == "mlp_post":
        found.insert(
            0, {"op": "neurons", "site": site, "neurons": {"inline": [[2, 3], [3, 17]]}, "mode": "set", "value": 3.0}
        )
    return found


def steered() -> list[Asked]:
    """32 requests of different plans."""
    out = []
    every = [edit for rank in range(7) for site in SITES for edit in edits(site)[rank : rank + 1]]
    for i, prompt in enumerate(prompts(32, seed=3)):
        first, second = every[i % len(every)], every[(i * 5 + 3) % len(every)]
        first = {**first, "tokens": SELECTORS[i % len(SELECTORS)]}
        if gate := GATES[i % len(GATES)]:
            first["when"] = gate
        steering: dict[str, Any] = {"interventions": [first] if i % 3 else [first, second]}
        if i % 4 == 0:
            steering["probes"] = [{"vector": "resid_post"}, {"vector": "mlp_post", "layers": [1]}]
        out.append(Asked(prompt, steering, 3 + i % 6, f"request {i}, {steering}"))
    return out


def mixed() -> list[Asked]:
    """Steered requests, some with the same plan, and unsteered ones between them."""
    again = [
        Asked(p, r.steering, 5, f"again {r.label}")
        for p, r in zip(prompts(4, seed=4), steered(), strict=False)
    ]  # fmt: skip
    batch = [*steered(), *again, *plain(10, seed=6)]
    random.Random(0).shuffle(batch)
    return batch


def zeros() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"op": "heads", "site": "attn_z", "heads": [[2, 1]], "factor": 1.0}]
    found += [
        {"op": "neurons", "site": "mlp_post", "neurons": {"inline": [[2, 3]]}, "mode": mode, "value": value}
        for mode, value in (("add", 0.0), ("scale", 1.0))
    ]
    found += [{**INJECT, "scale": 0.0, "tokens": "all"}]
    for site in SITES:
        where = {"site": site, "vector": site}
        found += [
            {"op": "add", **where, "scale": 0.0},
            {"op": "add", **where, "scale": 0.0, "preserve_norm": True},
            {"op": "ablate", **where, "strength": 0.0},
            {"op": "multiply", **where, "factor": 1.0},
            {"op": "rotate", **where, "toward": f"{site}-other", "degrees": 0.0},
        ]
    return found
