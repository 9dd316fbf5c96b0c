"""OpenAI's routes with ``steering``: each prepares the plan, calls vLLM's own handler, and adds the report.

The contract with vLLM: the modules below hold a request model and a route function ``(request, raw_request)`` that
returns a ``JSONResponse`` or a ``StreamingResponse`` of server-sent events; ``vllm_xargs`` of the request
end up in ``SamplingParams.extra_args``; a chat or completion stream ends with ``data: [DONE]``, and the
last chunk of each choice is the one with a ``finish_reason``; a responses stream ends with ``response.completed``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from steersman.server.engine.frontend import Ticket
from steersman.server.engine.intake import FIELD
from steersman.server.reports import block
from steersman.server.state import SteeringState, state_of
from steersman.steering.errors import InvalidRequest, SteeringError
from steersman.steering.spec import Steering

_DESCRIPTION = "what to edit inside the decoder layers for this request"


class SteeredChatRequest(ChatCompletionRequest):  # type: ignore[misc]
    steering: Any = Field(None, description=_DESCRIPTION)


class SteeredCompletionRequest(CompletionRequest):  # type: ignore[misc]
    steering: Any = Field(None, description=_DESCRIPTION)


class SteeredResponsesRequest(ResponsesRequest):  # type: ignore[misc]
    steering: Any = Field(None, description=_DESCRIPTION)


router = APIRouter()
_json = [Depends(validate_json_request)]


@router.post("/v1/chat/completions", dependencies=_json)
async def create_chat_completion(request: SteeredChatRequest, raw_request: Request) -> Response:
    """OpenAI's chat completions, steered."""
    return await _serve(request, raw_request, chat.create_chat_completion, _chat_context(request, raw_request))


@router.post("/v1/completions", dependencies=_json)
async def create_completion(request: SteeredCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's completions, steered."""
    return await _serve(request, raw_request, completion.create_completion, {})


@router.post("/v1/responses", dependencies=_json)
async def create_responses(request: SteeredResponsesRequest, raw_request: Request) -> Response:
    """OpenAI's responses, steered."""
    if request.background and _asked(request) is not None:
        raise InvalidRequest("steering does not work with background responses", FIELD)
    return await _serve(request, raw_request, responses.create_responses, {})


def attach(app: FastAPI) -> None:
    app.include_router(router)


async def _serve(request: Any, raw: Request, handler: Callable[..., Any], context: Mapping[str, Any]) -> Response:
    state = state_of(raw.app)
    given = _asked(request)
    request.steering = None
    if given is None and state.frontend.server_default() is None:
        return await handler(request, raw)  # type: ignore[no-any-return]
    if getattr(request, "use_beam_search", False):
        raise InvalidRequest("steering does not work with beam search: vLLM runs it as requests of its own", FIELD)
    data = {} if given is None else given
    with state.metrics.watching() as outcome:
        ticket = await state.frontend.prepare(data, **context)
        detail = data.get("report", "summary") if isinstance(data, dict) else "summary"
        request.vllm_xargs = {**(request.vllm_xargs or {}), FIELD: ticket.key}
        try:
            response = await handler(request, raw)
            if response is None or response.status_code >= 400:  # refused by vLLM, or the client has gone
                state.frontend.finish(ticket)
                outcome("refused")
                return response  # type: ignore[no-any-return]
            if isinstance(response, StreamingResponse):
                response.body_iterator = _stream(response.body_iterator, state, ticket, detail, request)
                return response
            report = await _report(state, ticket, detail)
        except BaseException:
            state.frontend.finish(ticket)
            raise
        state.frontend.finish(ticket)
        outcome("steered")
    return _with_report(response, report)


def _asked(request: Any) -> Any:
    """The request's steering object, from the field or from ``vllm_xargs``; None when it asks for none."""
    extra = request.vllm_xargs or {}
    if FIELD not in extra:
        return request.steering
    if request.steering is not None:
        raise InvalidRequest("steering is given twice, as a field and in vllm_xargs", f"vllm_xargs.{FIELD}")
    text = extra[FIELD]
    request.vllm_xargs = {k: v for k, v in extra.items() if k != FIELD}
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise InvalidRequest("must be the steering object as a JSON string", f"vllm_xargs.{FIELD}") from None


def _chat_context(request: Any, raw: Request) -> dict[str, Any]:
    """What finding roles in the prompt needs: the messages, and the chat template that renders them."""
    tokenizer = state_of(raw.app).frontend.tokenizer
    options = dict(request.chat_template_kwargs or {})
    if request.chat_template:
        options["chat_template"] = request.chat_template

    def render(messages: Any) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **options,
            )
        )

    return {"messages": request.messages, "render": render}


async def _report(state: SteeringState, ticket: Ticket, detail: str) -> dict[str, Any]:
    raw = await state.reports.fetch(ticket)
    report = block(ticket, raw, detail)
    state.metrics.observe(ticket.plan, report)
    return {"plan": report["plan"]} if detail == "none" else report


def _with_report(response: Response, report: dict[str, Any]) -> Response:
    """The same JSON object with one more member; its other bytes are left as they are."""
    body = bytes(response.body)
    headers = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
    return Response(_spliced(body, report), response.status_code, headers, "application/json")


def _spliced(body: bytes, report: dict[str, Any]) -> bytes:
    return body.rstrip()[:-1] + b',"steering":' + json.dumps(report).encode() + b"}"


async def _stream(
    events: AsyncIterator[Any], state: SteeringState, ticket: Ticket, detail: str, request: Any
) -> AsyncIterator[bytes]:
    """The events, the last one with the report. Only events that may be the last are held back."""
    held: bytes | None = None
    done = False
    try:
        async for event in events:
            data = event.encode() if isinstance(event, str) else bytes(event)
            if data.startswith(b"data: [DONE]") or not data.strip():
                done = True
                if held is not None:
                    yield await _last(held, state, ticket, detail)
                    held = None
                yield data
                continue
            if held is not None:
                yield held
                held = None
            if b'"finish_reason":"' in data or b'"choices":[]' in data or b"event: response.completed" in data:
                held = data
            else:
                yield data
        if held is not None:
            yield held if done else await _last(held, state, ticket, detail)
    finally:
        state.frontend.finish(ticket)


async def _last(event: bytes, state: SteeringState, ticket: Ticket, detail: str) -> bytes:
    """The stream's last event with the report, or with an error in its place when the edit was not made."""
    try:
        report = await _report(state, ticket, detail)
    except SteeringError as error:
        state.metrics.count("failed")
        return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
    state.metrics.count("steered")
    head, _, rest = event.partition(b"data: ")
    return head + b"data: " + _spliced(rest, report) + b"\n\n"


def describe(schemas: dict[str, Any]) -> None:
    """Adds the steering object's JSON schema to those of ``/openapi.json``, and to the requests that take it.

    The request models leave the object unparsed, so that its errors are ours and name the field.
    """
    whole = Steering.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update({**whole.pop("$defs", {}), "Steering": whole})
    for model in (SteeredChatRequest, SteeredCompletionRequest, SteeredResponsesRequest):
        if model.__name__ in schemas:
            field = schemas[model.__name__]["properties"]["steering"]
            field["anyOf"] = [{"$ref": "#/components/schemas/Steering"}, {"type": "null"}]
