import asyncio
from pathlib import Path
from typing import Any

import pytest

from steersman.server.engine.frontend import Answer, Frontend, Generated, Ticket, TicketKey, _Pin
from steersman.server.reports import Reports, _join, block, overdoses, refuse_overdose
from steersman.steering.errors import DosageExceeded, EngineUnsteered
from steersman.steering.plan import Plan
from steersman.steering.tokens import Prompt, Selection
from tests.server.fakes import Workers, frontend, raw_report
from tests.steering.library import D, inline, noise, plan_of

ADD = {"op": "add", "vector": inline(noise(D)), "layers": [1, 2]}
PROBE = {"vector": inline(noise(D)), "layers": [3]}
GATE = {"vector": inline(noise(D)), "layer": 0, "above": 0.0, "over": "prompt_mean"}


def nothing() -> Answer:
    return Answer([], [])


def ticket(plan: Plan, key: str = "k", prompts: tuple[int, ...] = (4,)) -> Ticket:
    paths = [f"{step.path}.tokens" for step in plan.steps]
    chosen = [Selection.build(plan.selectors, Prompt(range(n)), paths) for n in prompts]
    return Ticket(TicketKey(key), plan, _Pin(), selections=chosen)


def test_sums_become_means() -> None:
    plan = plan_of(ADD)
    raw = raw_report(plan, edited=[6], cached=[2], relative=[[0, 1, 3.0, 4], [0, 2, 1.0, 4]])
    found = block(ticket(plan), [raw], "layers")
    done = found["interventions"][0]
    assert found["plan"] == plan.id
    assert (done["tokens"], done["cached_tokens"], done["mean_relative_norm"]) == (8, 2, 0.5)
    assert done["by_layer"] == {"1": 0.75, "2": 0.25}
    assert (done["op"], done["layers"], done["site"], done["gate"]) == ("add", [1, 2], "resid_post", None)
    assert "by_layer" not in block(ticket(plan), [raw], "summary")["interventions"][0]
    assert "probes" not in found
    assert "warnings" not in found


def test_sequences_add_up() -> None:
    plan = plan_of(ADD, probes=[PROBE])
    raw = [
        raw_report(plan, edited=[3], request="r-0", probes=[[0, 3, 2, 4.0, 1.0, 3.0, 3.0]]),
        raw_report(plan, edited=[5], request="r-1", probes=[[0, 3, 2, 0.0, -2.0, 2.0, -2.0]]),
    ]
    found = block(ticket(plan), raw, "summary")
    assert found["interventions"][0]["tokens"] == 8
    assert found["interventions"][0]["mean_relative_norm"] == 0.5
    assert found["probes"][0]["layers"]["3"] == {"tokens": 4, "mean": 1.0, "min": -2.0, "max": 3.0, "last": -2.0}


def test_numbers_that_json_has_not_are_null() -> None:
    plan = plan_of(ADD, probes=[PROBE])
    infinite = float("inf")
    raw = raw_report(
        plan, relative=[[0, 1, float("nan"), 3]], probes=[[0, 3, 1, infinite, infinite, infinite, float("nan")]]
    )
    found = block(ticket(plan), [raw], "layers")
    assert found["interventions"][0]["mean_relative_norm"] is None
    assert found["interventions"][0]["by_layer"] == {"1": None}
    assert found["probes"][0]["layers"]["3"] == {"tokens": 1, "mean": None, "min": None, "max": None, "last": None}


def test_what_was_never_measured_is_null() -> None:
    plan = plan_of(ADD)
    assert (
        block(ticket(plan), [raw_report(plan, relative=[])], "summary")["interventions"][0]["mean_relative_norm"]
        is None
    )


def test_gates_say_what_they_decided() -> None:
    plan = plan_of({**ADD, "when": GATE})
    raw = [raw_report(plan, gates=[True], request="a"), raw_report(plan, gates=[False], request="b")]
    assert block(ticket(plan), raw, "summary")["interventions"][0]["gate"] == {
        "over": "prompt_mean",
        "open": [True, False],
    }


