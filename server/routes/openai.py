"""OpenAI's routes with ``steering``: each prepares the plan, calls vLLM's own handler, and adds the report.

The contract with vLLM: the modules below hold a request model and a route function ``(request, raw_request)`` that
returns a ``JSONResponse``, a ``StreamingResponse`` of server-sent events, or None when the client has gone;
``vllm_xargs`` of the request end up in ``SamplingParams.extra_args``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from steersman.server.engine.frontend import Ticket
from steersman.server.engine.intake import FIELD, XARGS
from steersman.server.engine.wire import KEY
from steersman.server.routes import streams
from steersman.server.routes.served import Served, spliced
from steersman.server.state import state_of
from steersman.steering.conflict import without_images
from steersman.steering.errors import EngineUnsteered, InvalidRequest
from steersman.steering.plan import Plan
from steersman.steering.spec import Steering

LIVE = f"{FIELD}.stream_probes"
_DESCRIPTION = "what to edit inside the decoder layers for this request"


class SteeredChatRequest(ChatCompletionRequest):  # type: ignore[misc]
    steering: Any = Field(None, description=_DESCRIPTION)


class SteeredCompletionRequest(CompletionRequest):  # type: ignore[misc]
    steering: Any = Field(None, description=_DESCRIPTION)


class SteeredResponsesRequest(ResponsesRequest):  # type: ignore[misc]
    steering: Any = Field(None, description=_DESCRIPTION)


class Route(APIRoute):
    """A route whose bodies that Python's JSON reader cannot go down into are answered like other bad bodies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HTTPException as error:
                if isinstance(error.__cause__, RecursionError):
                    raise InvalidRequest("the body is nested too deeply", "body") from None
                raise

        return handle


router = APIRouter(route_class=Route)
_json = [Depends(validate_json_request)]


@router.post("/v1/chat/completions", dependencies=_json)
async def create_chat_completion(request: SteeredChatRequest, raw_request: Request) -> Response:
    """OpenAI's chat completions, steered."""
    return await _serve(request, raw_request, chat.create_chat_completion, chat_context(request, raw_request))


