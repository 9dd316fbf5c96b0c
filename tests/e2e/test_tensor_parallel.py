"""Two ranks that each hold a part of attn_z and mlp_post edit, gate, probe and report what one would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e import captured, checks
from tests.e2e.checks import PROMPT, check
from tests.e2e.server import Server, serve
from tests.e2e.steered import WIDE, agree, ask, matters
from tests.e2e.test_oracle import assets, interventions
from tests.models.tiny import tiny_model
from tests.oracle.hf import SITES, Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SHARDED = ("attn_z", "mlp_post")
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--tensor-parallel-size", "2"]
    with serve(path, tmp_path_factory.mktemp("ranks"), options, env=ENV) as server:
        oracle = Oracle(path, {})
        assets(oracle, server, server.http.get("/v1/steering/model").json())
        yield server, oracle


def test_sites_are_whole(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    found = server.http.get("/v1/steering/model").json()
    widths = {"attn_z": 4 * 32, "mlp_post": 160}
    assert set(found["sites"]) == set(SITES)
    for site in SITES:
        assert found["widths"][site] == {str(i): widths.get(site, 64) for i in range(found["n_layers"])}, site
    agree(ask(server, PROMPT), oracle, None, "unsteered")


@pytest.mark.parametrize("site", SITES)
def test_ops(served: tuple[Server, Oracle], site: str) -> None:
    checks.ops(*served, site)


@pytest.mark.parametrize("site", SHARDED)
def test_lists_of_edits(served: tuple[Server, Oracle], site: str) -> None:
    """Each edit sees what those before it have done, on the other rank too."""
    server, oracle = served
    every = [
        {**edit, "layers": [1, 2]}
        for edit in interventions(site, [1, 2])
        if edit["op"] not in ("heads", "neurons", "feature")
    ]
    units = [edit for edit in interventions(site, [1, 2]) if edit["op"] in ("heads", "neurons")]
    check(server, oracle, {"interventions": every}, f"{site}: one after another")
    check(server, oracle, {"interventions": [*reversed(every), *units]}, f"{site}: backwards, and single units")
    check(server, oracle, {"interventions": [units[0], every[1], units[-1]]}, f"{site}: units around a relative add")


def test_captures(served: tuple[Server, Oracle]) -> None:
    """What the ranks hold a part of each is put together."""
    server, oracle = served
    captured.everywhere(server, oracle, [PROMPT, PROMPT[:3]])
    edit = {"op": "ablate", "vector": "attn_z", "layers": [1, 2], "tokens": {"positions": [1, -1]}}
    captured.everywhere(server, oracle, [PROMPT[:7]], {"interventions": [edit]})


@pytest.mark.parametrize("unit", range(4))
def test_units_of_either_rank(served: tuple[Server, Oracle], unit: int) -> None:
    """Heads 0 and 1 and the first 80 neurons are the first rank's; an edit may touch either rank or both."""
    server, oracle = served
    heads = {"op": "heads", "heads": [[2, unit]], "factor": -1.0}
    neurons = {"op": "neurons", "neurons": {"inline": [[1, 79 + unit], [2, 40 * unit]]}, "mode": "set", "value": 3.0}
    check(server, oracle, {"interventions": [heads]}, f"head {unit}")
    check(server, oracle, {"interventions": [neurons]}, f"neurons {neurons['neurons']}")
    both = [{**heads, "heads": [[2, unit], [2, 3 - unit]]}, {**neurons, "preserve_norm": True}]
    check(server, oracle, {"interventions": both}, f"head {unit} and another, neurons at the same norm")


@pytest.mark.parametrize("over", ["token", "hold", "prompt_mean", "last_prompt"])
@pytest.mark.parametrize("site", [*SHARDED, "resid_mid"])
def test_gates(served: tuple[Server, Oracle], site: str, over: str) -> None:
    server, oracle = served
    for measure in ("projection", "cosine"):
        seen = oracle.capture(PROMPT, [(1, site)], prompt_len=len(PROMPT))[1, site]
        v = oracle.assets[site].layers[1]
        values = seen @ (v / v.norm())
        mean = seen.mean(0) @ (v / v.norm())
        if measure == "cosine":
            values, mean = values / seen.norm(dim=-1), mean / seen.mean(0).norm()
        middle = {"prompt_mean": mean, "last_prompt": values[-1]}.get(over, (values.sort().values[5:7]).mean())
        for step, opens in ((-0.02, True), (0.02, False)):
            when: dict[str, Any] = {"vector": site, "site": site, "layer": 1, "measure": measure}
            when["above"] = float(middle) + (step if over in ("prompt_mean", "last_prompt") else 0.0)
            when |= {"hold": True} if over == "hold" else {"over": over}
            edits = [
                {"op": "add", "vector": at, "site": at, "scale": 2.0, "layers": [2], "when": when} for at in SHARDED
            ]
            label = f"{measure} over {over} at {site}"
            answer = ask(server, PROMPT, {"interventions": edits})
            agree(answer, oracle, {"interventions": edits}, label)
            if over in ("prompt_mean", "last_prompt"):
                found = [entry["gate"]["open"] for entry in answer.body["steering"]["interventions"]]
                assert found == [[opens]] * 2, f"{label}: decision"
            else:
                matters(oracle, answer, {"interventions": edits}, label)


@pytest.mark.parametrize("site", SITES)
def test_probes_and_sizes(served: tuple[Server, Oracle], site: str) -> None:
    """What is reported is of the whole activation."""
    server, oracle = served
    edit = {"op": "add", "vector": f"{site}-other", "site": site, "scale": 1.5, "layers": [2]}
    steering = {"interventions": [edit], "probes": [{"vector": site, "layers": [2]}]}
    answer = ask(server, PROMPT, steering, 1)
    agree(answer, oracle, steering, site)
    v, other = (oracle.assets[name].layers[2] for name in (site, f"{site}-other"))
    before, after = (
        oracle.capture(PROMPT, [(2, site)], steering, len(PROMPT), edited=edited)[2, site] for edited in (False, True)
    )
    report = answer.body["steering"]
    size = (1.5 * other.norm() / before.norm(dim=-1)).mean()
    assert report["interventions"][0]["mean_relative_norm"] == pytest.approx(float(size), rel=1e-3), f"{site}: size"
    values = after @ (v / v.norm())
    wanted = {
        "tokens": len(PROMPT),
        "mean": values.mean(),
        "min": values.min(),
        "max": values.max(),
        "last": values[-1],
    }
    found = report["probes"][0]["layers"]["2"]
    assert found == pytest.approx({k: float(x) for k, x in wanted.items()}, abs=1e-3), f"{site}: probe"


def test_a_mixed_batch(served: tuple[Server, Oracle]) -> None:
    checks.a_mixed_batch(*served)
