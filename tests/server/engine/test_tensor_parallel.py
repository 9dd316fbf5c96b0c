"""Two ranks in one process: each holds half of the wide sites, and they add up what only both know."""

from collections.abc import Sequence
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.server.engine.device import DevicePlans
from steersman.server.engine.encoders import Encoders
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.resident import Shard
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.kernels import table_reader
from tests.server.engine.plans import add, sideways
from tests.server.engine.toy import args
from tests.steering.library import D_FF, D_HEAD, HEADS, WIDTHS, D, asset, inline, noise, plan_of, resolve

N, PROMPT = 6, 4
Z, NEURONS, POST = (Place(1, site) for site in (Site.ATTN_Z, Site.MLP_POST, Site.RESID_POST))
WIDE = HEADS * D_HEAD
HALF = {Z: WIDE // 2, NEURONS: D_FF // 2}
WAIT = 20


class Ranks:
    """Sums over two threads, which must ask for the same sums in the same order."""

    def __init__(self) -> None:
        self.barrier = Barrier(2)
        self.parts: list[Tensor | None] = [None, None]
        self.sums: list[list[tuple[int, ...]]] = [[], []]

    def reduce(self, rank: int) -> Any:
        def total(part: Tensor) -> Tensor:
            self.parts[rank] = part.clone()
            self.sums[rank].append(tuple(part.shape))
            self.barrier.wait(WAIT)
            a, b = self.parts
            assert a is not None
            assert b is not None
            self.barrier.wait(WAIT)
            return a + b

        return total


def activations(place: Place, seed: int = 0) -> Tensor:
    return 3 * noise(N, WIDTHS[place.site], seed=seed)


def passes(runtime: Runtime, its_plan: Plan, inputs: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """A prompt in two chunks and then what is generated, at each place in its order."""
    out: dict[Place, list[Tensor]] = {place: [] for place in inputs}
    for a, b in ((0, 3), (3, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, N)):
        runtime.begin([Scheduled("r", a, 0, b - a)], lambda row, count: torch.zeros(count).numpy())
        for place in sorted(inputs, key=lambda p: p.order):
            x = inputs[place][a:b].clone()
            runtime.apply(place, x)
            out[place].append(x)
        runtime.end()
    return {place: torch.cat(parts) for place, parts in out.items()}


def start(runtime: Runtime, its_plan: Plan) -> Runtime:
    runtime.plans.on_load = Encoders(lambda ref: SAE, torch.device("cpu")).load
    runtime.plans.add(its_plan.to_bytes(), "http")
    runtime.add_request("r", args(its_plan, list(range(PROMPT)), "r"))
    return runtime


def in_two(
    its_plan: Plan, inputs: dict[Place, Tensor], on_device: bool = False
) -> tuple[list[dict[Place, Tensor]], list[Any], Ranks]:
    ranks, out, reports = Ranks(), [{}, {}], [None, None]  # type: ignore[var-annotated]

    def run(rank: int) -> None:
        shards = {place: Shard(rank * half, (rank + 1) * half, 2 * half) for place, half in HALF.items()}
        runtime = Runtime(reduce=ranks.reduce(rank))
        runtime.shard(shards)
        if on_device:
            cpu = torch.device("cpu")
            runtime.use_device(DevicePlans(table_reader.edit, list(inputs), shards, cpu, rows=N, plans=2, nbytes=2**18))
        start(runtime, its_plan)
        mine = {p: x[:, shards[p].start : shards[p].stop] if p in shards else x for p, x in inputs.items()}
        out[rank] = passes(runtime, its_plan, mine)
        (reports[rank],) = runtime.reports(["r"])["r"]

    threads = [Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WAIT)
    assert not any(thread.is_alive() for thread in threads)
    return out, reports, ranks


WIDE_V, WIDE_W = inline(noise(WIDE, seed=1)), inline(noise(WIDE, seed=2))
FF_V = inline(noise(D_FF))
PLANE = inline(noise(1, 3, WIDE, seed=3), [1])
READ = {"vector": inline(noise(WIDE, seed=4)), "layer": 1, "site": "attn_z", "above": 0.0}
AT_Z = {"layers": 1, "site": "attn_z"}
SAE = asset("sae", "dictionary", {
    **{name: noise(9, D_FF, seed=i) for i, name in enumerate(("encoder", "decoder"))},
    "b_enc": noise(9, seed=5), "b_dec": noise(D_FF, seed=6),
}, site="mlp_post", layer=1, architecture="topk", k=3, apply_b_dec_to_input=True)  # fmt: skip
FEATURES = {"op": "feature", "dictionary": "sae", "index": [0, 4, 7]}
CASES: dict[str, Sequence[dict[str, Any]]] = {
    "plain adds": [{"op": "add", "vector": WIDE_V, **AT_Z}, {"op": "heads", "heads": [[1, 1]], "vector": WIDE_W}],
    "reads": [
        {"op": "ablate", "vector": PLANE, "site": "attn_z"},
        {"op": "rotate", "vector": WIDE_V, "toward": WIDE_W, "degrees": 40, **AT_Z},
        {"op": "clamp", "vector": WIDE_W, "max": 0, **AT_Z},
    ],
    "norms": [
        {"op": "add", "vector": WIDE_V, "relative": "norm", "scale": 0.3, **AT_Z},
        {"op": "multiply", "vector": WIDE_W, "factor": 3, "preserve_norm": True, **AT_Z},
        {"op": "heads", "heads": [[1, 0]], "factor": 0.5, "preserve_norm": True},
    ],
    "columns": [
        {"op": "heads", "heads": [[1, 0]], "factor": 0},
        {"op": "neurons", "neurons": {"inline": [[1, 2], [1, 9], [1, 10], [1, 19]]}, "value": 4},
        {"op": "neurons", "neurons": {"inline": [[1, 1]]}, "value": 2, "mode": "scale"},
    ],
    "columns and rows": [
        {"op": "neurons", "neurons": {"inline": [[1, 2], [1, 12]]}, "value": 4},
        {"op": "add", "vector": FF_V, "layers": 1, "site": "mlp_post", "relative": "norm"},
    ],
    "encodes": [
        {"op": "add", "vector": FF_V, "layers": 1, "site": "mlp_post", "scale": 0.5},
        {**FEATURES, "mode": "scale", "value": -2.0},
        {**FEATURES, "mode": "set", "value": 1.5, "only_if_active": True, "preserve_norm": True},
        add(0, 1, when={"dictionary": "sae", "index": 4, "above": 0.1}),
    ],
    "gates": [
        add(0, 1, when=READ),
        {"op": "ablate", "vector": FF_V, "layers": 1, "site": "mlp_post", "when": {**READ, "hold": True}},
        add(1, 1, when={**READ, "over": "prompt_mean"}, scale=2),
        add(2, 1, when={**READ, "over": "last_prompt", "measure": "projection"}, relative="norm"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_what_one_does(name: str) -> None:
    probes = [{"vector": WIDE_V, **AT_Z}, {"vector": sideways(0), "layers": 1}, {"dictionary": "sae", "index": 7}]
    its_plan = resolve({"interventions": list(CASES[name]), "probes": probes}, SAE)
    inputs = {place: activations(place, seed) for seed, place in enumerate((Z, NEURONS, POST))}
    alone = start(Runtime(), its_plan)
    want = passes(alone, its_plan, inputs)
    (wanted,) = alone.reports(["r"])["r"]
    (a, b), reports, ranks = in_two(its_plan, inputs)

    assert ranks.sums[0] == ranks.sums[1]
    assert not torch.equal(want[Z], inputs[Z]) or name in ("columns and rows", "encodes", "gates")
    assert not torch.equal(want[NEURONS], inputs[NEURONS]) or name in ("plain adds", "reads", "norms")
    for place in (Z, NEURONS):
        both = torch.cat([a[place], b[place]], dim=1)
        torch.testing.assert_close(both, want[place], rtol=1e-5, atol=1e-5)
    assert torch.equal(a[POST], b[POST])
    torch.testing.assert_close(a[POST], want[POST], rtol=1e-5, atol=1e-5)
    assert [r["error"] for r in reports] == [None, None]
    for found in reports:
        assert (found["edited"], found["gates"]) == (wanted["edited"], wanted["gates"])
        for key in ("relative", "probes"):
            for one, other in zip(found[key], wanted[key], strict=True):
                assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_places_that_every_rank_has_are_summed_by_nobody() -> None:
    its_plan = plan_of({"op": "ablate", "vector": sideways(0), "layers": 1})
    (a, b), _, ranks = in_two(its_plan, {POST: activations(POST)})
    assert ranks.sums == [[], []]
    assert torch.equal(a[POST], b[POST])
    assert a[POST].shape == (N, D)


@pytest.mark.parametrize("name", ["plain adds", "columns"])
def test_two_ranks_on_devices_measure_what_one_does(name: str) -> None:
    its_plan = plan_of(*CASES[name])
    inputs = {place: activations(place, seed) for seed, place in enumerate((Z, NEURONS))}
    alone = start(Runtime(), its_plan)
    want = passes(alone, its_plan, inputs)
    (wanted,) = alone.reports(["r"])["r"]
    (a, b), reports, ranks = in_two(its_plan, inputs, on_device=True)

    assert ranks.sums[0] == ranks.sums[1]
    assert wanted["relative"]
    for place in inputs:
        torch.testing.assert_close(torch.cat([a[place], b[place]], dim=1), want[place], rtol=1e-5, atol=1e-5)
    for found in reports:
        assert found["error"] is None
        for one, other in zip(found["relative"], wanted["relative"], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
