"""The calibration job through an application's own routes, behind which a served model is a formula."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from steersman.server.calibration import CalibrateSpec, calibration
from steersman.server.jobs import Progress
from steersman.steering.errors import InvalidRequest, UnknownAsset
from tests.clients.served import REF, Served
from tests.server.fakes import frontend, state_of
from tests.steering.library import D, noise, vector

KEYS = {"authorization": "Bearer a", "x-admin-key": "b"}


class App:
    def __init__(self, folder: Path) -> None:
        self.served = Served()
        self.headers: list[dict[str, str]] = []
        self.app = FastAPI()
        self.app.state.steersman = state_of(frontend(folder))
        self.app.state.steersman.frontend.store.add(vector("french", noise(1, D), [1]))
        self.app.add_api_route("/{path:path}", self.answer, methods=["GET", "POST"])

    async def answer(self, request: Request) -> Response:
        self.headers.append({name: request.headers.get(name, "") for name in (*KEYS, "cookie")})
        found = self.served(httpx.Request(request.method, str(request.url), content=await request.body()))
        return Response(found.content, found.status_code, media_type="application/json")

    def run(self, **fields: Any) -> dict[str, Any]:
        asked = {"kind": "calibrate", "vector": "french", "prompts": ["one", "two!", "three"], "max_damage": 2.0}
        scorer = {"by": "lexicon", "name": "french"}
        spec = CalibrateSpec.model_validate({**asked, "scorer": scorer, "scales": [0.1, 0.3], **fields})
        raw: Any = SimpleNamespace(app=self.app, headers={**KEYS, "cookie": "c"})
        progress = Progress()
        result = asyncio.run(_awaited(calibration(spec, raw)(progress)))
        assert progress.done == progress.total > 0
        return dict(result)


async def _awaited(work: Any) -> Any:
    return await work


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)


def test_it_asks_this_server_with_the_keys_it_was_asked_with(app: App) -> None:
    result = app.run()
    assert result["assets"] == ["french@fedcba987654"]
    assert result["calibration"]["vector"] == REF
    assert result["calibration"]["cells"][result["calibration"]["recommended"]]["scale"] == 0.3
    assert all(headers == {**KEYS, "cookie": ""} for headers in app.headers)
    (stored,) = app.served.stored
    assert stored["recommended"]["scale"] == 0.3


def test_it_stores_nothing_unless_it_should(app: App) -> None:
    assert app.run(store=False)["assets"] == []
    app.served.reach = 0.0
    result = app.run()
    assert (result["assets"], result["calibration"]["recommended"]) == ([], None)
    assert app.served.stored == []


def test_what_cannot_be_done_names_the_field(app: App) -> None:
    with pytest.raises(InvalidRequest, match="has nothing for layers") as caught:
        app.run(layers=[2])
    assert caught.value.param == "layers"
    with pytest.raises(UnknownAsset) as unknown:
        app.run(vector="nothing")
    assert unknown.value.param == "vector"
