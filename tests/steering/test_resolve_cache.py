from pathlib import Path

import pytest

from steersman.steering import spec
from steersman.steering.assets import Asset
from steersman.steering.directions import Library
from steersman.steering.errors import (
    UnknownAsset,
)
from steersman.steering.resolve import Resolver
from steersman.steering.store import Store
from tests.steering.library import MODEL, D, asset, inline, noise, vector
from tests.steering.stock import solve, stock


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Store, Resolver]:
    store = stock(tmp_path)
    return store, Resolver(Library(store, MODEL), capacity=3)


def test_the_same_question_has_the_same_answer(fresh: tuple[Store, Resolver]) -> None:
    _, resolver = fresh
    first = solve(resolver, {"op": "add", "vector": "v", "strength": 2})
    assert solve(resolver, {"op": "add", "vector": "v", "scale": 2.0}) is first
    assert solve(resolver, {"op": "add", "vector": "v", "scale": 2.0}, report="none") is first
    assert solve(resolver, {"op": "add", "vector": "v", "scale": 2.5}) is not first


def test_a_new_version_is_a_new_plan_and_a_pinned_one_is_not(fresh: tuple[Store, Resolver]) -> None:
    store, resolver = fresh
    old = store.info("v").ref
    first = solve(resolver, {"op": "add", "vector": "v"})
    pinned = solve(resolver, {"op": "add", "vector": old})
    store.add(vector("v", noise(2, D, seed=5), [1, 3]))
    second = solve(resolver, {"op": "add", "vector": "v"})
    assert second.id != first.id
    assert second.steps[0].assets == (store.info("v").ref,)
    assert solve(resolver, {"op": "add", "vector": old}) is pinned
    store.remove("v")
    with pytest.raises(UnknownAsset):
        solve(resolver, {"op": "add", "vector": "v"})


def test_tokens_that_are_stated_are_not_those_of_the_asset(fresh: tuple[Store, Resolver]) -> None:
    _, resolver = fresh
    assets_own = solve(resolver, {"op": "add", "vector": "v"})
    stated = solve(resolver, {"op": "add", "vector": "v", "tokens": "all"})
    assert assets_own.steps[0].tokens != "all"
    assert stated.steps[0].tokens == "all"
    only_exclude = solve(resolver, {"op": "add", "vector": "v", "tokens": {"exclude": "prompt"}})
    nothing = solve(resolver, {"op": "add", "vector": "v", "tokens": {"prompt": False, "exclude": "prompt"}})
    assert only_exclude is not nothing
    assert only_exclude.id != nothing.id


def test_profiles_and_defaults_are_part_of_the_question(fresh: tuple[Store, Resolver]) -> None:
    store, resolver = fresh
    first = solve(resolver, profile="calm")
    store.add(asset("calm", "profile", steering={"interventions": [{"op": "ablate", "vector": "v"}]}))
    assert [s.op for s in solve(resolver, profile="calm").steps] == ["ablate"]
    assert [s.op for s in first.steps] == ["add"]
    default = spec.parse({"interventions": [{"op": "add", "vector": "v"}]})
    assert resolver.resolve(spec.parse({}), default).id != solve(resolver, {"op": "add", "vector": "v"}).id


def test_a_version_that_arrives_while_a_plan_is_built_is_not_mixed_in() -> None:
    old, new = vector("v", noise(1, D), [1]), vector("v", noise(1, D, seed=1), [1])

    class Moving:
        def __init__(self) -> None:
            self.answers = [old, new, new]

        def get(self, ref: str) -> Asset:
            return self.answers.pop(0)

    resolver = Resolver(Library(Moving(), MODEL))
    assert solve(resolver, {"op": "add", "vector": "v"}).steps[0].assets == (old.ref,)
    assert solve(resolver, {"op": "add", "vector": "v"}).steps[0].assets == (new.ref,)


def test_the_cache_is_bounded_in_plans_and_in_bytes(fresh: tuple[Store, Resolver]) -> None:
    _, resolver = fresh
    ask = [{"op": "add", "vector": inline(noise(D, seed=i)), "layers": 1} for i in range(5)]
    plans = [solve(resolver, a) for a in ask]
    assert solve(resolver, ask[4]) is plans[4]
    assert solve(resolver, ask[0]) is not plans[0]
    small = Resolver(resolver.library, capacity_bytes=plans[0].nbytes)
    first = solve(small, ask[0])
    assert solve(small, ask[0]) is first
    solve(small, ask[1])
    assert solve(small, ask[0]) is not first
    assert Resolver(resolver.library, capacity_bytes=0).resolve(spec.parse({"interventions": [ask[0]]})).steps
