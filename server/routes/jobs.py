"""``/v1/steering/jobs``: long work with progress, whose results go into the store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, TypeAdapter, ValidationError

from steersman.server import ablation, captures, extraction, tracing
from steersman.server.access import admin
from steersman.server.answers import Json
from steersman.server.calibration import CalibrateSpec, calibration
from steersman.server.extraction_spec import ExtractSpec
from steersman.server.jobs import Progress, Work
from steersman.server.selection import SelectSpec, selection
from steersman.server.state import SteeringState, state_of
from steersman.server.tracing_spec import AblateSpec, TraceSpec
from steersman.steering import errors
from steersman.steering.spec import json_path

Spec = ExtractSpec | CalibrateSpec | SelectSpec | TraceSpec | AblateSpec
JobSpec = Annotated[Spec, Field(discriminator="kind")]
_JOBS: TypeAdapter[Spec] = TypeAdapter(JobSpec)
_BODY = {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/SteeringJob"}}}}}
router = APIRouter(prefix="/v1/steering/jobs")


@router.post("", dependencies=[Depends(admin)], openapi_extra=_BODY, status_code=202)
async def submit(raw: Request) -> Response:
    """Queues a job; it lives in this process and ends with it. The answer's ``id`` tells how it goes."""
    spec = await asyncio.to_thread(parse, await raw.body())
    state = state_of(raw.app)
    if isinstance(spec, ExtractSpec):
        extraction.checked_layers(spec, state)
        work = _extraction(spec, raw)
    elif isinstance(spec, TraceSpec):
        tracing.check(spec, state)
        work = _tracing(spec, state)
    elif isinstance(spec, AblateSpec):
        ablation.units(spec, state)
        work = _ablation(spec, state)
    elif isinstance(spec, CalibrateSpec):
        work = await asyncio.to_thread(calibration, spec, raw)
    else:
        work = await asyncio.to_thread(selection, spec, raw)
    return Json(state.jobs.submit(spec.kind, spec.name, work).to_json(), 202)


@router.get("")
async def list_jobs(raw: Request) -> Response:
    """All jobs that are remembered, the newest first."""
    return Json({"object": "list", "data": [job.to_json() for job in state_of(raw.app).jobs.list()]})


@router.get("/{job_id}")
async def fetch(job_id: str, raw: Request) -> Response:
    """A job's state, its progress from 0 to 1, and when it is over its result or its error."""
    return Json(state_of(raw.app).jobs.get(job_id).to_json())


@router.delete("/{job_id}", dependencies=[Depends(admin)])
async def cancel(job_id: str, raw: Request) -> Response:
    """Cancels a job that waits or runs; the answer is the job as it is then."""
    return Json((await state_of(raw.app).jobs.cancel(job_id)).to_json())


def attach(app: FastAPI) -> None:
    app.include_router(router)


def describe(schemas: dict[str, Any]) -> None:
    """Adds the jobs' JSON schema to those of ``/openapi.json``."""
    whole = _JOBS.json_schema(ref_template="#/components/schemas/SteeringJob{model}")
    schemas.update({f"SteeringJob{name}": part for name, part in whole.pop("$defs", {}).items()})
    schemas["SteeringJob"] = whole


def parse(body: bytes) -> Spec:
    """The job that a body asks for; raises a SteeringError that names the bad field."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise errors.InvalidRequest("the body is not JSON", "body") from None
    if not isinstance(data, dict):
        raise errors.InvalidRequest("the body must be a JSON object", "body")
    try:
        return _JOBS.validate_json(body)
    except ValidationError as error:
        raise _explain(error, data) from None


def _explain(error: ValidationError, data: Mapping[str, Any]) -> errors.SteeringError:
    """The complaint that lies deepest in the data: a union complains once for each of its members."""
    found = error.errors(include_url=False, include_context=False)
    if not found[0]["loc"]:
        return errors.InvalidRequest("must be one of extract, calibrate, select, trace, ablate", "kind")
    kinds = [(e, "" if e["type"].startswith("union_tag") else e["type"]) for e in found]
    path, first = max(
        ((json_path("", data, e["loc"][1:], kind), e) for e, kind in kinds), key=lambda each: len(each[0])
    )
    if first["type"] == "extra_forbidden":
        return errors.UnknownField(f"unknown field '{first['loc'][-1]}'", path)
    cls = errors.NonFinite if first["type"] == "finite_number" else errors.InvalidRequest
    return cls(str(first["msg"]).removeprefix("Value error, "), path or None)


def _extraction(spec: ExtractSpec, raw: Request) -> Work:
    state = state_of(raw.app)

    async def work(progress: Progress) -> Mapping[str, Any]:
        return await extraction.run(spec, state, captures.capture, progress)

    return work


def _tracing(spec: TraceSpec, state: SteeringState) -> Work:
    async def work(progress: Progress) -> Mapping[str, Any]:
        return await tracing.trace(spec, state, progress)

    return work


def _ablation(spec: AblateSpec, state: SteeringState) -> Work:
    async def work(progress: Progress) -> Mapping[str, Any]:
        return await ablation.ablate(spec, state, progress)

    return work
