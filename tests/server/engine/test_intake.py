"""Where requests enter the engine: what a client wrote never passes for what the server wrote."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer, SlowIncrementalDetokenizer
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from steersman.server.engine import intake
from steersman.server.engine.frontend import Frontend, TicketKey
from steersman.server.engine.intake import FIELD, Refused
from steersman.server.engine.wire import KEY
from steersman.steering.errors import UnknownAsset
from steersman.steering.tokens import Selection
from tests.server.engine.fakes import parameters
from tests.server.fakes import Workers, frontend
from tests.steering.library import D, inline, noise

ADD = {"op": "add", "vector": inline(noise(D)), "layers": [1]}
STEERING = {"interventions": [ADD]}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Frontend]:
    made = frontend(tmp_path, Workers())
    made.behind_routes = False
    monkeypatch.setattr(Frontend, "_instance", made)
    yield made
    assert all(pin.users == 0 for pin in made._pins.values()) or made.tickets


def params(**extra: Any) -> SamplingParams:
    return SamplingParams(extra_args=extra or None)


def process(given: SamplingParams, ids: list[int] | None = None, embeds: bool = False, copies: bool = True) -> Any:
    """What ``process_inputs`` makes of a request's parameters."""

    def original(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        sampling = params.clone() if copies else params
        ids_ = None if embeds else (ids or [1, 2, 3])
        return SimpleNamespace(prompt_token_ids=ids_, mm_features=None, sampling_params=sampling)

    return intake._wrap_process_inputs(original)(None, "r", {}, given).sampling_params


def issue(made: Frontend, data: object = STEERING) -> Any:
    return asyncio.run(made.prepare(data))


def test_a_ticket_becomes_what_the_engine_reads(made: Frontend) -> None:
    ticket = issue(made)
    given = params(**{FIELD: ticket.key, "other": 1})
    found = process(given).extra_args
    assert set(found) == {"other", KEY}
    assert found[KEY]["plan"] == ticket.plan.id
    assert type(found[KEY]["key"]) is str
    assert Selection.from_json(found[KEY]["selection"]) == ticket.selections[0]
    assert given.extra_args[FIELD] == ticket.key
    made.finish(ticket)


def test_the_callers_own_parameters_are_not_written_to(made: Frontend) -> None:
    ticket = issue(made)
    given = params(**{FIELD: ticket.key})
    for ids in ([1, 2], [1, 2, 3, 4]):  # the parts of a streamed prompt share their parameters
        found = process(given, ids, copies=False).extra_args[KEY]
        assert found["selection"]["prompt_length"] == len(ids)
    assert set(given.extra_args) == {FIELD}
    made.finish(ticket)


def test_no_steering_no_change(made: Frontend) -> None:
    given = params(other=1)
    assert process(given).extra_args == {"other": 1}
    assert process(params()).extra_args is None


@pytest.mark.parametrize("forged", ["x", {}, {"plan": "p"}, 3])
def test_what_the_engine_trusts_cannot_be_forged(made: Frontend, forged: Any) -> None:
    with pytest.raises(Refused) as caught:
        process(params(**{KEY: forged}))
    assert caught.value.error.param == "vllm_xargs.steersman"
    ticket = issue(made)
    with pytest.raises(Refused):
        process(params(**{KEY: forged, FIELD: ticket.key}))
    made.finish(ticket)


@pytest.mark.parametrize(
    "forge", [lambda key: str(key), lambda key: "", lambda key: "steersman-ticket:abc", lambda key: 3]
)
def test_a_ticket_cannot_be_named_by_its_text(made: Frontend, forge: Any) -> None:
    ticket = issue(made)
    with pytest.raises(Refused) as caught:
        process(params(**{FIELD: forge(ticket.key)}))
    assert caught.value.error.status == 400
    made.finish(ticket)


def test_a_ticket_whose_request_has_ended(made: Frontend) -> None:
    ticket = issue(made)
    made.finish(ticket)
    with pytest.raises(Refused, match="has ended"):
        process(params(**{FIELD: ticket.key}))
    with pytest.raises(Refused):
        process(params(**{FIELD: TicketKey("unknown")}))


@pytest.mark.parametrize(
    ("tokens", "embeds", "param"),
    [
        ({"roles": ["user"]}, False, "steering.interventions[0].tokens.roles"),
        ({"text": "x"}, False, "steering.interventions[0].tokens.text"),
        ({"exclude": {"text": "x"}}, False, "steering.interventions[0].tokens.exclude.text"),
        ({"ranges": [[2, -3]]}, False, "steering.interventions[0].tokens.ranges[0]"),
        ("all", True, "steering"),
    ],
)
def test_prompts_that_cannot_be_steered(made: Frontend, tokens: Any, embeds: bool, param: str) -> None:
    """Without a tokenizer there is no text to find."""
    ticket = issue(made, {"interventions": [{**ADD, "tokens": tokens}]})
    with pytest.raises(Refused) as caught:
        process(params(**{FIELD: ticket.key}), embeds=embeds)
    assert caught.value.error is ticket.refused
    assert (caught.value.error.param, caught.value.http_status.value) == (param, 400)
    assert not ticket.selections
    made.finish(ticket)


# -- without an HTTP route --------------------------------------------------------------------------


class Queue:
    """What ``generate`` reads a request's outputs from."""


async def add(given: SamplingParams, outcome: Any = None) -> tuple[Any, Any]:
    seen = []

    async def original(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        seen.append(params)
        if isinstance(outcome, Exception):
            raise outcome
        return Queue()

    return await intake._wrap_async(original)(None, "r", {}, given), seen[0]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_steering_object_is_prepared_and_freed_with_the_request(made: Frontend, as_text: bool) -> None:
    async def run() -> None:
        queue, given = await add(params(**{FIELD: intake.json.dumps(STEERING) if as_text else STEERING}))
        assert list(made.tickets) == [given.extra_args[FIELD]]
        assert type(given.extra_args[FIELD]) is TicketKey
        del queue
        gc.collect()
        assert not made.tickets

    asyncio.run(run())


def test_a_request_that_is_not_taken_frees_its_ticket(made: Frontend) -> None:
    with pytest.raises(RuntimeError):
        asyncio.run(add(params(**{FIELD: STEERING}), RuntimeError("queue full")))
    assert not made.tickets


def test_behind_routes_only_routes_steer(made: Frontend) -> None:
    made.behind_routes = True
    with pytest.raises(Refused, match="does not steer"):
        asyncio.run(add(params(**{FIELD: STEERING})))
    assert not made.tickets
    assert asyncio.run(add(params()))[1].extra_args is None


@pytest.mark.parametrize(
    ("given", "error"), [("[1", "not JSON"), ("[" * 100_000, "not JSON"), ({"x": 1}, "unknown field")]
)
def test_what_is_no_steering_object_is_refused(made: Frontend, given: Any, error: str) -> None:
    with pytest.raises(Refused, match=error) as caught:
        asyncio.run(add(params(**{FIELD: given})))
    assert caught.value.error.status == 400


def test_the_status_goes_with_the_refusal(made: Frontend) -> None:
    with pytest.raises(Refused) as caught:
        asyncio.run(add(params(**{FIELD: {"interventions": [{"op": "add", "vector": "gone"}]}})))
    assert isinstance(caught.value.error, UnknownAsset)
    assert caught.value.http_status.value == 404


# -- replays ----------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]


@pytest.mark.parametrize(("asked", "wanted"), [(None, 0), (5, 5)])
def test_conflict_needs_the_likelihood_of_what_is_sampled(made: Frontend, asked: int | None, wanted: int) -> None:
    for signals, expected in (([], asked), (["conflict"], wanted)):
        ticket = asyncio.run(made.prepare({**STEERING, "signals": signals}, messages=CHAT))
        given = SamplingParams(logprobs=asked, extra_args={FIELD: ticket.key})
        assert process(given).logprobs == expected
        assert given.logprobs == asked
        made.finish(ticket)


def test_a_replayed_answer_is_no_part_of_the_prompt(made: Frontend) -> None:
    ticket = issue(made, {"interventions": [{**ADD, "tokens": "generated"}, {**ADD, "tokens": {"positions": [-1]}}]})
    again = made.again(ticket, 3)
    process(params(**{FIELD: again.key}), [1, 2, 3, 4, 5])
    (found,) = again.selections
    assert (found.prompt_length, found.runs, found.generated) == (3, ((2, 3, 0b10),), 0b01)
    assert (again.plan, again.pin.users) == (ticket.plan, 2)
    made.finish(again)
    made.finish(ticket)


@pytest.mark.parametrize("kind", ["none", "slow"])
@pytest.mark.parametrize("flat", [False, True])
def test_what_was_generated_and_how_likely_it_was(made: Frontend, kind: str, flat: bool) -> None:
    """By vLLM's own processor of outputs, whose state the engine goes on filling."""
    ticket = asyncio.run(made.prepare({**STEERING, "signals": ["conflict"]}, messages=CHAT))
    sampling = SamplingParams(logprobs=1, flat_logprobs=flat, extra_args={KEY: {"key": ticket.key}})
    request = SimpleNamespace(request_id="r", sampling_params=sampling, lora_request="lora", priority=4)
    logprobs = LogprobsProcessor.from_new_request(None, request)  # type: ignore[arg-type]
    detokenizer: Any = IncrementalDetokenizer()
    if kind == "slow":  # its tokens begin with the prompt's
        detokenizer = object.__new__(SlowIncrementalDetokenizer)
        detokenizer.prompt_len, detokenizer.token_ids = 2, [1, 2]
    state = SimpleNamespace(prompt_len=2, detokenizer=detokenizer, logprobs_processor=logprobs)

    def original(self: Any, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0) -> None:
        self.request_states["r"] = state

    intake._wrap_output(original)(SimpleNamespace(request_states={}), request, None)
    found = ticket.sequences["r"]
    assert (found.lora, found.priority, found.answer()) == ("lora", 4, ([], []))
    for token, value in ((7, -0.5), (9, -2.0)):
        detokenizer.token_ids.append(token)
        rows = np.array([[token, 3]]), np.array([[value, -0.1]], np.float32), np.array([1])
        logprobs._update_sample_logprobs(LogprobsLists(*rows))
    assert found.answer() == ([7, 9], [-0.5, -2.0])
    assert found.positions() == 3
    made.finish(ticket)


class State:
    """What the output processor keeps of a request."""


@pytest.mark.parametrize("parent", [False, True])
def test_an_engine_without_an_event_loop(made: Frontend, parent: bool) -> None:
    workers = made._rpc
    known = SimpleNamespace(request_states={}, parent_requests={})

    def original(self: Any, request_id: str, prompt: Any, params: Any) -> str:
        (known.parent_requests if parent else known.request_states)["inner"] = State()
        return "inner"

    def rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        assert workers is not None
        return asyncio.run(workers(method, *args))  # type: ignore[arg-type]

    engine = SimpleNamespace(output_processor=known, collective_rpc=rpc)
    assert intake._wrap_sync(original)(engine, "r", {}, params(**{FIELD: STEERING})) == "inner"
    assert len(made.tickets) == 1
    known.request_states.clear()
    known.parent_requests.clear()
    gc.collect()
    assert not made.tickets


# -- the contract with vLLM -------------------------------------------------------------------------


def test_what_is_wrapped_has_the_parameters_that_are_relied_on() -> None:
    assert "params" in parameters(AsyncLLM.add_request)
    assert "params" in parameters(LLMEngine.add_request)
    assert "params" in parameters(InputProcessor.process_inputs)


def test_a_ticket_survives_the_copying_of_parameters() -> None:
    key = TicketKey("k")
    assert type(params(**{FIELD: key}).clone().extra_args[FIELD]) is TicketKey
