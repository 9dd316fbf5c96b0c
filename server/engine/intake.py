"""Where requests enter vLLM: turning ``extra_args["steering"]`` into what the engine needs.

The contract with vLLM: every way into the engine (the OpenAI routes, Anthropic's, ``LLM.generate``) ends in
``AsyncLLM.add_request`` or ``LLMEngine.add_request`` with ``SamplingParams`` whose ``extra_args`` hold
``vllm_xargs``, and these call ``InputProcessor.process_inputs``, whose ``EngineCoreRequest`` has the
prompt's token ids, its images' places (see ``images``) and a copy of the parameters of its own. ``collective_rpc`` of
both engines reaches the workers. ``SamplingParams.skip_reading_prefix_cache`` makes a request compute its whole prompt.
Each sequence then goes through ``OutputProcessor.add_request(request, prompt, parent_req, request_index)`` under the id
that the engine knows it by, and its entry in ``request_states`` counts the tokens of the response
(``prompt_len``, ``detokenizer.num_output_tokens()``), which the engine may have run past. With
``SamplingParams.logprobs`` it has ln p of ``detokenizer.output_token_ids`` in ``logprobs_processor.logprobs``, a
mapping by id for each, streamed or not.

``extra_args["steering"]`` is a steering object, that object as a JSON string, or a :class:`TicketKey`
when an HTTP route has already prepared it: a type, so that nothing that a client writes can pass for one. For the same
reason ``extra_args["steersman"]``, which the engine trusts, is refused here.

What cannot be steered is raised as :class:`Refused`, which ``AsyncLLM.generate`` lets pass as it is; any other
exception it would turn into an internal error.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from vllm import exceptions

from steersman.server.engine.frontend import Answer, Frontend, Generated, Ticket, TicketKey
from steersman.server.engine.images import prompt_images
from steersman.server.engine.wire import KEY, args_of, make_args
from steersman.steering.errors import InvalidRequest, SteeringError
from steersman.steering.tokens import Prompt

FIELD = "steering"
XARGS = f"vllm_xargs.{FIELD}"
_Passing: Any = getattr(exceptions, "GracefulHTTPError", ValueError)  # older versions let a ValueError pass


class Refused(_Passing):  # type: ignore[misc]
    """A SteeringError on its way through vLLM, which answers it with the same status and message."""

    def __init__(self, error: SteeringError) -> None:
        arguments = (error.message,) if _Passing is ValueError else (error.message, HTTPStatus(error.status))
        super().__init__(*arguments)
        self.error = error


@contextmanager
def _refusing(ticket: Ticket | None = None) -> Iterator[None]:
    try:
        yield
    except SteeringError as error:
        error.param = error.param or FIELD
        if ticket is not None:
            ticket.refused = error
        raise Refused(error) from error


def patch() -> None:
    """Wraps vLLM's intake. Does nothing the second time."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor

    if hasattr(InputProcessor.process_inputs, "__wrapped__"):
        return
    AsyncLLM.add_request = _wrap_async(AsyncLLM.add_request)
    LLMEngine.add_request = _wrap_sync(LLMEngine.add_request)
    InputProcessor.process_inputs = _wrap_process_inputs(InputProcessor.process_inputs)
    OutputProcessor.add_request = _wrap_output(OutputProcessor.add_request)


