"""The limit on an edit's size, against the formulas of the interventions done one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.kernels.program import Program
from steersman.server.engine.chain import in_turn
from steersman.server.engine.dosage import CAP, REFUSE, WARN, Dosage
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.server.engine.plans import KINDS, add, gate, plan, sideways
from tests.server.engine.test_monitor import Watched
from tests.server.engine.test_tensor_parallel import CASES, NEURONS, POST, SAE, activations, in_two, passes, start
from tests.server.engine.toy import Piece, Toy, alone, report
from tests.steering.formulas import apply
from tests.steering.library import D, inline, noise, plan_of, resolve

PROMPT = [3, 5, 9, 4, 1, 12, 2, 20]
P = len(PROMPT)
IDS = [*PROMPT, 6, 9, 1]


def guarded(action: str, limit: float, **toy: object) -> Toy:
    made = Toy(Runtime(), **toy)  # type: ignore[arg-type]
    made.runtime.dosage = Dosage(limit, action)
    return made


def direction(seed: int) -> Tensor:
    """What ``sideways`` sends."""
    v = noise(D, seed=seed)
    v[0] = 0
    return v


FORMULAS: list[dict[str, Any]] = [
    {"op": "add", "vector": direction(0), "scale": 0.4},
    {"op": "add", "vector": direction(1), "relative": "norm", "scale": 0.9},
    {"op": "ablate", "vector": direction(2), "strength": 2.5},
    {"op": "multiply", "vector": direction(5), "factor": -3.0},
    {"op": "add", "vector": direction(3), "scale": 2.0, "preserve_norm": True},
    {"op": "clamp", "vector": direction(4), "min": 1.5},
]


def limited(x: Tensor, limit: float) -> tuple[Tensor, list[float]]:
    """One row [d] float64 after the formulas, each change at most limit·‖x‖; and their sizes."""
    stream, sizes = x.clone(), []
    for formula in FORMULAS:
        change = apply(stream[None], formula)[0] - stream
        ratio = float(change.norm() / x.norm())
        stream = stream + change * min(1.0, limit / ratio if ratio else 1.0)
        sizes.append(min(ratio, limit))
    return stream, sizes


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0, 50.0])
def test_capped_is_each_formula_scaled_down(limit: float) -> None:
    edits = [{**f, "vector": inline(f["vector"]), "layers": 1} for f in FORMULAS]
    program = Program(plan_of(*edits).blocks[Place(1, Site.RESID_POST)], D)
    x = 2 * torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    change, sizes = in_turn(x, program, limit=limit)
    for row in range(len(x)):
        wanted, want_sizes = limited(x[row].double(), limit)
        torch.testing.assert_close(x[row].double() + change[row].double(), wanted, rtol=1e-4, atol=1e-4)
        assert sizes[row].tolist() == pytest.approx(want_sizes, rel=1e-3, abs=1e-5)
    assert float(sizes.max()) <= limit * (1 + 1e-5)
    assert limit == 50.0 or float(sizes.max()) == pytest.approx(limit)


def test_only_rows_over_the_limit_are_changed_otherwise() -> None:
    """Whether a row is capped is its own affair, and the others have the bits that they have without a limit."""
    its_plan = plan_of(
        add(0, 1, scale=1.5),
        {"op": "ablate", "vector": sideways(1), "layers": 1, "strength": 1e-3},
        {"op": "multiply", "vector": sideways(2), "layers": 1, "factor": 1.001},
    )
    watched = Watched(every=10**6)
    watched.enter("r", its_plan)
    free = watched.complete("r", IDS, P)
    streams = torch.cat([seen[Place(1, Site.RESID_POST)][0] for _, seen in watched.passes])
    sizes = 1.5 * direction(0).norm() / streams.norm(dim=-1)
    limit = float(sizes.median()) * 1.0001
    toy = guarded(CAP, limit)
    toy.add("r", its_plan, PROMPT)
    found = toy.complete("r", IDS, P)
    over = (sizes > limit).tolist()
    assert 0 < sum(over) < len(IDS)
    assert (found != free).any(-1).tolist() == over
    for a, b in ((0, 3), (3, P), (0, P)):
        again = guarded(CAP, limit)
        again.add("r", its_plan, PROMPT)
        again.add("other", plan_of(add(5, 1, scale=0.01), add(6, 1, relative="norm", scale=0.01)), PROMPT)
        if a:
            again.run(Piece("r", 0, IDS[:a]))
        part = again.run(Piece("other", 0, PROMPT), Piece("r", a, IDS[a:b]))["r"]
        assert torch.equal(part, found[a:b])


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_that_nothing_reaches_changes_no_bit(kind: str) -> None:
    toy = guarded(CAP, 1e9, dtype=torch.bfloat16, split=True)
    toy.add("r", plan(kind), PROMPT)
    assert torch.equal(toy.complete("r", IDS, P), alone(plan(kind), IDS, P, dtype=torch.bfloat16, split=True))
    assert report(toy.runtime, "r")["over"] == []


@pytest.mark.parametrize("action", [WARN, CAP, REFUSE])
def test_every_edit_over_the_limit_is_told(action: str) -> None:
    its_plan = plan_of(
        add(0, [1, 2], relative="norm", scale=0.5, tokens="prompt"),
        add(1, 1, relative="norm", scale=0.2),
        add(2, 2, relative="norm", scale=0.7, when=gate(), tokens="generated"),
    )
    toy = guarded(action, 0.4)
    toy.add("r", its_plan, PROMPT)
    toy.add("mild", plan_of(add(3, "all", relative="norm", scale=0.3)), PROMPT)
    toy.run(Piece("mild", 0, PROMPT), Piece("r", 0, PROMPT))
    for i in range(P, P + 3):
        toy.run(Piece("r", i, [IDS[i]]), Piece("mild", i, [IDS[i]]))
    found = report(toy.runtime, "r")
    assert [row[:3] for row in found["over"]] == [[0, 1, P], [0, 2, P], [2, 2, 1]]
    assert [row[3] for row in found["over"]] == pytest.approx([0.5, 0.5, 0.7], rel=1e-4)
    done = {(i, layer): total / count for i, layer, total, count in found["relative"]}
    biggest = 0.4 if action == CAP else 0.5
    assert done[0, 2] == pytest.approx(biggest, rel=1e-4)
    assert report(toy.runtime, "mild")["over"] == []
    toy.add("just", plan_of(add(3, "all", relative="norm", scale=0.4)), PROMPT)
    toy.run(Piece("just", 0, PROMPT))
    assert report(toy.runtime, "just")["over"] == []


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_cap_what_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_limit(runtime: Runtime, its_plan: Plan) -> Runtime:
        runtime.dosage = Dosage(0.05, CAP)
        return start(runtime, its_plan)

    its_plan = resolve({"interventions": list(CASES[name])}, SAE)
    places = {p: activations(p, seed) for seed, p in enumerate((Place(1, Site.ATTN_Z), NEURONS, POST))}
    one = with_limit(Runtime(), its_plan)
    want = passes(one, its_plan, places)
    monkeypatch.setattr("tests.server.engine.test_tensor_parallel.start", with_limit)
    (a, b), reports, ranks = in_two(its_plan, places)
    assert ranks.sums[0] == ranks.sums[1]
    for place in (Place(1, Site.ATTN_Z), NEURONS):
        torch.testing.assert_close(torch.cat([a[place], b[place]], 1), want[place], rtol=1e-4, atol=1e-4)
    (wanted,) = one.reports(["r"])["r"]
    assert wanted["over"]
    for found in reports:
        assert [r[:3] for r in found["over"]] == [r[:3] for r in wanted["over"]]
        assert [r[3] for r in found["over"]] == pytest.approx([r[3] for r in wanted["over"]], rel=1e-4)
