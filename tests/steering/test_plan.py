import hashlib
import os
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.kernels.program import Block, Program, Rows
from steersman.kernels.reference import edit
from steersman.steering.plan import GateRead, Place, Plan, ProbeRead, Step, constant_block, linear_block
from steersman.steering.sites import Site
from steersman.steering.spec import TokenSet
from steersman.steering.tokens import Prompt, Selection
from tests.steering.library import LAYERS, D, asset, inline, noise, resolve, vector

POST = Place(2, Site.RESID_POST)


def everything() -> Plan:
    """A plan with all ops, both kinds of rows, every flag, gates, probes and selectors of every shape."""
    gate = {"vector": inline(noise(D)), "layer": 0, "above": 0.1, "below": 2, "hold": True}
    v = inline(noise(LAYERS, D), range(LAYERS))
    plane = inline(noise(2, 2, D, seed=1), [1, 3])
    data = {
        "interventions": [
            {"op": "add", "vector": "stored", "tokens": {"exclude": "prompt"}, "preserve_norm": True},
            {"op": "add", "vector": v, "relative": "norm", "layers": [2, 1], "tokens": {"last": 1, "text": "a"}},
            {"op": "ablate", "vector": plane, "when": gate},
            {"op": "clamp", "vector": v, "min": -1, "site": "resid_mid"},
            {"op": "multiply", "vector": v, "factor": 2},
            {"op": "rotate", "vector": v, "toward": inline(noise(D, seed=2)), "degrees": 30},
            {"op": "neurons", "neurons": {"inline": [[0, 3], [0, 4]]}, "value": 4},
            {"op": "heads", "heads": [[1, 0]], "factor": 0, "when": {**gate, "over": "prompt_mean", "layer": 3}},
            {"op": "affine", "affine": "map", "tokens": {"positions": [-1], "exclude": {"token_ids": [3]}}},
        ],
        "probes": [{"vector": "stored"}, {"vector": v, "site": "attn_out"}],
    }
    tensors = {"R": noise(1, 2, D), "A": noise(1, 2, D, seed=1), "b": noise(1, 2)}
    stored = vector("stored", noise(2, D, seed=3), [0, 2])
    return resolve(data, stored, asset("map", "affine", tensors, layers=[3]))


def same_rows(a: Rows | None, b: Rows | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.width == b.width and all(
        (x is None) == (y is None) and (x is None or y is None or torch.equal(x, y))
        for x, y in ((a.dense, b.dense), (a.columns, b.columns))
    )


def same_block(a: Block, b: Block) -> bool:
    def same(name: str) -> bool:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Rows) or x is None:
            return same_rows(x, y)
        return torch.equal(x, y) if isinstance(x, Tensor) else x == y

    return all(same(f.name) for f in fields(Block))


def test_a_plan_survives_its_bytes() -> None:
    plan = everything()
    data = plan.to_bytes()
    again = Plan.from_bytes(data)
    assert again.to_bytes() == data
    assert again.id == plan.id == hashlib.sha256(data).hexdigest()
    assert again.edits_id == plan.edits_id
    assert again.steps == plan.steps
    assert again.probe_names == plan.probe_names
    assert again.blocks.keys() == plan.blocks.keys()
    for place, blocks in plan.blocks.items():
        assert all(same_block(a, b) for a, b in zip(blocks, again.blocks[place], strict=True))
    for a, b in zip((*plan.gates, *plan.probes), (*again.gates, *again.probes), strict=True):
        for f in fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
    assert again.places == plan.places
    assert again.nbytes == plan.nbytes > 0


def test_selectors_mean_the_same_after_the_journey() -> None:
    plan = everything()
    prompt = Prompt([3, 1, 4, 1, 5], find_text=lambda _: [2])
    there, here = (
        Selection.build(p.selectors, prompt, [s.path for s in p.steps])
        for p in (Plan.from_bytes(plan.to_bytes()), plan)
    )
    assert there == here
    assert here.generated & 1  # exclude alone means everything else


def test_blocks_of_every_flag_survive() -> None:
    rows = Rows(4, dense=noise(2, 4))
    columns = Rows(4, columns=torch.tensor([2, 0]))
    blocks = (
        linear_block(0, rows, rows, gain=0.5, low=-1.0, relative=True, preserve_norm=True, gate=1),
        linear_block(1, columns, columns, offset=torch.tensor([1.0, 2.0]), only_if_active=True),
        replace(linear_block(2, rows, None, offset=3.0), threshold=torch.tensor([0.0, float("-inf")])),
    )
    again = Plan.from_bytes(Plan((), {POST: blocks}).to_bytes())
    assert all(same_block(a, b) for a, b in zip(blocks, again.blocks[POST], strict=True))


def test_an_empty_plan() -> None:
    plan = Plan((), {})
    assert Plan.from_bytes(plan.to_bytes()).id == plan.id
    assert plan.places == set()


