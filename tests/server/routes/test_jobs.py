from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from steersman.server import captures
from steersman.server.jobs import Progress
from steersman.server.routes import jobs
from tests.server.contrast import Captures, Letters
from tests.server.fakes import client, frontend

JOBS = "/v1/steering/jobs"
EXTRACT = {"kind": "extract", "name": "serene", "layers": [1], "positive": ["hush"], "negative": ["crash"]}
SCORER = {"by": "lexicon", "name": "french"}
CALIBRATE = {"kind": "calibrate", "vector": "french", "prompts": ["a", "b"], "scorer": SCORER}
ASKED = {"prompt": "a", "answer": "b"}
TRACE = {"kind": "trace", "questions": [{**ASKED, "object": "a"}]}
ABLATE = {"kind": "ablate", "units": "heads", "questions": [ASKED]}
KEY = {"x-admin-key": "secret"}


@pytest.fixture
def http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(captures, "capture", Captures())
    with client(frontend(tmp_path, tokenizer=Letters(), admin_key="secret", max_jobs=1)) as found:
        yield found


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that do nothing until they are cancelled."""

    async def work(progress: Progress) -> Mapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(jobs, "_extraction", lambda spec, raw: work)


def submit(http: TestClient, **fields: Any) -> Any:
    return http.post(JOBS, json={**EXTRACT, **fields}, headers=KEY)


def follow(http: TestClient, job: str) -> dict[str, Any]:
    for _ in range(1000):
        found: dict[str, Any] = http.get(f"{JOBS}/{job}").json()
        if found["state"] not in ("queued", "running"):
            return found
    raise AssertionError(found)


def test_an_extraction_ends_in_the_store(http: TestClient) -> None:
    accepted = submit(http)
    assert accepted.status_code == 202
    assert accepted.json()["state"] == "queued"
    done = follow(http, accepted.json()["id"])
    assert (done["state"], done["progress"], done["counts"]["total"]) == ("done", 1.0, 2)
    (ref,) = done["result"]["assets"]
    stored = http.get(f"/v1/steering/assets/{ref}").json()
    assert (stored["name"], stored["layers"], stored["provenance"]["method"]) == ("serene", [1], "mean_difference")
    assert http.get(JOBS).json()["data"] == [done]


def test_a_failed_job_tells_why(http: TestClient) -> None:
    done = follow(http, submit(http, negative=[[{"role": "robot", "content": "x"}]]).json()["id"])
    assert done["state"] == "failed"
    assert (done["error"]["code"], done["error"]["param"]) == ("invalid_steering", "negative[0]")
    assert done["result"] is None


@pytest.mark.usefixtures("held")
def test_the_queue_is_bounded_and_jobs_can_be_cancelled(http: TestClient) -> None:
    first, second = (submit(http).json()["id"] for _ in range(2))
    while http.get(f"{JOBS}/{first}").json()["state"] != "running":
        pass
    full = submit(http)
    assert (full.status_code, full.json()["error"]["code"]) == (503, "too_many_jobs")
    for job in (first, second):
        assert http.delete(f"{JOBS}/{job}").status_code == 401
        assert http.delete(f"{JOBS}/{job}", headers=KEY).json()["state"] == "cancelled"
    assert [job["state"] for job in http.get(JOBS).json()["data"]] == ["cancelled"] * 2
    assert submit(http).status_code == 202


def test_jobs_need_the_key(http: TestClient) -> None:
    assert http.post(JOBS, json=EXTRACT).json()["error"]["code"] == "unauthorized"
    assert http.get(JOBS).json() == {"object": "list", "data": []}


def test_unknown_jobs(http: TestClient) -> None:
    for answer in (http.get(f"{JOBS}/job-1"), http.delete(f"{JOBS}/job-1", headers=KEY)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
        assert "jobs end with the server" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, "body", "invalid_steering"),
        (b"[]", 400, "body", "invalid_steering"),
        (b"[" * 100_000, 400, "body", "invalid_steering"),
        (b"{}", 400, "kind", "invalid_steering"),
        ({"kind": "train"}, 400, "kind", "invalid_steering"),
        ({**EXTRACT, "colour": 1}, 400, "colour", "unknown_field"),
        ({**EXTRACT, "layers": [99]}, 400, "layers", "layer_out_of_range"),
        ({**CALIBRATE, "vector": "nothing"}, 404, "vector", "asset_not_found"),
        ({**CALIBRATE, "prompts": ["a"]}, 400, "prompts", "invalid_steering"),
        ({**CALIBRATE, "scorer": {"by": "regex", "pattern": "("}}, 400, "scorer.pattern", "invalid_steering"),
        ({**CALIBRATE, "scorer": {"by": "regex", "pattern": "x"}}, 400, "scorer", "invalid_steering"),
        ({**CALIBRATE, "scorer": {"by": "classifier", "folder": "/", "label": "x"}}, 400, "scorer", "invalid_steering"),
        ({**CALIBRATE, "scorer": {"by": "mood"}}, 400, "scorer", "invalid_steering"),
        ({**CALIBRATE, "scorer": {**SCORER, "x": 1}}, 400, "scorer.x", "unknown_field"),
        ({**CALIBRATE, "seeds": 1}, 400, "seeds", "invalid_steering"),
        ({**CALIBRATE, "max_damage": "much"}, 400, "max_damage", "invalid_steering"),
        ({**TRACE, "questions": []}, 400, "questions", "invalid_steering"),
        ({**TRACE, "questions": [{**ASKED, "text": "c"}]}, 400, "questions[0]", "invalid_steering"),
        ({**TRACE, "questions": [{**ASKED, "box": [0, 0, 1, 1]}]}, 400, "questions[0]", "invalid_steering"),
        ({**TRACE, "questions": [{**ASKED, "colour": 1}]}, 400, "questions[0].colour", "unknown_field"),
        ({**TRACE, "questions": [ASKED]}, 400, None, "invalid_steering"),
        ({**TRACE, "layers": [99]}, 400, "layers", "layer_out_of_range"),
        ({**TRACE, "components": ["heads"]}, 400, "components[0]", "invalid_steering"),
        ({**TRACE, "sigma": -1}, 400, "sigma", "invalid_steering"),
        ({**ABLATE, "units": "neurons"}, 400, None, "invalid_steering"),
        ({**ABLATE, "units": "neurons", "neurons": [[0, 99]]}, 400, "neurons", "invalid_steering"),
        ({**ABLATE, "neurons": [[0, 1]]}, 400, None, "invalid_steering"),
    ],
)
def test_bad_jobs_are_refused_at_once(http: TestClient, body: Any, status: int, param: str | None, code: str) -> None:
    answer = http.post(JOBS, content=body if isinstance(body, bytes) else json.dumps(body), headers=KEY)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    assert http.get(JOBS).json()["data"] == []


def test_the_schema_tells_of_every_kind(http: TestClient) -> None:
    found = http.get("/openapi.json").json()
    schemas = found["components"]["schemas"]
    body = found["paths"][JOBS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/SteeringJob"}
    kinds = {"extract", "calibrate", "select", "trace", "ablate"}
    assert set(schemas["SteeringJob"]["discriminator"]["mapping"]) == kinds
    assert "pairs" in schemas["SteeringJobExtractSpec"]["properties"]
    for ref in re.findall(r"#/components/schemas/([^\"]+)", json.dumps(found)):
        assert ref in schemas, ref