@router.post("/v1/completions", dependencies=_json)
async def create_completion(request: SteeredCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's completions, steered."""
    return await _serve(request, raw_request, completion.create_completion, {})


@router.post("/v1/responses", dependencies=_json)
async def create_responses(request: SteeredResponsesRequest, raw_request: Request) -> Response:
    """OpenAI's responses, steered."""
    return await _serve(request, raw_request, responses.create_responses, {})


def attach(app: FastAPI) -> None:
    app.include_router(router)


async def _serve(request: Any, raw: Request, handler: Callable[..., Any], context: Mapping[str, Any]) -> Response:
    state = state_of(raw.app)
    given = request.steering is not None or any(key in (request.vllm_xargs or ()) for key in (FIELD, KEY))
    if not given and await state.frontend.default() is None:
        return await handler(request, raw)  # type: ignore[no-any-return]
    with state.metrics.watching() as outcome:
        data = _asked(request)
        with state.metrics.building.time():
            ticket = await state.frontend.prepare({} if data is None else data, **context)
        asked = data if isinstance(data, dict) else {}
        served = Served(state, ticket, asked.get("report", "summary"), bool(asked.get("stream_probes")))
        try:
            state.metrics.plans.set(state.frontend.resident)
            if served.live and not request.stream:
                raise InvalidRequest("goes with a stream alone; report tokens tells the same of a whole answer", LIVE)
            if not _can_steer(request, ticket.plan):
                response = await handler(request, raw)
                outcome("steered")
                return response  # type: ignore[no-any-return]
            request.vllm_xargs = {**(request.vllm_xargs or {}), FIELD: ticket.key}
            response = await _call(handler, request, raw, ticket)
            if response is None or response.status_code >= 400:
                outcome("cancelled" if response is None else "refused" if response.status_code < 500 else "failed")
            elif isinstance(response, StreamingResponse):
                response = await streams.steered(response, raw, served)
                if response is None:
                    outcome("cancelled")
            else:
                _add(response, await served.report())
                outcome("steered")
        finally:
            if not served.streaming:
                state.frontend.finish(ticket)
    return response  # type: ignore[no-any-return]  # None, as vLLM's handlers do it, is read by nobody


async def _call(handler: Callable[..., Any], request: Any, raw: Request, ticket: Ticket) -> Any:
    """vLLM's answer. What it says of a prompt that cannot be steered is put as we put it."""
    try:
        response = await handler(request, raw)
    except Exception:
        if ticket.refused is not None:
            raise ticket.refused from None
        raise
    if ticket.refused is not None:
        raise ticket.refused
    return response


def _can_steer(request: Any, plan: Plan) -> bool:
    """False where nothing is asked for, of requests that cannot be steered: those that are asked are refused."""
    if getattr(request, "use_beam_search", False):
        reason = "steering does not work with beam search: vLLM runs it as requests of its own"
    elif getattr(request, "background", False):
        reason = "steering does not work with background responses"
    else:
        return True
    if plan.steps or plan.probe_names:
        raise InvalidRequest(reason, FIELD)
    return False


def _asked(request: Any) -> Any:
    """Takes the steering object out of the request: its field, or the text in ``vllm_xargs``; None when it has none."""
    data, request.steering = request.steering, None
    extra = request.vllm_xargs or {}
    if KEY in extra:
        raise InvalidRequest(f"{KEY} is set by the server alone", f"vllm_xargs.{KEY}")
    if FIELD not in extra:
        return data
    if data is not None:
        raise InvalidRequest("steering is given twice, as a field and in vllm_xargs", XARGS)
    text = extra[FIELD]
    request.vllm_xargs = {k: v for k, v in extra.items() if k != FIELD}
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest("must be the steering object as a JSON string", XARGS) from None


def chat_context(request: Any, raw: Request) -> dict[str, Any]:
    """What finding roles in the prompt and replaying its answer need: the messages, and how the server renders them.

    The contract with vLLM: ``request.build_chat_params`` and the chat handler's ``chat_template`` and
    ``default_chat_template_kwargs`` say what the template is called with; tools go with it unless the server leaves
    them out. ``render_chat_request(request)`` of the handler makes a chat's prompt ready for the engine: it returns a
    pair, whose second is a list of one prompt, or an error response.
    """
    handler = getattr(raw.app.state, "openai_serving_chat", None)
    args = getattr(raw.app.state, "args", None)

    def render(messages: Sequence[Any]) -> str:
        params = request.build_chat_params(getattr(handler, "chat_template", None), "auto")
        defaults = getattr(handler, "default_chat_template_kwargs", None)
        options = {**(defaults or {}), **{k: v for k, v in params.chat_template_kwargs.items() if v is not None}}
        if params.chat_template is not None:
            options["chat_template"] = params.chat_template
        if request.tools and not (
            request.tool_choice == "none" and getattr(args, "exclude_tools_when_tool_choice_none", False)
        ):
            options["tools"] = [tool.model_dump() for tool in request.tools]
        tokenizer = state_of(raw.app).frontend.tokenizer
        return str(tokenizer.apply_chat_template(list(messages), **{**options, "tokenize": False}))

    async def ready() -> Any:
        plain = request.model_copy(update={"messages": without_images(request.messages)})
        found = await handler.render_chat_request(plain)  # type: ignore[union-attr]
        if not isinstance(found, tuple):
            raise EngineUnsteered(f"the messages without images are not taken: {found.error.message}")
        _, (prompt,) = found
        return prompt

    return {"messages": request.messages, "render": render, "without_images": ready}


def _add(response: Response, report: Mapping[str, Any]) -> None:
    """Adds a member to the response's JSON object; its other bytes are left as they are."""
    response.body = spliced(bytes(response.body), report)
    response.headers["content-length"] = str(len(response.body))


def describe(schemas: dict[str, Any]) -> None:
    """Adds the steering object's JSON schema to those of ``/openapi.json``, and to the requests that take it.

    The request models leave the object unparsed, so that its errors are ours and name the field.
    """
    whole = Steering.model_json_schema(ref_template="#/components/schemas/Steering{model}")
    parts = {f"Steering{name}": part for name, part in whole.pop("$defs", {}).items()}
    schemas.update({**parts, "Steering": whole})
    for model in (SteeredChatRequest, SteeredCompletionRequest, SteeredResponsesRequest):
        if model.__name__ in schemas:
            field = schemas[model.__name__]["properties"]["steering"]
            field["anyOf"] = [{"$ref": "#/components/schemas/Steering"}, {"type": "null"}]
