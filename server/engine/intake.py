"""Where requests enter vLLM: turning ``extra_args["steering"]`` into what the engine needs.

The contract with vLLM: every way into the engine (the OpenAI routes, Anthropic's, ``LLM.generate``) ends in
``AsyncLLM.add_request`` or ``LLMEngine.add_request`` with ``SamplingParams`` whose ``extra_args`` hold
``vllm_xargs``, and these call ``InputProcessor.process_inputs``, whose ``EngineCoreRequest`` has the
prompt's token ids, its images' places and a copy of the parameters of its own. ``collective_rpc`` of both engines
reaches the workers. ``SamplingParams.skip_reading_prefix_cache`` makes a request compute its whole prompt.

``extra_args["steering"]`` is a steering object, that object as a JSON string, or a :class:`Ticket`'s key,
when an HTTP route has already prepared it.
"""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any

from steersman.server.engine.frontend import Frontend, Ticket
from steersman.server.engine.wire import KEY, make_args
from steersman.steering.errors import InvalidRequest
from steersman.steering.tokens import Prompt, Selection

FIELD = "steering"


def patch() -> None:
    """Wraps vLLM's intake. Does nothing the second time."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    if hasattr(InputProcessor.process_inputs, "__wrapped__"):
        return
    AsyncLLM.add_request = _wrap_async(AsyncLLM.add_request)
    LLMEngine.add_request = _wrap_sync(LLMEngine.add_request)
    InputProcessor.process_inputs = _wrap_process_inputs(InputProcessor.process_inputs)


def _wrap_async(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = _given(bound.arguments["params"])
        if given is not None and not _is_ticket(given):
            frontend = await Frontend.of_async(self)
            ticket = await frontend.prepare(_decoded(given))
            bound.arguments["params"] = _with_ticket(bound.arguments["params"], ticket)
        return await original(*bound.args, **bound.kwargs)

    return add_request


def _wrap_sync(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = _given(bound.arguments["params"])
        if given is not None and not _is_ticket(given):
            ticket = Frontend.of_sync(self).prepare_now(_decoded(given), self.collective_rpc)
            bound.arguments["params"] = _with_ticket(bound.arguments["params"], ticket)
        return original(*bound.args, **bound.kwargs)

    return add_request


def _wrap_process_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        given = _given(params)
        if given is not None:
            ticket = Frontend.current().tickets[given]
            params.extra_args = {k: v for k, v in params.extra_args.items() if k != FIELD}
            params.extra_args[KEY] = _finish(ticket, request)
            if any(g.needs_whole_prompt for g in ticket.plan.gates):
                params.skip_reading_prefix_cache = True
        return request

    return process_inputs


def _finish(ticket: Ticket, request: Any) -> dict[str, Any]:
    """What the engine gets: the selection of this prompt's tokens."""
    if request.prompt_token_ids is None:
        raise InvalidRequest("a prompt given as embeddings cannot be steered", FIELD)
    ids = request.prompt_token_ids
    images = [p for f in request.mm_features or () if f.modality == "image" for p in _span(f.mm_position)]
    prompt = Prompt(ids, ticket.text_finder(ids), ticket.role_finder(ids), images)
    paths = [f"{step.path}.tokens" for step in ticket.plan.steps]
    selection = Selection.build(ticket.plan.selectors, prompt, paths)
    ticket.selections.append(selection)
    return make_args(ticket.plan, selection, ticket.key)


def _span(position: Any) -> range:
    return range(position.offset, position.offset + position.length)


def _given(params: Any) -> Any:
    extra = getattr(params, "extra_args", None)
    return extra.get(FIELD) if extra else None


def _is_ticket(given: Any) -> bool:
    return isinstance(given, str) and given.startswith(Ticket.PREFIX)


def _decoded(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise InvalidRequest(f"is not JSON: {error}", f"vllm_xargs.{FIELD}") from None


def _with_ticket(params: Any, ticket: Ticket) -> Any:
    """A copy of the parameters that carries the ticket's key."""
    params = params.clone()
    params.extra_args = {**params.extra_args, FIELD: ticket.key}
    return params