@pytest.mark.parametrize("raw", [[], None])
def test_a_request_without_a_report_was_not_steered(raw: Any) -> None:
    plan = plan_of(ADD)
    with pytest.raises(EngineUnsteered, match="no record"):
        block(ticket(plan), raw or [], "summary")


def test_an_error_on_any_sequence_is_the_requests() -> None:
    plan = plan_of(ADD)
    raw = [raw_report(plan), raw_report(plan, request="r-1", error="editing failed")]
    with pytest.raises(EngineUnsteered, match="editing failed"):
        block(ticket(plan), raw, "summary")


def test_a_selector_that_matches_nothing_is_a_warning() -> None:
    plan = plan_of({**ADD, "tokens": {"token_ids": [99]}}, {**ADD, "tokens": {"ranges": [[2, 2]]}})
    found = block(ticket(plan), [raw_report(plan)], "summary")
    assert found["warnings"] == [
        "steering.interventions[1].tokens matches no token of this request, so nothing was edited"
    ]


def test_one_prompt_of_several_without_a_match_is_a_warning() -> None:
    plan = plan_of({**ADD, "tokens": {"positions": [-3]}})
    assert "warnings" not in block(ticket(plan, prompts=(4, 5)), [raw_report(plan)], "summary")
    assert len(block(ticket(plan, prompts=(4, 2)), [raw_report(plan)], "summary")["warnings"]) == 1


def test_stages_of_one_sequence_are_joined() -> None:
    plan = plan_of(ADD, {**ADD, "when": GATE}, probes=[PROBE])
    first = raw_report(plan, gates=[None], relative=[[0, 1, 1.0, 2]])
    second = raw_report(plan, gates=[True], relative=[[0, 2, 3.0, 2]], probes=[[0, 3, 1, 1.0, 1.0, 1.0, 1.0]])
    other = raw_report(plan, request="r-1", gates=[False])
    joined = _join([[first, other], [second]])
    assert [r["request"] for r in joined] == ["r-0", "r-1"]
    assert joined[0]["relative"] == [[0, 1, 1.0, 2], [0, 2, 3.0, 2]]
    assert joined[0]["edited"] == [3, 3]
    assert joined[0]["gates"] == [True]
    assert len(joined[0]["probes"]) == 1


def test_a_stage_that_lacks_the_plan_makes_the_error_the_sequences() -> None:
    plan = plan_of({**ADD, "when": GATE})
    lacking = raw_report(plan, error="the plan was not resident", gates=[], relative=[])
    assert _join([[raw_report(plan, gates=[True])], [lacking]])[0]["error"] == "the plan was not resident"


# -- token by token -------------------------------------------------------------------------------------


def told(positions: list[int], columns: list[list[Any]], values: list[list[Any]]) -> dict[str, Any]:
    return {"positions": positions, "columns": columns, "values": values}


