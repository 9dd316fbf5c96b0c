"""Plans on the workers: sent once, pinned while a request may name them, given up when none does."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from steersman.server.engine import frontend as module
from steersman.server.engine.frontend import Frontend, merge_models
from steersman.steering.errors import (
    AssetKindMismatch,
    CapacityExceeded,
    EngineUnsteered,
    InvalidRequest,
    SteeringError,
    UnknownAsset,
)
from tests.server.fakes import Workers, frontend
from tests.steering.library import MODEL, D, inline, noise, vector


def steering(seed: int = 0) -> dict[str, Any]:
    return {"interventions": [{"op": "add", "vector": inline(noise(D, seed=seed)), "layers": [1]}]}


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def made(tmp_path: Path, workers: Workers) -> Frontend:
    return frontend(tmp_path, workers)


def test_a_plan_is_sent_once(made: Frontend, workers: Workers) -> None:
    async def run() -> None:
        first = await made.prepare(steering())
        made.finish(first)
        second = await made.prepare(steering())
        assert first.plan.id == second.plan.id
        assert first.key != second.key
        assert made.resident == 1

    asyncio.run(run())
    assert len(workers.sent()) == 1


def test_a_burst_of_the_same_plan_sends_it_once(made: Frontend, workers: Workers) -> None:
    async def run() -> None:
        tickets = await asyncio.gather(*(made.prepare(steering()) for _ in range(20)))
        assert len({t.key for t in tickets}) == len(made.tickets) == 20
        assert made._pins[tickets[0].plan.id].users == 20
        for ticket in tickets:
            made.finish(ticket)
            made.finish(ticket)
        assert made._pins[tickets[0].plan.id].users == 0

    asyncio.run(run())
    assert len(workers.sent()) == 1
    assert not made.tickets


@pytest.mark.parametrize("fail", [RuntimeError("gone"), EngineUnsteered("no")])
def test_a_failed_call_leaves_nothing_behind(made: Frontend, workers: Workers, fail: Exception) -> None:
    async def run() -> None:
        workers.fail = fail
        answers = await asyncio.gather(*(made.prepare(steering()) for _ in range(3)), return_exceptions=True)
        assert all(type(a) is type(fail) for a in answers)
        assert not made.tickets
        assert not made._pins
        workers.fail = None
        made.finish(await made.prepare(steering()))

    asyncio.run(run())


def test_what_a_failed_call_may_have_pinned_is_released_with_the_next(made: Frontend, workers: Workers) -> None:
    async def run() -> None:
        failed = made.resolve(steering(1)).id
        workers.fail = RuntimeError("one rank took it, the other did not")
        with pytest.raises(RuntimeError):
            await made.prepare(steering(1))
        workers.fail = None
        await made.prepare(steering(2))
        assert workers.sent()[-1][2] == [failed]
        await made.prepare(steering(3))
        assert workers.sent()[-1][2] == []

    asyncio.run(run())


def test_one_rank_that_refuses_refuses_the_plan(made: Frontend) -> None:
    async def rpc(method: str, *args: Any) -> list[Any]:
        return [{"plan": made.resolve(steering()).id}, {"error": "no compiler", "code": "engine_unsteered"}]

    made._rpc = rpc
    with pytest.raises(EngineUnsteered, match="no compiler"):
        asyncio.run(made.prepare(steering()))
    assert not made.tickets


def test_a_worker_that_reads_another_plan_is_found_out(made: Frontend) -> None:
    async def rpc(method: str, *args: Any) -> list[Any]:
        return [{"plan": "another"}]

    made._rpc = rpc
    with pytest.raises(EngineUnsteered, match="another plan"):
        asyncio.run(made.prepare(steering()))


def test_plans_in_use_are_kept_and_idle_ones_make_room(made: Frontend, workers: Workers) -> None:
    workers.capacity = 2

    async def run() -> None:
        used, idle = await made.prepare(steering(1)), await made.prepare(steering(2))
        made.finish(idle)
        third = await made.prepare(steering(3))
        assert set(workers.pinned) == {used.plan.id, third.plan.id}
        with pytest.raises(CapacityExceeded):
            await made.prepare(steering(4))
        assert set(workers.pinned) == {used.plan.id, third.plan.id}
        made.finish(used)
        made.finish(await made.prepare(steering(4)))
        assert set(made.tickets) == {third.key}

    asyncio.run(run())


def test_plans_that_nothing_has_used_for_long_are_given_up(
    made: Frontend, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        old = await made.prepare(steering(1))
        made.finish(old)
        now = time.monotonic()
        monkeypatch.setattr(module.time, "monotonic", lambda: now + module.IDLE_SECONDS + 1)
        await made.prepare(steering(2))
        assert workers.sent()[-1][2] == [old.plan.id]

    asyncio.run(run())


class Gated(Workers):
    """Takes a call at once and answers it when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def __call__(self, method: str, *args: Any) -> list[Any]:
        answer = await super().__call__(method, *args)
        await self.go.wait()
        return answer


