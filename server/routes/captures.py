"""``/v1/steering/captures``: activations of the served model, taken as safetensors or kept under an id."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import Field

from steersman.server.access import admin
from steersman.server.answers import Json
from steersman.server.captures import Captured, capture
from steersman.server.policies.policy import PolicyPrompt
from steersman.server.policies.robots import robots_of
from steersman.server.prompting import Given
from steersman.server.routes import observations
from steersman.server.routes.gone import GONE, unless_gone
from steersman.server.state import state_of
from steersman.steering.activations import Reduction, to_parts
from steersman.steering.directions import chosen_layers
from steersman.steering.errors import InvalidRequest, located
from steersman.steering.sites import Site
from steersman.steering.spec import Index, Layers, Model, Tokens, checked

BINARY = "application/octet-stream"
router = APIRouter(prefix="/v1/steering/captures")


class Observed(Model):
    """What the served policy makes a prompt of: ``images``, ``instruction``, .. as in ``POST /v1/actions``."""

    observation: dict[str, Any]


class CaptureRequest(Model):
    """Activations of ``prompts`` at ``sites`` and ``layers``, after the edits that are made there."""

    prompts: Annotated[
        list[str | Annotated[list[Index], Field(min_length=1)] | list[dict[str, Any]] | Observed], Field(min_length=1)
    ] = Field(description="each a text, token ids, chat messages, or a robot's observation")
    sites: Annotated[list[Site], Field(min_length=1)] = Field([Site.RESID_POST])
    layers: Layers = "all"
    tokens: Tokens = Field("prompt", description="which of each prompt's tokens")
    reduce: Reduction = Field("none", description="each of them, their mean, or the last of them")
    steering: Any = Field(None, description="activations under this; without it, of the bare model")
    keep: bool = Field(False, description="keep them on the server; the answer is their id")


_REF = {"$ref": "#/components/schemas/SteeringCapture"}


@router.post("", openapi_extra={"requestBody": {"content": {"application/json": {"schema": _REF}}}})
async def take(raw: Request) -> Response:
    """Runs the prompts and answers with a safetensors file; ``keep`` needs the admin key, as it changes the server."""
    asked = checked(CaptureRequest, await _body(raw), "")
    state = state_of(raw.app)
    if asked.keep:
        await admin(raw)
    limit = state.settings.max_capture_prompts
    if len(asked.prompts) > limit:
        raise InvalidRequest(
            f"{len(asked.prompts)} prompts; at most {limit} (--steering-max-capture-prompts)", "prompts"
        )
    layers = None
    if asked.layers != "all":
        with located("layers"):
            layers = chosen_layers(asked.layers, (), state.frontend.model.n_layers)
    kept = state.frontend.kept
    refuse = kept.refuse if asked.keep else None
    prompts = [await _prompt(given, f"prompts[{i}]", raw) for i, given in enumerate(asked.prompts)]
    work = capture(state, prompts, asked.sites, layers, asked.tokens, asked.reduce, asked.steering, refuse)
    found = await unless_gone(raw, work)
    if found is None:
        return GONE
    if not asked.keep:
        return StreamingResponse(_parts(found), media_type=BINARY)
    capture_id = await asyncio.to_thread(kept.add, to_parts(found))
    return Json(await asyncio.to_thread(kept.describe, capture_id), 201)


@router.get("")
async def list_kept(raw: Request) -> Response:
    """The captures that are kept, with what they are of."""
    found = await asyncio.to_thread(state_of(raw.app).frontend.kept.list)
    return Json({"object": "list", "data": found})


@router.get("/{capture_id}")
async def fetch(capture_id: str, raw: Request) -> Response:
    """A kept capture's safetensors file."""
    with located("id"):
        path = await asyncio.to_thread(state_of(raw.app).frontend.kept.path, capture_id)
    return FileResponse(path, media_type=BINARY)


@router.delete("/{capture_id}", dependencies=[Depends(admin)])
async def remove(capture_id: str, raw: Request) -> Response:
    """Forgets a kept capture. Requests already accepted are not affected."""
    with located("id"):
        await asyncio.to_thread(state_of(raw.app).frontend.kept.remove, capture_id)
    return Response(status_code=204)


def attach(app: FastAPI) -> None:
    app.include_router(router)


def describe(schemas: dict[str, Any]) -> None:
    """Adds the request's JSON schema to those of ``/openapi.json``."""
    whole = CaptureRequest.model_json_schema(ref_template="#/components/schemas/SteeringCapture{model}")
    schemas.update({f"SteeringCapture{name}": part for name, part in whole.pop("$defs", {}).items()})
    schemas["SteeringCapture"] = whole


async def _prompt(given: Any, name: str, raw: Request) -> Given:
    if not isinstance(given, Observed):
        return given  # type: ignore[no-any-return]
    robots = robots_of(raw.app)

    def read() -> PolicyPrompt:
        body = json.dumps(given.observation).encode()
        asked = observations.ours(body, "application/json", robots.limits, robots.policy.cameras)
        if asked.steering is not None:
            raise InvalidRequest("goes beside the prompts", "steering")
        prompt = robots.policy.prompt(asked.observation)
        assert isinstance(prompt, PolicyPrompt), "these routes are of vLLM's server"
        return prompt

    with located(f"{name}.observation"):
        return await asyncio.to_thread(read)


def _parts(found: Captured) -> Iterator[bytes]:
    return (bytes(part) for part in to_parts(found))


async def _body(raw: Request) -> Any:
    try:
        body = await raw.json()
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON", "body") from None
    if not isinstance(body, dict):
        raise InvalidRequest("must be an object", "body")
    return body
