from pathlib import Path

import pytest

from tests.server.fakes import client, frontend
from tests.steering.library import REF

PROFILE = {"name": "calm2", "kind": "profile", "model": REF, "steering": {}}
CHANGES = [
    ("POST", "/v1/steering/assets", PROFILE),
    ("DELETE", "/v1/steering/assets/calm", None),
    ("PUT", "/v1/steering/default", {"profile": "calm"}),
    ("DELETE", "/v1/steering/default", None),
]
READS = [
    ("GET", "/v1/steering/assets", None),
    ("GET", "/v1/steering/assets/calm", None),
    ("GET", "/v1/steering/assets/v?format=safetensors", None),
    ("GET", "/v1/steering/default", None),
    ("GET", "/v1/steering/model", None),
    ("POST", "/v1/steering/resolve", {"steering": {"profile": "calm"}}),
]
KEY = "open sesame"


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"X-Admin-Key": "wrong"},
        {"X-Admin-Key": KEY + "!"},
        {"X-Admin-Key": ""},
        {"X-Admin-Key": "wrong", "Authorization": f"Bearer {KEY}"},
    ],
)
def test_changes_need_the_key(tmp_path: Path, method: str, path: str, body: object, headers: dict[str, str]) -> None:
    made = frontend(tmp_path, admin_key=KEY)
    before = [info.ref for info in made.store.list()]
    answer = client(made).request(method, path, json=body, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "unauthorized"
    assert KEY not in answer.text
    assert [info.ref for info in made.store.list()] == before


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
@pytest.mark.parametrize("headers", [{"X-Admin-Key": KEY}, {"Authorization": f"bearer {KEY}"}])
def test_changes_pass_with_the_key(
    tmp_path: Path, method: str, path: str, body: object, headers: dict[str, str]
) -> None:
    made = frontend(tmp_path, admin_key=KEY)
    assert client(made).request(method, path, json=body, headers=headers).status_code < 300


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_without_a_key_everybody_may_change(tmp_path: Path, method: str, path: str, body: object) -> None:
    assert client(frontend(tmp_path)).request(method, path, json=body).status_code < 300


@pytest.mark.parametrize(("method", "path", "body"), READS)
def test_reading_needs_no_key(tmp_path: Path, method: str, path: str, body: object) -> None:
    assert client(frontend(tmp_path, admin_key=KEY)).request(method, path, json=body).status_code == 200


def test_a_key_that_is_not_ascii(tmp_path: Path) -> None:
    made = frontend(tmp_path, admin_key="schlüssel")
    good = client(made).delete("/v1/steering/default", headers={"X-Admin-Key": "schlüssel".encode()})
    assert good.status_code == 204
