"""Which plans a worker keeps."""

import pytest

from steersman.server.engine import resident as module
from steersman.server.engine.resident import Resident, ResidentPlans, Shard
from steersman.steering.errors import CapacityExceeded
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.server.engine.plans import add
from tests.steering.library import D_FF, D_HEAD, HEADS, plan_of

PLANS = [plan_of(add(i, 1)) for i in range(6)]
BYTES = [p.to_bytes() for p in PLANS]
SIZE = max(map(len, BYTES))


def held(plans: ResidentPlans) -> list[int]:
    return [i for i, p in enumerate(PLANS) if p.id in plans._plans]


def filled(capacity: int = 10 * SIZE, limit: int = 3, holder: str = "") -> ResidentPlans:
    plans = ResidentPlans(capacity, limit, {})
    for data in BYTES[:3]:
        plan_id = plans.add(data, "h")
        if not holder:
            plans.release([plan_id], "h")
    return plans


def test_a_plan_is_known_by_the_hash_of_its_bytes() -> None:
    plans = ResidentPlans(10 * SIZE, 3, {})
    assert plans.add(BYTES[0], "h") == PLANS[0].id
    found = plans.get(PLANS[0].id)
    assert found is not None
    assert found.plan.to_bytes() == BYTES[0]
    assert plans.get("unknown") is None
    assert (len(plans), plans.size) == (1, len(BYTES[0]))


def test_adding_again_adds_a_holder_and_nothing_else() -> None:
    plans = ResidentPlans(10 * SIZE, 3, {})
    first = plans.get(plans.add(BYTES[0], "a"))
    assert plans.get(plans.add(BYTES[0], "b")) is first
    assert first is not None
    assert first.holders == {"a", "b"}
    assert (len(plans), plans.size) == (1, len(BYTES[0]))
    plans.release([PLANS[0].id, "unknown"], "a")
    assert first.holders == {"b"}


def test_the_least_recently_used_goes_first() -> None:
    plans = filled()
    plans.get(PLANS[0].id)
    plans.add(BYTES[3], "h")
    assert held(plans) == [0, 2, 3]
    plans.add(BYTES[4], "h")
    assert held(plans) == [0, 3, 4]


def test_capacity_is_in_bytes() -> None:
    plans = filled(capacity=3 * SIZE, limit=100)
    plans.add(BYTES[3], "h")
    assert held(plans) == [1, 2, 3]
    assert plans.size == sum(len(BYTES[i]) for i in held(plans)) <= 3 * SIZE
    with pytest.raises(CapacityExceeded, match="the plan takes"):
        ResidentPlans(SIZE // 2, 10, {}).add(BYTES[0], "h")


def test_plans_in_use_or_held_stay() -> None:
    plans = filled(holder="h")
    with pytest.raises(CapacityExceeded, match="in use"):
        plans.add(BYTES[3], "h")
    assert held(plans) == [0, 1, 2]
    plans.release([PLANS[0].id, PLANS[1].id], "somebody else")
    with pytest.raises(CapacityExceeded):
        plans.add(BYTES[3], "h")
    plans.release([PLANS[0].id, PLANS[1].id], "h")
    used = plans.get(PLANS[0].id)
    assert used is not None
    used.users = 1
    plans.add(BYTES[3], "h")
    assert held(plans) == [0, 2, 3]
    with pytest.raises(CapacityExceeded):
        plans.add(BYTES[4], "h")
    used.users = 0
    plans.add(BYTES[4], "h")
    assert held(plans) == [2, 3, 4]


def test_a_plan_that_was_dropped_comes_back_as_another() -> None:
    plans = filled(limit=3)
    old = plans.get(PLANS[0].id)
    for data in BYTES[3:]:
        plans.release([plans.add(data, "h")], "h")
    assert plans.get(PLANS[0].id) is None
    plans.add(BYTES[0], "h")
    new = plans.get(PLANS[0].id)
    assert new is not None
    assert new != old
    assert new.plan.id == PLANS[0].id


# -- programs -------------------------------------------------------------------------------------------


def three() -> Plan:
    return plan_of(add(0, [1, 2]), add(1, 2), add(2, 3))


def test_programs_hold_the_active_interventions_in_order() -> None:
    resident = Resident(three(), 1, {})
    programs = resident.programs(0b011)
    assert {p.layer for p in programs} == {1, 2}
    assert [b.intervention for b in programs[Place(2, Site.RESID_POST)].blocks] == [0, 1]
    assert [b.intervention for b in resident.programs(0b010)[Place(2, Site.RESID_POST)].blocks] == [1]
    assert resident.programs(0) == {}
    assert resident.programs(0b011) is programs


def test_compiled_masks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_MASKS", 2)
    resident = Resident(three(), 1, {})
    first = resident.programs(1)
    for mask in (2, 3, 4):
        resident.programs(mask)
    assert len(resident._programs) == 2
    again = resident.programs(1)
    assert again is not first
    assert again.keys() == first.keys()


def test_places_of_which_a_rank_holds_a_part_are_cut() -> None:
    both = plan_of(
        {"op": "heads", "heads": [[1, 0], [1, 1]], "factor": 0},
        {"op": "neurons", "neurons": {"inline": [[1, 2], [1, 12]]}, "value": 4},
        add(0, 1),
    )
    z, post = Place(1, Site.ATTN_Z), Place(1, Site.MLP_POST)
    shards = {z: Shard(D_HEAD, 2 * D_HEAD, HEADS * D_HEAD), post: Shard(D_FF // 2, D_FF, D_FF)}
    programs = Resident(both, 1, shards).programs(0b111)
    assert programs[z].width == D_HEAD
    columns = programs[post].blocks[0].write.columns
    assert columns is not None
    assert columns.tolist() == [2]
    assert programs[Place(1, Site.RESID_POST)].width == 8
