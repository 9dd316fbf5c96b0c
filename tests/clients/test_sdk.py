import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from steersman.clients.sdk import Steersman, SteersmanError

Handler = Callable[[httpx.Request], httpx.Response]


def server(answer: Any = None, status: int = 200, **kwargs: Any) -> tuple[Steersman, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if isinstance(answer, bytes):
            return httpx.Response(status, content=answer)
        return httpx.Response(status, json=answer)

    return Steersman("http://server", transport=httpx.MockTransport(handle), **kwargs), seen


def test_keys_go_where_the_server_looks_for_them() -> None:
    client, seen = server({}, api_key="a", admin_key="b")
    with client:
        client.model()
    assert seen[0].headers["authorization"] == "Bearer a"
    assert seen[0].headers["x-admin-key"] == "b"
    client, seen = server({})
    client.model()
    assert "authorization" not in seen[0].headers


@pytest.mark.parametrize(
    ("call", "method", "path"),
    [
        (lambda c: c.model(), "GET", "/v1/steering/model"),
        (lambda c: c.asset("v@3fa"), "GET", "/v1/steering/assets/v@3fa"),
        (lambda c: c.asset("../models"), "GET", "/v1/steering/assets/..%2Fmodels"),
        (lambda c: c.assets(kind="vector", text="calm sea"), "GET", "/v1/steering/assets?kind=vector&text=calm+sea"),
        (lambda c: c.delete("v"), "DELETE", "/v1/steering/assets/v"),
        (lambda c: c.download("v", "gguf"), "GET", "/v1/steering/assets/v?format=gguf"),
        (lambda c: c.default(), "GET", "/v1/steering/default"),
        (lambda c: c.set_default({"profile": "calm"}), "PUT", "/v1/steering/default"),
        (lambda c: c.set_default(None), "DELETE", "/v1/steering/default"),
    ],
)
def test_each_call_is_one_request(call: Callable[[Steersman], Any], method: str, path: str) -> None:
    client, seen = server({"data": [], "removed": [], "steering": None})
    call(client)
    assert [(r.method, r.url.raw_path.decode()) for r in seen] == [(method, path)]


def test_answers_are_unpacked() -> None:
    assert server({"data": [{"name": "v"}]})[0].assets() == [{"name": "v"}]
    assert server({"data": [{"id": "tiny"}]})[0].served_model() == "tiny"
    assert server({"removed": ["v@1"]})[0].delete("v") == ["v@1"]
    assert server(b"bytes")[0].download("v") == b"bytes"
    assert server(b"", 204)[0].set_default(None) is None


def test_chat_and_resolve_send_what_they_are_given() -> None:
    client, seen = server({})
    client.chat([{"role": "user", "content": "hi"}], {"profile": "calm"}, model="m", max_tokens=3)
    client.chat([], model="m")
    client.resolve({"interventions": []}, prompt="hi")
    bodies = [json.loads(r.content) for r in seen]
    assert bodies[0] == {
        "messages": [{"role": "user", "content": "hi"}],
        "steering": {"profile": "calm"},
        "model": "m",
        "max_tokens": 3,
    }
    assert "steering" not in bodies[1]
    assert bodies[2] == {"steering": {"interventions": []}, "prompt": "hi"}


def test_uploads(tmp_path: Path) -> None:
    client, seen = server({"ref": "v@1"})
    (tmp_path / "v.safetensors").write_bytes(b"tensors")
    (tmp_path / "v.json").write_text('{"name": "v"}')
    client.upload(tmp_path / "v.safetensors", {"name": "v"})
    client.upload(tmp_path / "v.safetensors")
    client.upload(tmp_path / "v.json")
    assert b"tensors" in seen[0].content
    assert b'{"name": "v"}' in seen[0].content
    assert b'name="metadata"' not in seen[1].content
    assert seen[2].headers["content-type"] == "application/json"
    assert seen[2].content == b'{"name": "v"}'
    with pytest.raises(ValueError, match="its own metadata"):
        client.upload(tmp_path / "v.json", {"name": "w"})
    assert len(seen) == 3


def test_errors_name_the_field() -> None:
    body = {"error": {"message": "no asset 'v'", "type": "t", "param": "steering.profile", "code": "asset_not_found"}}
    with pytest.raises(SteersmanError, match="no asset 'v'") as caught:
        server(body, 404)[0].model()
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "asset_not_found", "steering.profile")


@pytest.mark.parametrize("answer", [{"error": "Unauthorized"}, {"detail": "no"}, [], b"<html>", b"", {"error": None}])
def test_errors_of_others_are_errors_too(answer: Any) -> None:
    with pytest.raises(SteersmanError) as caught:
        server(answer, 502)[0].model()
    assert caught.value.status == 502
    assert caught.value.code is None


def test_the_client_needs_nothing_of_the_server() -> None:
    source = (Path(__file__).parents[2] / "clients/sdk.py").read_text()
    assert "steersman.server" not in source
    assert "steersman.steering" not in source


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.RemoteProtocolError])
def test_a_question_whose_connection_was_just_closed_is_asked_again_and_nothing_else_is(error: Any) -> None:
    asked: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) == 1:
            raise error("closed")
        return httpx.Response(200, json={"id": "1"})

    client = Steersman("http://server", transport=httpx.MockTransport(handle))
    assert client.job("1") == {"id": "1"}
    assert asked == ["GET", "GET"]
    asked.clear()
    with pytest.raises(error):
        client.submit({"kind": "extract"})
    assert asked == ["POST"]