def test_every_token_of_every_sequence() -> None:
    """Of two sequences, the first of which is on two pipeline stages."""
    plan = plan_of(ADD, probes=[PROBE, {**PROBE, "layers": [1]}])
    edits = [[0, 1, "resid_post"], [0, 2, "resid_post"]]
    first = raw_report(plan, tokens=[{
        "probes": told([4, 5], [[1, 1]], [[0.5], [0.25]]), "edits": told([4, 5], edits, [[0.1, None], [None, None]]),
    }])  # fmt: skip
    later = raw_report(plan, relative=[], tokens=[{
        "probes": told([4, 5], [[0, 3]], [[1.0], [None]]), "edits": told([4, 5], edits, [[None, 0.2], [None, 0.3]]),
    }])  # fmt: skip
    other = raw_report(plan, request="r-1", tokens=[{
        "probes": told([7], [[0, 3], [1, 1]], [[3.0, 4.0]]), "edits": told([7], edits, [[0.5, 0.6]]),
    }])  # fmt: skip
    found = block(ticket(plan), _join([[first, other], [later]]), "tokens")
    assert found["sequences"] == [
        {
            "choice": 0,
            "positions": [4, 5],
            "probes": [
                {"index": 0, "asset": "inline", "layer": 3, "values": [1.0, None]},
                {"index": 1, "asset": "inline", "layer": 1, "values": [0.5, 0.25]},
            ],
            "interventions": [
                {"index": 0, "layer": 1, "site": "resid_post", "relative_norms": [0.1, None]},
                {"index": 0, "layer": 2, "site": "resid_post", "relative_norms": [0.2, 0.3]},
            ],
        },
        {
            "choice": 1,
            "positions": [7],
            "probes": [
                {"index": 0, "asset": "inline", "layer": 3, "values": [3.0]},
                {"index": 1, "asset": "inline", "layer": 1, "values": [4.0]},
            ],
            "interventions": [
                {"index": 0, "layer": 1, "site": "resid_post", "relative_norms": [0.5]},
                {"index": 0, "layer": 2, "site": "resid_post", "relative_norms": [0.6]},
            ],
        },
    ]
    assert "by_layer" in found["interventions"][0]
    assert "sequences" not in block(ticket(plan), [other], "layers")


def test_probes_are_asked_for_from_where_they_were_told(made: Frontend, workers: Workers) -> None:
    plan = plan_of(probes=[PROBE])
    of, fed, have = ticket(plan), {"a": 3, "b": 3}, {"a": 2, "b": 0}  # b's prompt is still being computed
    for i, name in enumerate("ab"):
        of.sequences[name] = Generated("p", i, lambda name=name: fed[name], nothing)  # type: ignore[misc]

    def probed(name: str, start: int, end: int) -> dict[str, Any]:
        positions = [*range(start, min(end, have[name]))]
        return told(positions, [[0, 3]], [[float(p)] for p in positions])

    workers.ranks, workers.probed = 1, probed

    async def run() -> list[Any]:
        reports, seen, out = Reports(made), dict[str, int](), []
        for more in (2, 3, 5, 5):
            fed.update(a=more + 1, b=more)
            out.append([(p["choice"], p["positions"]) for p in await reports.probed(of, seen)])
            have.update(a=more + 1, b=more)
        return out

    assert asyncio.run(run()) == [
        [(0, [0, 1])],
        [(0, [2]), (1, [0, 1])],
        [(0, [3]), (1, [2])],
        [(0, [4, 5]), (1, [3, 4])],
    ]


# -- the limit on an edit's size --------------------------------------------------------------------------


def test_edits_beyond_the_limit_are_warned_of_or_refused() -> None:
    plan = plan_of(ADD, ADD)
    raw = [
        raw_report(plan, over=[[0, 1, 3, 0.5], [0, 2, 4, 0.75]]),
        raw_report(plan, request="r-1", over=[[0, 1, 1, 0.625], [1, 2, 2, 0.6]]),
    ]
    found = overdoses(raw)
    assert [(o.index, o.tokens, o.layer, o.worst) for o in found] == [(0, 8, 2, 0.75), (1, 2, 2, 0.6)]
    said = (
        "steering.interventions[{}] changed the stream by {} of its norm at layer 2, more than the server's limit, {}"
    )
    warnings = [said.format(0, 0.75, "8 times in all"), said.format(1, 0.6, "2 times in all")]
    assert block(ticket(plan), raw, "summary")["warnings"] == warnings
    with pytest.raises(DosageExceeded, match=r"by 0.75 of its norm at layer 2; this server allows 0.4") as error:
        refuse_overdose(plan, raw, 0.4)
    assert error.value.param == "steering.interventions[0]"
    refuse_overdose(plan, [raw_report(plan)], 0.4)


# -- fetching ---------------------------------------------------------------------------------------


