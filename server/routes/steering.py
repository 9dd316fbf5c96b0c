"""``/v1/steering``: the served model, dry runs, and the server's default profile."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from steersman.server.access import admin
from steersman.server.state import state_of
from steersman.steering import spec
from steersman.steering.errors import InvalidRequest
from steersman.steering.plan import Plan
from steersman.steering.spec import OPS
from steersman.steering.tokens import Prompt, Selection

router = APIRouter(prefix="/v1/steering")


class ResolveRequest(BaseModel):
    """A dry run: ``steering`` for a chat, a prompt, or token ids."""

    model_config = ConfigDict(extra="forbid")

    steering: Any = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None


@router.get("/model")
async def model(raw: Request) -> Response:
    """Layers, sites and widths that this server can steer, and the ops it knows."""
    frontend = state_of(raw.app).frontend
    return JSONResponse({**frontend.model.to_json(), "ops": list(OPS), "limits": {
        "interventions": spec.MAX_INTERVENTIONS, "probes": spec.MAX_PROBES, "number": spec.MAX_NUMBER,
    }})  # fmt: skip


@router.post("/resolve")
async def resolve(request: ResolveRequest, raw: Request) -> Response:
    """The plan that a steering object means, and which tokens of a prompt it edits, without running it."""
    frontend = state_of(raw.app).frontend
    plan = await asyncio.to_thread(frontend.resolve, request.steering if request.steering is not None else {})
    out = _describe(plan)
    ids, finders = await asyncio.to_thread(_prompt, request, frontend)
    if ids is not None:
        paths = [f"{s.path}.tokens" for s in plan.steps]
        selection = Selection.build(plan.selectors, Prompt(ids, *finders), paths)
        out["prompt_tokens"] = len(ids)
        out["first_edited"] = selection.first if selection.anything else None
        for i, entry in enumerate(out["interventions"]):
            entry["prompt_positions"] = _positions(selection, i)
            entry["edits_generated"] = bool(selection.generated >> i & 1 or i in selection.rules)
            if not entry["prompt_positions"] and not entry["edits_generated"]:
                out["warnings"].append(f"{plan.steps[i].path}.tokens matches no token of this prompt")
    return JSONResponse(out)


@router.get("/default")
async def get_default(raw: Request) -> Response:
    """The profile that applies to every request that does not opt out; null when there is none."""
    default = state_of(raw.app).frontend.server_default()
    return JSONResponse({"steering": None if default is None else default.model_dump(mode="json", exclude_unset=True)})


@router.put("/default", dependencies=[Depends(admin)])
async def put_default(raw: Request) -> Response:
    """Sets the default profile: a steering object, for instance ``{"profile": "calm"}``."""
    try:
        body = await raw.json()
    except ValueError:
        raise InvalidRequest("the body must be a steering object", "steering") from None
    frontend = state_of(raw.app).frontend
    await asyncio.to_thread(frontend.set_default, body)
    return await get_default(raw)


@router.delete("/default", dependencies=[Depends(admin)])
async def delete_default(raw: Request) -> Response:
    """Leaves the server without a default profile."""
    await asyncio.to_thread(state_of(raw.app).frontend.set_default, None)
    return Response(status_code=204)


def attach(app: FastAPI) -> None:
    app.include_router(router)


def _describe(plan: Plan) -> dict[str, Any]:
    rows = sum(block.count for blocks in plan.blocks.values() for block in blocks)
    return {
        "plan": plan.id,
        "interventions": [
            {
                "index": i,
                "op": step.op,
                "layers": list(step.layers),
                "site": step.site.value,
                "assets": list(step.assets),
                "path": step.path,
                "gated": step.gate >= 0,
            }
            for i, step in enumerate(plan.steps)
        ],
        "probes": list(plan.probe_names),
        "cost": {"places": len(plan.blocks), "rows": rows, "bytes": len(plan.to_bytes())},
        "warnings": list(plan.warnings),
    }


def _prompt(request: ResolveRequest, frontend: Any) -> tuple[list[int] | None, tuple[Any, Any]]:
    """The token ids of the given prompt, and finders of text and roles in it."""
    from steersman.server.engine.prompts import RoleFinder, TextFinder

    tokenizer = frontend.tokenizer
    if request.messages is None and request.prompt is None:
        return None, (None, None)
    if isinstance(request.prompt, list):
        ids = request.prompt
    elif tokenizer is None:
        raise InvalidRequest("this server has no tokenizer; give token ids", "prompt")
    elif request.prompt is not None:
        ids = tokenizer.encode(request.prompt)
    else:
        ids = tokenizer.encode(_render(tokenizer, request.messages), add_special_tokens=False)
    text = None if tokenizer is None else TextFinder(tokenizer, ids)
    if text is None or request.messages is None:
        return ids, (text, None)
    return ids, (text, RoleFinder(text, request.messages, lambda m: _render(tokenizer, m)))


def _render(tokenizer: Any, messages: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


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
