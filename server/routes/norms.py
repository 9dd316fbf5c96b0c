"""``GET /v1/steering/norms``: what norms the workers have seen at each layer, of which a baseline is made."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from steersman.server.answers import Json
from steersman.server.state import state_of
from steersman.steering.errors import InvalidRequest

router = APIRouter(prefix="/v1/steering")


@router.get("/norms")
async def norms(raw: Request) -> Response:
    """By worker, for each layer: number, mean and sum of squared deviations of ln‖x‖ since the worker started.

    Of the tokens in passes that statistics look at. A worker of a pipeline stage has its own layers alone.
    """
    state = state_of(raw.app)
    if state.settings.monitor == "off":
        raise InvalidRequest("this server keeps no statistics of norms (--steering-monitor off)")
    workers = await state.frontend.rpc("steersman_norms")
    return Json({"object": "list", "data": [worker for worker in workers if worker is not None]})


def attach(app: FastAPI) -> None:
    app.include_router(router)
