"""With torch.compile the same edits reach the same places: nothing is folded away, reordered or traced out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e import checks
from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, agree, ask
from tests.e2e.test_oracle import assets
from tests.models.tiny import tiny_model
from tests.oracle.hf import SITES, Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--no-enforce-eager"]
    with serve(path, tmp_path_factory.mktemp("compiled"), options, env=DEVELOPER, forked=True) as server:
        oracle = Oracle(path, {})
        assets(oracle, server, server.http.get("/v1/steering/model").json())
        yield server, oracle


def test_it_is_compiled(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    log = server.log.read_text(errors="replace")
    assert "enforce_eager=False" in log
    assert "AOT compil" in log, "nothing was compiled, so this module shows nothing"
    agree(ask(server, checks.PROMPT), oracle, None, "unsteered")


@pytest.mark.parametrize("site", SITES)
def test_ops(served: tuple[Server, Oracle], site: str) -> None:
    checks.ops(*served, site)


def test_selectors_and_gates(served: tuple[Server, Oracle]) -> None:
    checks.selectors_and_gates(*served)


def test_a_mixed_batch(served: tuple[Server, Oracle]) -> None:
    checks.a_mixed_batch(*served)
