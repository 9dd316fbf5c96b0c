"""``/v1/steering``: the served model, dry runs, and the server's default profile."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, ValidationError

from steersman.server import prompting
from steersman.server.access import admin
from steersman.server.answers import Json
from steersman.server.state import SteeringState, state_of
from steersman.steering import conflict, plan_lint, spec
from steersman.steering.assets import validation_error
from steersman.steering.errors import InvalidRequest, SteeringError, located
from steersman.steering.plan import Plan
from steersman.steering.spec import OPS
from steersman.steering.tokens import Prompt, Selection

router = APIRouter(prefix="/v1/steering")


class ResolveRequest(BaseModel):
    """A dry run: ``steering`` for a chat, a prompt, or token ids."""

    model_config = ConfigDict(extra="forbid")

    steering: Any = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[spec.Index] | None = None


_RESOLVE_BODY = {"requestBody": {"content": {"application/json": {"schema": ResolveRequest.model_json_schema()}}}}


@router.get("/model")
async def model(raw: Request) -> Response:
    """Layers, sites and widths that this server can steer, and the ops it knows."""
    frontend = state_of(raw.app).frontend
    return Json({**frontend.model.to_json(), **frontend.told, "ops": list(OPS), "limits": {
        "interventions": spec.MAX_INTERVENTIONS, "probes": spec.MAX_PROBES, "number": spec.MAX_NUMBER,
    }})  # fmt: skip


@router.post("/resolve", openapi_extra=_RESOLVE_BODY)
async def resolve(raw: Request) -> Response:
    """The plan that a steering object means, and which tokens of a prompt it edits, without running it."""
    body = await _body(raw, "body")
    try:
        request = ResolveRequest.model_validate(body)
    except ValidationError as error:
        raise validation_error(error) from None
    return Json(await asyncio.to_thread(_resolve, request, state_of(raw.app)))


@router.get("/default")
async def get_default(raw: Request) -> Response:
    """The profile that applies to every request that does not opt out; null when there is none."""
    default = await asyncio.to_thread(state_of(raw.app).frontend.server_default)
    return Json({"steering": None if default is None else default.model_dump(mode="json", exclude_unset=True)})


@router.put("/default", dependencies=[Depends(admin)])
async def put_default(raw: Request) -> Response:
    """Sets the default profile: a steering object, for instance ``{"profile": "calm"}``. It outlasts a restart."""
    body = await _body(raw, "steering")
    if body is None:
        raise InvalidRequest("must be a steering object; DELETE leaves the server without a default", "steering")
    await asyncio.to_thread(state_of(raw.app).frontend.set_default, body)
    return await get_default(raw)


@router.delete("/default", dependencies=[Depends(admin)])
async def delete_default(raw: Request) -> Response:
    """Leaves the server without a default profile, also when it was started with one."""
    await asyncio.to_thread(state_of(raw.app).frontend.set_default, None)
    return Response(status_code=204)


def attach(app: FastAPI) -> None:
    app.include_router(router)


def _describe(plan: Plan) -> dict[str, Any]:
    rows = sum(block.count for blocks in plan.blocks.values() for block in blocks)
    rows += sum(len(injection.targets) for injection in plan.injections)
    rows += sum(len(restoration.rows) for restoration in plan.restorations)
    return {
        "plan": plan.id,
        "interventions": [
            {
                "index": i,
                **step.about(),
                "path": step.path,
                "gated": step.gate >= 0,
            }
            for i, step in enumerate(plan.steps)
        ],
        "probes": list(plan.probe_names),
        "cost": {
            "places": len(plan.edited),
            "rows": rows,
            "bytes": len(plan.to_bytes()),
            "encodes": [
                {"for": use, "layer": place.layer, "site": place.site.value, **encode.cost()}
                for place, use, encode in plan.encodes
            ],
        },
        "warnings": list(plan.warnings),
    }


async def _body(raw: Request, param: str) -> Any:
    try:
        return await raw.json()
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON", param) from None


def _resolve(request: ResolveRequest, state: SteeringState) -> dict[str, Any]:
    asked = spec.parse({} if request.steering is None else request.steering)
    if request.messages is not None or request.prompt is not None:
        conflict.check_images(asked.signals, request.messages)
    plan, _ = state.frontend.with_signals(asked)
    out = _describe(plan)
    found = plan_lint.lint(plan, _usual_norms(state))
    out["warnings"] += [finding.message for finding in found.findings]
    out["unchecked"] = plan_lint.unchecked(plan, found)
    prompt = _prompt(request, state)
    if prompt is not None:
        try:
            selection = state.frontend.selection(plan, prompt)
        except SteeringError as error:
            error.param = error.param or "steering"
            raise
        out["prompt_tokens"] = prompt.length
        out["first_edited"] = selection.first if selection.anything else None
        for i, entry in enumerate(out["interventions"]):
            entry["prompt_positions"] = _positions(selection, i)
            entry["edits_generated"] = bool(selection.generated >> i & 1 or i in selection.rules)
            if not entry["prompt_positions"] and not entry["edits_generated"]:
                out["warnings"].append(f"{plan.steps[i].path}.tokens matches no token of this prompt")
    return out


def _usual_norms(state: SteeringState) -> dict[int, float]:
    """By layer, of the stream that leaves it; empty where the server has no baseline, or it is gone."""
    name = state.settings.norm_baseline
    with suppress(SteeringError):
        if name is not None:
            return {i: math.exp(m) for i, m in enumerate(state.frontend.resolver.library.baseline(name).mean)}
    return {}


def _prompt(request: ResolveRequest, state: SteeringState) -> Prompt | None:
    """The given prompt with finders of text and roles in it; None when none is given."""
    if request.messages is not None and request.prompt is not None:
        raise InvalidRequest("give either messages or a prompt", "messages")
    param, given = ("prompt", request.prompt) if request.messages is None else ("messages", request.messages)
    if given is None:
        return None
    with located(param):
        return prompting.read(given, state.frontend.tokenizer, prompting.template_options(state.serving)).prompt


def _positions(selection: Selection, index: int) -> list[list[int]]:
    """Half-open ranges of the prompt that an intervention edits."""
    out: list[list[int]] = []
    for a, b, mask in selection.runs:
        if mask >> index & 1:
            if out and out[-1][1] == a:
                out[-1][1] = b
            else:
                out.append([a, b])
    return out