def _wrap_async(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = _given(bound.arguments["params"])
        if given is None or isinstance(given, TicketKey):
            return await original(*bound.args, **bound.kwargs)
        with _refusing():
            frontend = await Frontend.of_async(self)
            if frontend.behind_routes:
                raise InvalidRequest("this route does not steer", XARGS)
            ticket = await frontend.prepare(_decoded(given))
        try:
            bound.arguments["params"] = _with_ticket(bound.arguments["params"], ticket)
            queue = await original(*bound.args, **bound.kwargs)
        except BaseException:
            frontend.finish(ticket)
            raise
        weakref.finalize(queue, frontend.finish, ticket)  # generate() holds it until the request has ended
        return queue

    return add_request


def _wrap_sync(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = _given(bound.arguments["params"])
        if given is None or isinstance(given, TicketKey):
            return original(*bound.args, **bound.kwargs)
        with _refusing():
            frontend = Frontend.of_sync(self)
            ticket = frontend.prepare_now(_decoded(given), self.collective_rpc)
        try:
            bound.arguments["params"] = _with_ticket(bound.arguments["params"], ticket)
            request_id = original(*bound.args, **bound.kwargs)
            known = self.output_processor
            state = known.request_states.get(request_id) or known.parent_requests[request_id]
        except BaseException:
            frontend.finish(ticket)
            raise
        weakref.finalize(state, frontend.finish, ticket)  # the output processor holds it until the request has ended
        return request_id

    return add_request


def _wrap_process_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        given = _given(request.sampling_params)
        if KEY in (getattr(request.sampling_params, "extra_args", None) or ()):
            with _refusing():
                raise InvalidRequest(f"{KEY} is set by the server alone", f"vllm_xargs.{KEY}")
        if given is not None:
            params = request.sampling_params = copy.copy(request.sampling_params)  # it may be the caller's own
            ticket = _ticket(given)
            others = {k: v for k, v in params.extra_args.items() if k != FIELD}
            params.extra_args = {**others, KEY: _finish(ticket, request)}
            if ticket.capture is not None or any(g.needs_whole_prompt for g in ticket.plan.gates):
                params.skip_reading_prefix_cache = True
            if ticket.conflict and params.logprobs is None:
                params.logprobs = 0  # of the sampled tokens alone
        return request

    return process_inputs


def _wrap_output(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        Frontend.count()
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        request, parent = bound.arguments["request"], bound.arguments["parent_req"]
        ours = args_of(request.sampling_params)
        ticket = Frontend.current().tickets.get(ours["key"]) if ours else None
        if ticket is not None:
            name = (parent or request).request_id
            state = self.request_states[request.request_id]
            ticket.sequences[request.request_id] = Generated(
                name,
                bound.arguments["request_index"],
                _counter(state),
                functools.partial(_answer, state),
                request.lora_request,
                request.priority,
            )

    return add_request


def _counter(state: Any) -> Callable[[], int]:
    """Counts the tokens that a sequence's response needed: the last generated one is not fed in."""
    length, detokenizer = state.prompt_len, state.detokenizer
    return lambda: int(length + max(detokenizer.num_output_tokens() - 1, 0))


def _answer(state: Any) -> Answer:
    """The tokens of a sequence's response."""
    ids = [int(i) for i in state.detokenizer.output_token_ids]
    rows = state.logprobs_processor.logprobs or ()
    return Answer(ids, [float(row[i].logprob) for row, i in zip(rows, ids, strict=bool(rows))])


def _ticket(given: Any) -> Ticket:
    found = Frontend.current().tickets.get(given) if isinstance(given, TicketKey) else None
    if found is None:
        with _refusing():
            raise InvalidRequest("this way into the engine does not steer, or its request has ended", XARGS)
    return found


def _finish(ticket: Ticket, request: Any) -> dict[str, Any]:
    """What the engine gets: the selection of this prompt's tokens."""
    with _refusing(ticket):
        if request.prompt_token_ids is None:
            raise InvalidRequest("a prompt given as embeddings cannot be steered", FIELD)
        ids = request.prompt_token_ids[: ticket.prompt_tokens]
        images = prompt_images(request.mm_features)
        prompt = Prompt(ids, ticket.text_finder(ids), ticket.role_finder(ids), images)
        selection = Frontend.current().selection(ticket.plan, prompt)
    ticket.selections.append(selection)
    return make_args(ticket.plan, selection, str(ticket.key), ticket.whole, ticket.capture, ticket.signals)


def _given(params: Any) -> Any:
    extra = getattr(params, "extra_args", None)
    return extra.get(FIELD) if extra else None


def _decoded(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"is not JSON: {error}", XARGS) from None


def _with_ticket(params: Any, ticket: Ticket) -> Any:
    """A copy of the parameters that carries the ticket's key."""
    params = params.clone()
    params.extra_args = {**params.extra_args, FIELD: ticket.key}
    return params
