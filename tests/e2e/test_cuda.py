"""On a GPU, in vLLM's default mode and on both model runners: edits inside CUDA graphs are the oracle's.

float32 with Triton's attention, the one backend that takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.e2e import checks
from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, Asked, agree, ask, together
from tests.e2e.test_oracle import assets
from tests.models.tiny import tiny_model
from tests.oracle.hf import SITES, Oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPTIONS = [*WIDE, "--attention-backend", "TRITON_ATTN", "--gpu-memory-utilization", "0.2"]
MODES = {
    "default": [],
    "full": ["-cc.cudagraph_mode=FULL"],
    "piecewise": ["-cc.cudagraph_mode=PIECEWISE"],
    "eager": ["--enforce-eager"],
}


@pytest.fixture(scope="module", params=[(runner, mode) for runner in ("V1", "V2") for mode in MODES], ids="-".join)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Oracle, str]]:
    runner, mode = request.param
    path = tiny_model("llama")
    env = {**DEVELOPER, "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0"}
    with serve(path, tmp_path_factory.mktemp(f"{runner}-{mode}"), [*OPTIONS, *MODES[mode]], env=env) as server:
        oracle = Oracle(path, {})
        assets(oracle, server, server.http.get("/v1/steering/model").json())
        yield server, oracle, mode


def test_graphs_are_captured_at_each_level(served: tuple[Server, Oracle, str]) -> None:
    server, oracle, mode = served
    log = server.log.read_text(errors="replace")
    assert ("Graph capturing finished" in log) == (mode != "eager")
    agree(ask(server, checks.PROMPT), oracle, None, "unsteered")


@pytest.mark.parametrize("site", SITES)
def test_ops(served: tuple[Server, Oracle, str], site: str) -> None:
    checks.ops(*served[:2], site)


def test_selectors_and_gates(served: tuple[Server, Oracle, str]) -> None:
    checks.selectors_and_gates(*served[:2])


def test_a_mixed_batch(served: tuple[Server, Oracle, str]) -> None:
    checks.a_mixed_batch(*served[:2])


def test_plans_change_between_replays(served: tuple[Server, Oracle, str]) -> None:
    """One graph serves batches of the same shape whose rows have other plans each time, or none."""
    server, oracle, _ = served
    for i in range(4):
        edits: list[Any] = [{**checks.ADD, "scale": 0.5 + i + j / 8} for j in range(7)]
        plans: list[Any] = [{"interventions": [edit]} for edit in edits]
        plans[i] = None
        batch = [Asked(checks.PROMPT[: 4 + j], plan, 12, f"{i}, {j}") for j, plan in enumerate(plans)]
        for asked, answer in zip(batch, together(server, batch), strict=True):
            agree(answer, oracle, asked.steering, asked.label)