def test_a_plan_named_while_it_is_being_released_is_sent_again(tmp_path: Path) -> None:
    async def run() -> None:
        workers = Gated()
        workers.go.set()
        made = frontend(tmp_path, workers)
        workers.capacity = 1
        idle = await made.prepare(steering(1))
        made.finish(idle)
        workers.go.clear()
        other = asyncio.create_task(made.prepare(steering(2)))
        while len(workers.sent()) < 2:
            await asyncio.sleep(0.005)
        workers.capacity = 5
        again = asyncio.create_task(made.prepare(steering(1)))
        await asyncio.sleep(0.05)
        workers.go.set()
        tickets = [await other, await again]
        assert set(workers.pinned) >= {t.plan.id for t in tickets}
        for ticket in tickets:
            made.finish(ticket)

    asyncio.run(run())


def test_a_plan_just_loaded_is_not_taken_for_an_idle_one(made: Frontend, workers: Workers) -> None:
    workers.capacity = 4

    async def run() -> None:
        tickets = await asyncio.gather(*(made.prepare(steering(seed)) for seed in range(4)))
        assert set(workers.pinned) == {t.plan.id for t in tickets}
        for ticket in tickets:
            made.finish(ticket)

    asyncio.run(run())


def test_one_that_gives_up_takes_nothing_from_the_others(tmp_path: Path) -> None:
    async def run() -> None:
        workers = Gated()
        made = frontend(tmp_path, workers)
        impatient, patient = (asyncio.create_task(made.prepare(steering())) for _ in range(2))
        while not workers.sent():
            await asyncio.sleep(0.005)
        impatient.cancel()
        await asyncio.sleep(0.01)
        workers.go.set()
        ticket = await patient
        assert set(made.tickets) == {ticket.key}
        assert made._pins[ticket.plan.id].users == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "error", "param"),
    [
        ({"interventions": [{"op": "add", "vector": "gone"}]}, UnknownAsset, "steering.interventions[0].vector"),
        ({"profile": "gone"}, UnknownAsset, "steering.profile"),
        ({"profile": "nested"}, InvalidRequest, "steering.profile"),
        ({"profile": "v"}, AssetKindMismatch, "steering.profile"),
        ([], InvalidRequest, "steering"),
    ],
)
def test_what_cannot_be_resolved_never_reaches_the_workers(
    made: Frontend, workers: Workers, data: object, error: type[SteeringError], param: str
) -> None:
    with pytest.raises(error) as caught:
        asyncio.run(made.prepare(data))
    assert caught.value.param == param
    assert not workers.calls
    assert not made.tickets


def test_without_an_event_loop(made: Frontend, workers: Workers) -> None:
    def rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        return asyncio.run(workers(method, *args))

    for _ in range(2):
        made.finish(made.prepare_now(steering(), rpc))
    assert len(workers.sent()) == 1
    workers.fail = RuntimeError("gone")
    with pytest.raises(RuntimeError):
        made.prepare_now(steering(2), rpc)
    assert not made.tickets
    assert not made._pins
    workers.fail = None
    released = made.resolve(steering()).id
    made.prepare_now(steering(3), rpc)
    assert set(workers.sent()[-1][2]) == {released, made.resolve(steering(2)).id}


