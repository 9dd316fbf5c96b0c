"""``POST /v1/actions``, the robots' own route, and ``POST /act``, OpenVLA's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from steersman.clients import arrays
from steersman.server import access
from steersman.server.answers import Json
from steersman.server.policies.robots import Acted, Robots, robots_of
from steersman.server.routes import observations
from steersman.server.routes.gone import GONE, unless_gone

router = APIRouter()
_BODY = {"requestBody": {"content": {"application/json": {"schema": {
    "type": "object",
    "required": ["instruction"],
    "additionalProperties": False,
    "properties": {
        "images": {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}},
        "instruction": {"type": "string"},
        "state": {"type": "array", "items": {"type": "number"}},
        "unnorm_key": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0},
        "steering": {"$ref": "#/components/schemas/Steering"},
    },
}}}}}  # fmt: skip


@router.post("/v1/actions", openapi_extra=_BODY)
async def actions(raw: Request) -> Response:
    """Observation to actions: ``images``, ``instruction``, ``state``, ``unnorm_key``, ``seed``, ``steering``.

    JSON or msgpack.
    """
    robots = robots_of(raw.app)
    kind = raw.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        body = await raw.body()
    except ClientDisconnect:
        return GONE
    acted = await unless_gone(raw, _ours(robots, body, kind))
    return GONE if acted is None else Json(_told(robots, acted))


@router.post("/act")
async def act(raw: Request) -> Response:
    """OpenVLA's REST: json-numpy in, one json-numpy array out. Errors have a status and say what is wrong."""
    access.robot(raw)
    robots = robots_of(raw.app)
    defaults = observations.Defaults.from_query(raw.query_params.multi_items())
    try:
        body = await raw.body()
    except ClientDisconnect:
        return GONE
    found = await unless_gone(raw, _openvla(robots, body, defaults))
    if found is None:
        return GONE
    acted, twice = found
    text = arrays.to_json(acted.actions[0] if len(acted.actions) == 1 else acted.actions)
    headers = {"steersman-report": json.dumps(_short(acted), separators=(",", ":"))}
    return Response(json.dumps(text) if twice else text, media_type="application/json", headers=headers)


def attach(app: FastAPI) -> None:
    app.include_router(router)


async def _ours(robots: Robots, body: bytes, kind: str) -> Acted:
    with robots.metrics.acting():
        asked = await asyncio.to_thread(observations.ours, body, kind, robots.limits, robots.policy.cameras)
        return await robots.act(asked.observation, asked.steering, asked.ignored)


async def _openvla(robots: Robots, body: bytes, defaults: observations.Defaults) -> tuple[Acted, bool]:
    with robots.metrics.acting():
        cameras = robots.policy.cameras
        asked, twice = await asyncio.to_thread(observations.openvla, body, robots.limits, cameras, defaults)
        return await robots.act(asked.observation, asked.steering, asked.ignored), twice


def _told(robots: Robots, acted: Acted) -> dict[str, Any]:
    out: dict[str, Any] = {"policy": robots.policy.name, "actions": acted.actions.tolist(), **acted.about()}
    return {**out, "timing": dict(acted.timing)}


def _short(acted: Acted) -> dict[str, Any]:
    """What a header has room for."""
    out: dict[str, Any] = {"strays": acted.strays, "saturated": acted.saturated}
    if acted.report is not None:
        edits = [{"index": e["index"], "tokens": e["tokens"]} for e in acted.report.get("interventions", ())]
        out["steering"] = {"plan": acted.report["plan"], "interventions": edits}
    return out