STEP = Step("add", (2,), Site.RESID_POST, "all", ("v@1",), "steering.interventions[0]")
BLOCK = linear_block(0, Rows(4, dense=noise(2, 4)), Rows(4, dense=noise(2, 4, seed=1)), bias=1.0)
GATE = GateRead(Place(1, Site.RESID_POST), noise(4), "cosine", 0.5, None, "token", False)
PROBE = ProbeRead(0, Place(1, Site.RESID_POST), noise(4))
BASE = Plan((STEP,), {POST: (BLOCK,)}, (GATE,), (PROBE,), ("v@1",))
ONES = torch.ones(2)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": (replace(STEP, op="ablate"),)},
        {"steps": (replace(STEP, layers=(1,)),)},
        {"steps": (replace(STEP, site=Site.RESID_MID),)},
        {"steps": (replace(STEP, tokens="prompt"),)},
        {"steps": (replace(STEP, tokens=TokenSet(last=1)),)},
        {"steps": (replace(STEP, assets=("v@2",)),)},
        {"steps": (replace(STEP, path="default.interventions[0]"),)},
        {"steps": (replace(STEP, gate=0),)},
        {"steps": (STEP, STEP)},
        {"blocks": {}},
        {"blocks": {Place(1, Site.RESID_POST): (BLOCK,)}},
        {"blocks": {Place(2, Site.RESID_PRE): (BLOCK,)}},
        {"blocks": {POST: (BLOCK, BLOCK)}},
        {"gates": ()},
        *({"blocks": {POST: (replace(BLOCK, **{n: 7 * ONES}),)}} for n in ("bias", "threshold", "gain", "offset")),
        *({"blocks": {POST: (replace(BLOCK, **{n: 7 * ONES}),)}} for n in ("low", "high")),
        *({"blocks": {POST: (replace(BLOCK, **{n: True}),)}} for n in ("relative", "only_if_active", "preserve_norm")),
        {"blocks": {POST: (replace(BLOCK, gate=0),)}},
        {"blocks": {POST: (replace(BLOCK, intervention=1),)}},
        {"blocks": {POST: (replace(BLOCK, read=None),)}},
        {"blocks": {POST: (replace(BLOCK, write=Rows(4, columns=torch.tensor([0, 1]))),)}},
        {"blocks": {POST: (replace(BLOCK, write=Rows(4, columns=torch.tensor([1, 0]))),)}},
        {"gates": (replace(GATE, place=POST),)},
        {"gates": (replace(GATE, direction=noise(4, seed=9)),)},
        {"gates": (replace(GATE, measure="projection"),)},
        {"gates": (replace(GATE, above=0.6),)},
        {"gates": (replace(GATE, below=0.5),)},
        {"gates": (replace(GATE, over="last_prompt"),)},
        {"gates": (replace(GATE, hold=True),)},
    ],
)
def test_the_ids_follow_every_change_of_what_is_edited(change: dict[str, Any]) -> None:
    other = replace(BASE, **change)
    assert other.id != BASE.id
    assert other.edits_id != BASE.edits_id
    assert Plan.from_bytes(other.to_bytes()).id == other.id


@pytest.mark.parametrize(
    "change",
    [
        {"probes": (), "probe_names": ()},
        {"probe_names": ("w@1",)},
        {"probes": (replace(PROBE, place=POST),)},
        {"probes": (replace(PROBE, direction=noise(4, seed=9)),)},
    ],
)
def test_what_is_only_read_changes_the_id_but_not_the_edits(change: dict[str, Any]) -> None:
    other = replace(BASE, **change)
    assert other.id != BASE.id
    assert other.edits_id == BASE.edits_id


def test_warnings_are_not_content() -> None:
    assert replace(BASE, warnings=("careful",)).id == BASE.id


def test_the_order_of_places_does_not_matter_but_that_of_blocks_does() -> None:
    early, other = Place(0, Site.RESID_PRE), replace(BLOCK, gain=2 * ONES)
    there, back = Plan((), {POST: (BLOCK,), early: (BLOCK,)}), Plan((), {early: (BLOCK,), POST: (BLOCK,)})
    assert there.id == back.id
    assert Plan((), {POST: (BLOCK, other)}).id != Plan((), {POST: (other, BLOCK)}).id


def test_equal_tensors_are_sent_once() -> None:
    big = Rows(4096, dense=noise(1, 4096))
    once = Plan((), {POST: (linear_block(0, big, None, offset=1.0),)})
    many = Plan((), {Place(i, Site.RESID_POST): (linear_block(0, big, big, offset=1.0),) for i in range(10)})
    assert len(many.to_bytes()) < len(once.to_bytes()) + 4096


def test_every_process_gives_a_plan_the_same_id() -> None:
    code = "from tests.steering.test_plan import everything; print(everything().id)"
    ids = set()
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        ids.add(done.stdout.strip())
    assert ids == {everything().id}


# -- constant blocks -------------------------------------------------------------------------------------


def test_a_constant_block_adds_its_vector() -> None:
    v = noise(D)
    assert torch.equal(edit(noise(3, D), Program((constant_block(0, v),), D)), v.expand(3, D))
