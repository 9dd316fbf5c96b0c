"""The selection job through an application's own routes, behind which a served model is a formula."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from steersman.server.jobs import Progress
from steersman.server.selection import SelectSpec, selection
from steersman.steering.errors import InvalidRequest, UnknownAsset
from tests.clients.test_selection import OTHERS, SHOWING, Served
from tests.server.fakes import frontend, state_of
from tests.steering.library import D, noise, vector


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.fixture
def app(tmp_path: Path, served: Served) -> FastAPI:
    made = FastAPI()
    made.state.steersman = state_of(frontend(tmp_path))
    for name in ("a", "b"):
        made.state.steersman.frontend.store.add(vector(name, noise(1, D), [1]))

    async def answer(request: Request) -> Response:
        assert request.headers["x-admin-key"] == "k"
        found = served(httpx.Request(request.method, str(request.url), content=await request.body()))
        return Response(found.content, found.status_code, media_type="application/json")

    made.add_api_route("/{path:path}", answer, methods=["GET", "POST"])
    return made


def run(app: FastAPI, **fields: Any) -> dict[str, Any]:
    asked = {"kind": "select", "vectors": ["a", "b"], "showing": SHOWING, "others": OTHERS, "tokens": ["No"], **fields}
    raw: Any = SimpleNamespace(app=app, headers={"x-admin-key": "k"})
    work = selection(SelectSpec.model_validate(asked), raw)

    async def awaited() -> Any:
        return await work(Progress())

    return dict(asyncio.run(awaited()))


def test_what_is_selected_is_stored_unless_it_should_not_be(app: FastAPI, served: Served) -> None:
    result = run(app)
    assert result["assets"] == ["b@new"]
    assert result["selection"]["candidates"][result["selection"]["selected"]]["layer"] == 2
    assert len(served.stored) == 1
    assert run(app, store=False)["assets"] == run(app, min_induce=9.0)["assets"] == []
    assert len(served.stored) == 1


def test_what_cannot_be_done_names_the_field(app: FastAPI, served: Served) -> None:
    with pytest.raises(UnknownAsset) as unknown:
        run(app, vectors=["a", "nothing"])
    assert unknown.value.param == "vectors[1]"
    served.site = "attn_out"
    with pytest.raises(InvalidRequest, match="wanted: resid_post") as caught:
        run(app)
    assert caught.value.param == "vectors[0]"