# -- the default profile ----------------------------------------------------------------------------


def ops(made: Frontend, data: object) -> list[str]:
    return [step.path for step in made.resolve(data).steps]


def test_the_default_applies_first_unless_left_out(made: Frontend) -> None:
    made.set_default({"profile": "calm"})
    own = {"op": "add", "vector": "v", "layers": [1]}
    assert ops(made, {}) == ["default.profile.interventions[0]"]
    assert ops(made, {"interventions": [own]}) == ["default.profile.interventions[0]", "steering.interventions[0]"]
    assert ops(made, {"interventions": [own], "default": False}) == ["steering.interventions[0]"]
    made.set_default(None)
    assert ops(made, {}) == []


def test_the_default_survives_a_restart_and_is_kept_once(made: Frontend, tmp_path: Path) -> None:
    made.set_default({"profile": "calm"})
    made.set_default({"interventions": [{"op": "ablate", "vector": "v"}]})
    assert [i.name for i in made.store.list(kind="profile")].count("server-default.tiny") == 1
    assert ops(frontend(tmp_path), {}) == ["default.interventions[0]"]


def test_a_default_given_as_a_setting(tmp_path: Path) -> None:
    made = frontend(tmp_path, default_profile="calm")
    assert ops(made, {}) == ["default.profile.interventions[0]"]
    made.set_default(None)
    assert asyncio.run(made.default()) is None
    assert ops(made, {}) == []
    made.set_default({"interventions": [{"op": "ablate", "vector": "v"}]})
    assert ops(made, {}) == ["default.interventions[0]"]


def test_a_default_that_cannot_be_resolved_is_not_taken(made: Frontend) -> None:
    for bad in ({"profile": "gone"}, {"profile": "nested"}, {"op": "add"}, []):
        with pytest.raises(SteeringError):
            made.set_default(bad)
    assert made.server_default() is None


def test_a_default_that_breaks_stops_requests_but_not_those_without_it(tmp_path: Path) -> None:
    made = frontend(tmp_path, default_profile="gone")
    with pytest.raises(UnknownAsset) as caught:
        made.resolve({})
    assert caught.value.param == "default.profile"
    assert ops(made, {"profile": "calm", "default": False}) == ["steering.profile.interventions[0]"]


def test_an_asset_in_the_defaults_place_that_is_none(made: Frontend) -> None:
    made.store.add(vector("server-default.tiny", noise(1, D), [1]))
    with pytest.raises(AssetKindMismatch):
        asyncio.run(made.prepare({}))
    assert ops(made, {"profile": "calm", "default": False}) == ["steering.profile.interventions[0]"]


def test_the_default_is_not_looked_up_for_every_request(made: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    original = made.server_default
    monkeypatch.setattr(made, "server_default", lambda: looked.append(1) or original())

    async def run() -> None:
        for _ in range(50):
            await made.default()

    asyncio.run(run())
    assert len(looked) == 1
    made.set_default({"profile": "calm"})
    found = asyncio.run(made.default())
    assert found is not None
    assert found.profile == "calm"


def test_what_the_default_uses(made: Frontend) -> None:
    made.set_default({"profile": "calm", "probes": [{"vector": "mid"}]})
    assert {ref.partition("@")[0] for ref in made.used_by_default()} == {"calm", "v", "mid"}
    made.set_default(None)
    assert made.used_by_default() == set()


def test_ranks_make_one_model() -> None:
    sites = {site: {layer: w for layer, w in widths.items() if layer < 2} for site, widths in MODEL.sites.items()}
    rest = {site: {layer: w for layer, w in widths.items() if layer >= 2} for site, widths in MODEL.sites.items()}
    parts = [
        {**MODEL.to_json(), "widths": {s.value: {str(k): v for k, v in w.items()} for s, w in part.items()}}
        for part in (sites, rest)
    ]
    assert merge_models([parts[0], None, parts[1], None]).sites == MODEL.sites
