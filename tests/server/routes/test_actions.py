"""``/v1/actions`` and ``/act`` around an engine that stands in for vLLM's."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import generate_latest

from steersman.clients import arrays
from steersman.server.engine.frontend import TicketKey
from steersman.server.engine.intake import FIELD
from steersman.server.policies.openvla import PROMPT
from tests.server.policies.test_openvla import expected
from tests.server.robots import ADD, IDS, KEY, OPENVLA, SCENE, STATS, Station, file_of, text_of

WANTED = [expected(token, dim) for dim, token in enumerate(IDS)]


def body(**changes: Any) -> dict[str, Any]:
    about = {"images": {"front": text_of(SCENE)}, "instruction": "go", "unnorm_key": KEY, **changes}
    return {k: v for k, v in about.items() if v is not ...}


def refused(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


@pytest.fixture
def station(tmp_path: Path) -> Station:
    return Station(tmp_path)


# -- /v1/actions ------------------------------------------------------------------------------------


def test_an_unsteered_observation(station: Station) -> None:
    answer = station.http.post("/v1/actions", json=body())
    assert answer.status_code == 200, answer.text
    found = answer.json()
    np.testing.assert_allclose(found["actions"], [WANTED], atol=1e-15)
    assert (found["token_ids"], found["strays"], found["saturated"], found["ignored"]) == (IDS, 0, 0, [])
    assert "steering" not in found
    assert found["timing"]["total_ms"] >= found["timing"]["engine_ms"] >= 0
    prompt, params = station.engine.prompts[0], station.engine.params[0]
    np.testing.assert_array_equal(np.asarray(prompt["multi_modal_data"]["image"][0]), SCENE)
    assert prompt["prompt_token_ids"][-1] == 29871
    assert (params.max_tokens, params.temperature, params.ignore_eos, params.extra_args) == (7, 0.0, True, None)
    assert not station.workers.calls
    assert station.outcome("ok") == 1


@pytest.mark.parametrize("given", [file_of(SCENE), SCENE])
def test_msgpack_says_the_same(station: Station, given: Any) -> None:
    packed = arrays.pack(body(images=[given], state=np.array([0.5, 1], np.float32)))
    answer = station.http.post("/v1/actions", content=packed, headers={"content-type": "application/msgpack"})
    np.testing.assert_allclose(answer.json()["actions"], [WANTED], atol=1e-15)
    assert answer.json()["ignored"] == ["state"]  # OpenVLA reads none
    np.testing.assert_array_equal(np.asarray(station.engine.prompts[0]["multi_modal_data"]["image"][0]), SCENE)


def test_a_steered_observation_carries_a_ticket_and_a_report(station: Station) -> None:
    found = station.http.post("/v1/actions", json=body(steering=ADD)).json()
    assert isinstance(station.engine.params[0].extra_args[FIELD], TicketKey)
    assert found["steering"]["interventions"][0]["tokens"] == 3
    assert len(station.workers.sent()) == 1
    assert station.idle()
    assert station.http.post("/v1/actions", json=body(steering={**ADD, "report": "none"})).json()["steering"] == {
        "plan": found["steering"]["plan"]
    }


def test_the_servers_default_profile_steers(tmp_path: Path) -> None:
    station = Station(tmp_path, default_profile="calm")
    assert "interventions" in station.http.post("/v1/actions", json=body()).json()["steering"]
    assert "steering" in station.http.post("/v1/actions", json=body(steering={"default": False})).json()
    assert len(station.workers.sent()) == 2  # the second plan is empty


def test_edits_that_were_not_made_are_an_error(station: Station) -> None:
    station.workers.reports = lambda key: []
    answer = station.http.post("/v1/actions", json=body(steering=ADD))
    assert refused(answer) == (500, "engine_unsteered", "steering")
    assert (station.outcome("failed"), station.outcome("ok")) == (1, 0)
    assert station.idle()


BAD = [
    (body(unnorm_key="libero"), (400, "invalid_steering", "unnorm_key")),
    (body(unnorm_key=...), (400, "invalid_steering", "unnorm_key")),
    (body(unnorm_key=7), (400, "invalid_steering", "unnorm_key")),
    (body(images=...), (400, "invalid_steering", "images")),
    (body(images={"a": text_of(SCENE), "b": text_of(SCENE)}), (400, "invalid_steering", "images")),
    (body(images="front"), (400, "invalid_steering", "images")),
    (body(images={"front": "AAAA"}), (400, "invalid_steering", "images.front")),
    (body(images=[None]), (400, "invalid_steering", "images[0]")),
    (body(images=[text_of(np.zeros((4320, 7680, 3), np.uint8))]), (413, "payload_too_large", "images[0]")),
    (body(instruction=...), (400, "invalid_steering", "instruction")),
    (body(instruction=" "), (400, "invalid_steering", "instruction")),
    (body(instruction="go \ud800"), (400, "invalid_steering", "instruction")),
    (body(instruction=["go"]), (400, "invalid_steering", "instruction")),
    (body(state=[1.0, math.nan]), (400, "non_finite", "state")),
    (body(state=[math.inf]), (400, "non_finite", "state")),
    (body(state=["1"]), (400, "invalid_steering", "state")),
    (body(state=[[1.0]]), (400, "invalid_steering", "state")),
    (body(state=[[1.0], 2.0]), (400, "invalid_steering", "state")),
    (body(state=[]), (400, "invalid_steering", "state")),
    (body(state=[True]), (400, "invalid_steering", "state")),
    (body(prompt="go"), (400, "unknown_field", "prompt")),
    (body(steering={"interventions": [{"op": "add", "vector": "gone"}]}), None),
    (body(steering={"interventions": [{"op": "swim"}]}), (400, "invalid_steering", "steering.interventions[0].op")),
    (body(steering="calm"), None),
    (body(steering={**ADD, "stream_probes": True}), (400, "invalid_steering", "steering.stream_probes")),
    ([1], (400, "invalid_steering", "body")),
]


@pytest.mark.parametrize(("given", "wanted"), BAD)
def test_what_is_refused_and_how_it_is_named(station: Station, given: Any, wanted: Any) -> None:
    answer = station.http.post("/v1/actions", content=json.dumps(given))
    status, code, param = refused(answer)
    assert (status, code, param) == wanted if wanted else 400 <= status < 500 and param.startswith("steering")
    assert not station.engine.prompts
    assert station.outcome("refused") == 1
    assert station.http.post("/v1/actions", json=body()).status_code == 200  # the server goes on
    assert station.idle()


@pytest.mark.parametrize(
    ("content", "kind", "param"),
    [
        (b"{", "application/json", "body"),
        (b"[" * 100_000, "application/json", "body"),
        (b"\xff\xfe", "application/json; charset=utf-8", "body"),
        (b"\xc1", "application/msgpack", "body"),
        (b"\x91" * 100_000, "application/x-msgpack", "body"),
        (b"a=1", "application/x-www-form-urlencoded", "content-type"),
    ],
)
def test_bodies_that_cannot_be_read(station: Station, content: bytes, kind: str, param: str) -> None:
    answer = station.http.post("/v1/actions", content=content, headers={"content-type": kind})
    assert refused(answer) == (400, "invalid_steering", param)


def test_wrong_dtypes_in_msgpack(station: Station) -> None:
    for picture, complaint in ((SCENE.astype(np.float32), "uint8"), (SCENE[:, :, 0], "height, width, 3")):
        content = arrays.pack(body(images={"front": picture}))
        answer = station.http.post("/v1/actions", content=content, headers={"content-type": "application/msgpack"})
        assert refused(answer) == (400, "invalid_steering", "images.front")
        assert complaint in answer.json()["error"]["message"]


def test_one_pixel_reaches_the_model(station: Station) -> None:
    one = np.array([[[9, 8, 7]]], np.uint8)
    assert station.http.post("/v1/actions", json=body(images=[text_of(one)])).status_code == 200
    np.testing.assert_array_equal(np.asarray(station.engine.prompts[0]["multi_modal_data"]["image"][0]), one)


def test_what_the_models_processor_refuses_is_the_clients_error(station: Station) -> None:
    async def refuse(prompts: list[Any]) -> list[Any]:
        raise ValueError("height must be larger than factor")

    station.engine.render_cmpl_async = refuse  # type: ignore[method-assign]
    assert refused(station.http.post("/v1/actions", json=body())) == (400, "invalid_steering", "images")


def test_too_few_tokens_are_an_error(station: Station) -> None:
    station.engine.ids = lambda prompt, n: IDS[: n - 1]
    assert refused(station.http.post("/v1/actions", json=body()))[:2] == (500, "engine_unsteered")


def test_a_prompt_that_leaves_no_room_for_the_actions_is_the_clients_error(station: Station) -> None:
    length = len(station.app.state.steersman_robots.policy.tokenizer.encode(PROMPT.format(instruction="go"))) + 1
    station.engine.model_config.max_model_len = length + len(IDS)
    assert station.http.post("/v1/actions", json=body()).status_code == 200
    station.engine.model_config.max_model_len -= 1
    answer = station.http.post("/v1/actions", json=body())
    assert refused(answer) == (400, "invalid_steering", "instruction")
    assert f"{length} tokens leave no room for 7" in answer.json()["error"]["message"]


def test_an_engine_that_fails(station: Station) -> None:
    station.engine.fail = RuntimeError("dead")
    assert station.http.post("/v1/actions", json=body(steering=ADD)).status_code == 500
    assert station.outcome("failed") == 1
    assert station.idle()


def test_other_models_have_no_actions(tmp_path: Path) -> None:
    station = Station(tmp_path, {"model_type": "llama"})
    assert refused(station.http.post("/v1/actions", json=body()))[:2] == (501, "policy_unavailable")


# -- the limit on motions ---------------------------------------------------------------------------


def test_motions_are_cut_and_counted_and_the_gripper_is_not(tmp_path: Path) -> None:
    station = Station(tmp_path, max_action_delta=0.025)
    station.engine.ids = lambda prompt, n: [31744] * n
    found = station.http.post("/v1/actions", json=body()).json()
    whole = [expected(31744, dim) for dim in range(7)]
    wanted = [min(x, 0.025) for x in whole[:6]] + [whole[6]]
    np.testing.assert_allclose(found["actions"], [wanted], atol=1e-15)
    over = sum(x > 0.025 for x in whole[:6])
    assert 0 < over < 6
    assert whole[6] > 0.025
    assert found["saturated"] == over
    assert station.metric('steersman_action_saturation_total{policy="openvla"}') == over
    station.engine.ids = lambda prompt, n: [31999] * n
    lowest = station.http.post("/v1/actions", json=body()).json()["actions"][0]
    assert min(lowest[:6]) == -0.025
    assert lowest[6] == pytest.approx(-254 / 255)


def test_without_a_limit_nothing_is_cut(station: Station) -> None:
    station.http.post("/v1/actions", json=body())
    assert station.metric('steersman_action_saturation_total{policy="openvla"}') == 0


def test_the_metrics_names(station: Station) -> None:
    station.http.post("/v1/actions", json=body())
    text = generate_latest(station.registry).decode()
    assert 'steersman_actions_total{outcome="ok",policy="openvla"} 1.0' in text
    assert 'steersman_action_seconds_count{policy="openvla"} 1.0' in text


# -- a client that goes away ------------------------------------------------------------------------


def test_a_client_that_vanishes_stops_the_engine(station: Station) -> None:
    station.engine.hanging = True
    content = json.dumps(body(steering=ADD)).encode()
    messages = [{"type": "http.request", "body": content}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        while not station.engine.started.is_set():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/actions", "query_string": b"", "headers": []}
        await asyncio.wait_for(station.app({**scope, "http_version": "1.1"}, receive, _ignore), 20)

    asyncio.run(ask())
    assert station.engine.stopped.is_set()
    assert station.outcome("cancelled") == 1
    assert station.idle()


@pytest.mark.parametrize("path", ["/v1/actions", "/act"])
def test_a_client_that_vanishes_while_it_sends_is_no_failure(station: Station, path: str) -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [], "http_version": "1.1"}
    asyncio.run(station.app(scope, receive, send))
    assert statuses[0] == 499


async def _ignore(message: Any) -> None:
    pass


# -- OpenVLA's REST ---------------------------------------------------------------------------------


def payload(**changes: Any) -> dict[str, Any]:
    about = {"image": SCENE, "instruction": "go", "unnorm_key": KEY, **changes}
    return {k: v for k, v in about.items() if v is not ...}


def test_act_is_answered_by_one_array(station: Station) -> None:
    answer = station.http.post("/act", content=arrays.to_json(payload()))
    found = arrays.from_json(answer.content)
    assert (found.shape, found.dtype) == ((7,), np.float64)
    np.testing.assert_allclose(found, WANTED, atol=1e-15)


def test_the_real_json_numpy_in_both_of_its_encodings(station: Station) -> None:
    theirs = pytest.importorskip("json_numpy", reason="pip install json-numpy")
    once = station.http.post("/act", content=theirs.dumps(payload()))
    np.testing.assert_allclose(theirs.loads(once.text), WANTED, atol=1e-15)
    twice = station.http.post("/act", json={"encoded": theirs.dumps(payload())})
    assert isinstance(twice.json(), str)
    np.testing.assert_allclose(theirs.loads(twice.json()), WANTED, atol=1e-15)


@pytest.mark.parametrize(
    ("query", "given", "tokens"),
    [
        ({}, {}, None),
        ({"steering": json.dumps(ADD)}, {}, 3),
        ({"profile": "calm"}, {}, 3),
        ({}, {"steering": ADD}, 3),
        ({"profile": "calm"}, {"steering": ADD}, 3),
        ({"unnorm_key": KEY}, {"unnorm_key": ...}, None),
    ],
)
def test_steering_of_act(station: Station, query: Any, given: Any, tokens: int | None) -> None:
    answer = station.http.post("/act", params=query, content=arrays.to_json(payload(**given)))
    assert answer.status_code == 200, answer.text
    report = json.loads(answer.headers["steersman-report"])
    assert report["saturated"] == report["strays"] == 0
    if tokens is None:
        assert "steering" not in report
    else:
        assert [e["tokens"] for e in report["steering"]["interventions"]] == [tokens]
    both = "steering" in given and "profile" in query
    if both:  # the payload's own goes first
        alone = station.http.post("/act", content=arrays.to_json(payload(steering=ADD)))
        assert json.loads(alone.headers["steersman-report"]) == report


@pytest.mark.parametrize(
    ("query", "given", "param"),
    [
        ({"scale": "2"}, {}, "scale"),
        ({"steering": "{"}, {}, "steering"),
        ({"steering": "{}", "profile": "calm"}, {}, "profile"),
        ([("profile", "a"), ("profile", "b")], {}, "profile"),
        ({"profile": "gone"}, {}, "steering.profile"),
        ({}, {"unnorm_key": "libero"}, "unnorm_key"),
        ({"unnorm_key": KEY}, {"unnorm_key": ""}, "unnorm_key"),
        ({}, {"image": ...}, "image"),
        ({}, {"image": SCENE.astype(np.float64)}, "image"),
        ({}, {"state": [1]}, "state"),
        ({}, {"encoded": "{}"}, "encoded"),
    ],
)
def test_what_act_refuses(station: Station, query: Any, given: Any, param: str) -> None:
    answer = station.http.post("/act", params=query, content=arrays.to_json(payload(**given)))
    status, _, found = refused(answer)
    assert 400 <= status < 500
    assert found == param


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Api-Key wrong", 401), ("Basic key", 401), ("Api-Key key", 200), ("Bearer key", 200)],
)
def test_act_needs_the_api_key(
    station: Station, monkeypatch: pytest.MonkeyPatch, header: str | None, status: int
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    headers = {"authorization": header} if header else {}
    assert station.http.post("/act", content=arrays.to_json(payload()), headers=headers).status_code == status


def test_a_chunk_of_several_actions_is_a_table(tmp_path: Path) -> None:
    about = {
        "type": "bins",
        "prompt": "{instruction}",
        "first_token": 100,
        "bins": 7,
        "chunk": 2,
        "norm_stats": {KEY: {"action": STATS}},
    }
    station = Station(tmp_path, {**OPENVLA, "steersman_policy": about})
    station.engine.ids = lambda prompt, n: [103] * n
    assert arrays.from_json(station.http.post("/act", content=arrays.to_json(payload())).content).shape == (2, 7)