class Slow(Workers):
    """Answers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def __call__(self, method: str, *args: Any) -> list[Any]:
        answer = await super().__call__(method, *args)
        await self.go.wait()
        return answer


@pytest.fixture
def workers() -> Workers:
    return Workers(ranks=2)


@pytest.fixture
def made(tmp_path: Path, workers: Workers) -> Frontend:
    return frontend(tmp_path, workers)


def test_ranks_that_know_nothing_are_left_out(made: Frontend, workers: Workers) -> None:
    plan = plan_of(ADD)

    async def rpc(method: str, keys: list[str]) -> list[Any]:
        return [None, {key: [raw_report(plan)] for key in keys}]

    made._rpc = rpc
    assert asyncio.run(Reports(made).fetch(ticket(plan))) == [raw_report(plan)]


def test_requests_that_wait_share_one_call(tmp_path: Path) -> None:
    async def run() -> tuple[list[Any], int]:
        slow = Slow()
        slow.reports = lambda key: [{"request": key}]
        reports = Reports(frontend(tmp_path, slow))
        plan = plan_of(ADD)
        waiting = [asyncio.create_task(reports.fetch(ticket(plan, str(i)))) for i in range(9)]
        await asyncio.sleep(0.01)
        slow.go.set()
        return [r[0]["request"] for r in await asyncio.gather(*waiting)], len(slow.calls)

    found, calls = asyncio.run(run())
    assert found == [str(i) for i in range(9)]
    assert calls == 1


def test_sequences_are_in_the_order_of_the_choices(made: Frontend, workers: Workers) -> None:
    """Whichever ended first; and the workers are told how long each is."""
    plan = plan_of({**ADD, "when": GATE})
    asked: list[Any] = []

    async def rpc(method: str, what: dict[str, Any]) -> list[Any]:
        asked.append(what)
        return [{"k": [raw_report(plan, gates=[i == "0_b"], request=i) for i in ("1_b", "0_b", "1_a", "0_a")]}]

    made._rpc = rpc
    of = ticket(plan)
    for i in ("0_a", "0_b", "1_a", "1_b"):  # two prompts, two sequences of each
        of.sequences[i] = Generated(i[2:], int(i[0]), lambda: 7, nothing)
    found = asyncio.run(Reports(made).fetch(of))
    assert [r["request"] for r in found] == ["0_a", "1_a", "0_b", "1_b"]
    assert block(of, found, "summary")["interventions"][0]["gate"]["open"] == [False, False, True, False]
    assert asked == [{"k": dict.fromkeys(of.sequences, 7)}]


def test_a_failed_call_fails_those_that_wait_and_no_later_one(made: Frontend, workers: Workers) -> None:
    async def run() -> None:
        reports, plan = Reports(made), plan_of(ADD)
        workers.fail = RuntimeError("the engine is gone")
        waiting = [reports.fetch(ticket(plan, str(i))) for i in range(3)]
        for found in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(found, EngineUnsteered)
            assert "the engine is gone" in found.message
        workers.fail = None
        workers.reports = lambda key: [raw_report(plan)]
        assert await reports.fetch(ticket(plan)) == [raw_report(plan)]

    asyncio.run(run())


def test_answers_that_cannot_be_joined_leave_nobody_waiting(made: Frontend, workers: Workers) -> None:
    workers.reports = lambda key: [{"unexpected": 1}]
    with pytest.raises(EngineUnsteered):
        asyncio.run(asyncio.wait_for(Reports(made).fetch(ticket(plan_of(ADD))), 5))


def test_one_that_gives_up_does_not_disturb_the_others(tmp_path: Path) -> None:
    async def run() -> None:
        slow = Slow()
        slow.reports = lambda key: [{"request": key}]
        reports, plan = Reports(frontend(tmp_path, slow)), plan_of(ADD)
        impatient, patient = (asyncio.create_task(reports.fetch(ticket(plan, key))) for key in "ab")
        await asyncio.sleep(0.01)
        impatient.cancel()
        slow.go.set()
        assert (await patient)[0]["request"] == "b"

    asyncio.run(run())
