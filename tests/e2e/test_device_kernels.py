"""The whole way of a plan into a device's tables and through a GPU kernel, in the real engine, without a GPU.

Triton's interpreter runs the kernel on the CPU. Norms are fused with edits, in a kernel whose sums are not the model's.
CUDA graphs are the one part that this does not see.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e import checks
from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE
from tests.e2e.test_oracle import assets
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ENV = {**DEVELOPER, "STEERSMAN_KERNEL": "triton", "TRITON_INTERPRET": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--max-num-batched-tokens", "512", "--max-num-seqs", "64", "--steering-fused-norm", "on"]
    with serve(path, tmp_path_factory.mktemp("triton"), options, env=ENV) as server:
        oracle = Oracle(path, {})
        assets(oracle, server, server.http.get("/v1/steering/model").json())
        yield server, oracle


def test_norms_are_fused(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    assert "8 of 8 norms are the kernel's in all passes" in server.log.read_text(errors="replace")


@pytest.mark.parametrize("site", ["resid_mid", "resid_post", "attn_z", "mlp_post"])
def test_ops(served: tuple[Server, Oracle], site: str) -> None:
    checks.ops(*served, site)


def test_selectors_and_gates(served: tuple[Server, Oracle]) -> None:
    """Their probes read a site as well that is not the edits'."""
    checks.selectors_and_gates(*served)


def test_gates_and_injections(served: tuple[Server, Oracle]) -> None:
    checks.gates(*served)


def test_a_mixed_batch(served: tuple[Server, Oracle]) -> None:
    checks.a_mixed_batch(*served)
