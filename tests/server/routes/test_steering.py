from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from steersman.steering.assets import Asset, parse_metadata
from tests.models.tiny import _tokenizer
from tests.server.fakes import client, frontend
from tests.steering.library import LAYERS, REF, D, inline, noise

RESOLVE = "/v1/steering/resolve"
DEFAULT = "/v1/steering/default"
ADD = {"op": "add", "vector": inline(noise(D)), "layers": [1]}


@pytest.fixture
def http(tmp_path: Path) -> TestClient:
    return client(frontend(tmp_path, tokenizer=_tokenizer()))


def error(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def resolve(http: TestClient, *tokens: Any, **prompt: Any) -> dict[str, Any]:
    steering = {"interventions": [{**ADD, "tokens": t} for t in tokens]}
    answer = http.post(RESOLVE, json={"steering": steering, **prompt})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def spelled(entry: dict[str, Any], ids: list[int]) -> str:
    chosen = [ids[i] for a, b in entry["prompt_positions"] for i in range(a, b)]
    return str(_tokenizer().decode(chosen))


def test_the_model(http: TestClient) -> None:
    found = http.get("/v1/steering/model").json()
    assert (found["n_layers"], found["d_model"]) == (LAYERS, D)
    assert found["sites"]["resid_post"] == list(range(LAYERS))
    assert "add" in found["ops"]
    assert found["limits"]["interventions"] == 64


def test_a_plan_without_a_prompt(http: TestClient) -> None:
    found = resolve(http, "all")
    assert len(found["plan"]) == 64
    assert found["interventions"][0] == {
        "index": 0, "op": "add", "layers": [1], "site": "resid_post", "assets": ["inline"],
        "path": "steering.interventions[0]", "gated": False,
    }  # fmt: skip
    assert found["cost"]["places"] == 1
    assert "prompt_tokens" not in found
    assert http.post(RESOLVE, json={}).json()["interventions"] == []


def test_the_plan_of_an_injection(http: TestClient) -> None:
    recipe = {"rr_attn": [0.1, 0.4, 0.3, 0.2], "rr_mlp": [0.0] * LAYERS, "lambda_a": 0.2, "lambda_m": 0.1}
    recipe |= {"sources": {"attn": [1]}, "targets": {"attn": [0, 2, 3]}}
    asked = {"op": "inject", "recipe": {"inline": recipe}}
    found = http.post(RESOLVE, json={"steering": {"interventions": [asked]}, "prompt": [5, 6, 7]}).json()
    (told,) = found["interventions"]
    assert (told["layers"], told["site"], told["sites"]) == ([2, 3], None, {"attn_out": [2, 3]})
    assert (told["assets"], told["prompt_positions"]) == (["inline"], [[2, 3]])
    assert (found["cost"]["places"], found["cost"]["rows"]) == (2, 2)
    wrong = http.post(RESOLVE, json={"steering": {"interventions": [{**asked, "site": "attn_out"}]}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "steering.interventions[0].site")


def test_what_the_linters_find_is_a_warning(tmp_path: Path) -> None:
    made = frontend(tmp_path)
    large = {**ADD, "scale": 1e5}
    found = client(made).post(RESOLVE, json={"steering": {"interventions": [large, {**ADD, "scale": -0.1}]}}).json()
    [overlap] = found["warnings"]
    assert "steering.interventions[0] and steering.interventions[1] overlap: a cosine of -1.000" in overlap
    unknown = "its size beside the stream, of which nothing usual is known (--steering-norm-baseline)"
    assert found["unchecked"] == [f"steering.interventions[{i}]: {unknown}" for i in range(2)]
    meta = {"name": "usual", "kind": "baseline", "model": REF, "counts": [1000] * LAYERS}
    made.store.add(Asset(parse_metadata({**meta, "mean": [math.log(20.0)] * LAYERS, "deviation": [0.1] * LAYERS})))
    made.settings = replace(made.settings, norm_baseline="usual")
    found = client(made).post(RESOLVE, json={"steering": {"interventions": [large]}}).json()
    [size] = found["warnings"]
    times = 1e5 * float(noise(D).norm()) / 20
    assert f"steering.interventions[0] is {times:.2f} times as large as the stream at layer 1" in size
    assert found["unchecked"] == []


def test_what_a_whole_encode_costs_is_told(tmp_path: Path) -> None:
    made = frontend(tmp_path)
    tensors = {"encoder": noise(7, D), "decoder": noise(7, D), "b_enc": noise(7), "b_dec": noise(D)}
    meta = {"name": "wide", "kind": "dictionary", "model": REF, "layer": 2, "architecture": "topk", "k": 3}
    ref = made.store.add(Asset(parse_metadata(meta), tensors))
    feature = {"op": "feature", "dictionary": "wide", "index": 3, "value": 2.0}
    found = client(made).post(RESOLVE, json={"steering": {"interventions": [feature]}}).json()
    assert found["cost"]["encodes"] == [
        {"for": "edit", "layer": 2, "site": "resid_post", "dictionary": ref, "features": 7,
         "multiply_adds_per_token": 7 * D, "bytes_per_worker": 4 * (7 * D + 7)}
    ]  # fmt: skip
    add = {**feature, "mode": "add"}
    found = client(made).post(RESOLVE, json={"steering": {"interventions": [add]}}).json()
    assert found["cost"]["encodes"] == []
    gated = {**add, "layers": 2, "when": {"dictionary": "wide", "index": 1, "above": 0.5, "over": "last_prompt"}}
    probes = [{"dictionary": "wide", "index": i} for i in (2, 0)]
    found = client(made).post(RESOLVE, json={"steering": {"interventions": [gated], "probes": probes}}).json()
    assert [e["for"] for e in found["cost"]["encodes"]] == ["gate", "probe"]  # one encode for both probes


def test_positions_of_token_ids(http: TestClient) -> None:
    tokens = [
        "all",
        "prompt",
        "generated",
        {"last": 2},
        {"positions": [0, 3, 9]},
        {"token_ids": [7]},
        {"ranges": [[1, 3]]},
    ]
    found = resolve(http, *tokens, prompt=[5, 6, 7, 8])
    assert found["prompt_tokens"] == 4
    assert found["first_edited"] == 0
    entries = found["interventions"]
    assert [e["prompt_positions"] for e in entries] == [
        [[0, 4]],
        [[0, 4]],
        [],
        [[2, 4]],
        [[0, 1], [3, 4]],
        [[2, 3]],
        [[1, 3]],
    ]
    assert [e["edits_generated"] for e in entries] == [True, False, True, False, True, True, False]


def test_positions_of_text(http: TestClient) -> None:
    prompt = "The ship came about."
    found = resolve(http, {"text": "ship"}, {"text": "absent"}, prompt=prompt)
    assert "ship" in spelled(found["interventions"][0], _tokenizer().encode(prompt))
    assert found["warnings"][-1] == "steering.interventions[1].tokens matches no token of this prompt"


@pytest.mark.parametrize("parts", [False, True])
def test_positions_of_roles(http: TestClient, parts: bool) -> None:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if parts else text

    messages = [{"role": "system", "content": content("Be kind.")}, {"role": "user", "content": content("Hello you")}]
    found = resolve(http, {"roles": ["user"]}, {"roles": ["system"]}, messages=messages)
    plain = [{**m, "content": m["content"][0]["text"] if parts else m["content"]} for m in messages]
    ids = _tokenizer().apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert spelled(found["interventions"][0], ids) == "Hello you"
    assert spelled(found["interventions"][1], ids) == "Be kind."


def test_the_same_request_gives_the_same_plan(http: TestClient) -> None:
    assert resolve(http, "all")["plan"] == resolve(http, "all", prompt="x")["plan"]
    assert resolve(http, "all")["plan"] != resolve(http, "prompt")["plan"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[" * 100_000, "body"),
        (b"[]", None),
        (b'{"colour": 1}', "colour"),
        (b'{"steering": []}', "steering"),
        (b'{"steering": {"interventions": [{"op": "add", "vector": "gone"}]}}', "steering.interventions[0].vector"),
        (b'{"prompt": 3}', None),
        (b'{"prompt": [-1]}', None),
        (b'{"prompt": [99999999999]}', None),
        (b'{"messages": "hi"}', "messages"),
        (b'{"messages": [{"content": "x"}]}', "messages"),
        (b'{"messages": [3]}', None),
        (b'{"messages": [], "prompt": "x"}', "messages"),
    ],
)
def test_what_cannot_be_resolved(http: TestClient, body: bytes, param: str | None) -> None:
    answer = http.post(RESOLVE, content=body, headers={"content-type": "application/json"})
    found = error(answer, 404 if b"gone" in body else 400)
    assert param is None or found["param"] == param


@pytest.mark.parametrize(
    ("tokens", "prompt", "param"),
    [
        ({"roles": ["user"]}, {"prompt": "x"}, "steering.interventions[0].tokens.roles"),
        ({"ranges": [[3, -3]]}, {"prompt": [1, 2, 3]}, "steering.interventions[0].tokens.ranges[0]"),
    ],
)
def test_selectors_that_do_not_go_with_the_prompt(http: TestClient, tokens: Any, prompt: Any, param: str) -> None:
    answer = http.post(RESOLVE, json={"steering": {"interventions": [{**ADD, "tokens": tokens}]}, **prompt})
    assert error(answer)["param"] == param


def test_without_a_tokenizer_only_ids(tmp_path: Path) -> None:
    http = client(frontend(tmp_path))
    assert resolve(http, "all", prompt=[1, 2])["prompt_tokens"] == 2
    for prompt in ({"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
        assert error(http.post(RESOLVE, json=prompt))["param"] == next(iter(prompt))
    body = {"steering": {"interventions": [{**ADD, "tokens": {"text": "x"}}]}, "prompt": [1, 2]}
    assert error(http.post(RESOLVE, json=body))["param"] == "steering.interventions[0].tokens.text"


def test_the_default_profile(http: TestClient) -> None:
    assert http.get(DEFAULT).json() == {"steering": None}
    assert http.put(DEFAULT, json={"profile": "calm"}).json() == {"steering": {"profile": "calm"}}
    assert http.get(DEFAULT).json() == {"steering": {"profile": "calm"}}
    found = http.post(RESOLVE, json={"steering": {"interventions": [ADD]}}).json()
    assert [e["path"] for e in found["interventions"]] == [
        "default.profile.interventions[0]",
        "steering.interventions[0]",
    ]
    assert http.post(RESOLVE, json={"steering": {"default": False}}).json()["interventions"] == []
    assert http.delete(DEFAULT).status_code == 204
    assert http.get(DEFAULT).json() == {"steering": None}
    assert http.delete(DEFAULT).status_code == 204


def test_a_default_profile_that_was_given_at_the_start_can_be_left(tmp_path: Path) -> None:
    http = client(frontend(tmp_path, default_profile="calm"))
    assert http.get(DEFAULT).json() == {"steering": {"profile": "calm"}}
    assert http.delete(DEFAULT).status_code == 204
    assert http.get(DEFAULT).json() == {"steering": None}
    assert client(frontend(tmp_path, default_profile="calm")).get(DEFAULT).json() == {"steering": None}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, "steering"),
        (b"null", 400, "steering"),
        (b"[" * 100_000, 400, "steering"),
        (b'"calm"', 400, "steering"),
        (b'{"profile": "gone"}', 404, "steering.profile"),
        (b'{"profile": "nested"}', 400, "steering.profile"),
        (b'{"profile": "broken"}', 400, "steering.profile.interventions[0].scale"),
        (b'{"colour": 1}', 400, "steering.colour"),
        (b'{"interventions": [{"op": "add", "vector": "v", "scale": NaN}]}', 400, "steering.interventions[0].scale"),
    ],
)
def test_a_default_profile_that_is_none(http: TestClient, body: bytes, status: int, param: str) -> None:
    http.put(DEFAULT, json={"profile": "calm"})
    assert error(http.put(DEFAULT, content=body), status)["param"] == param
    assert http.get(DEFAULT).json() == {"steering": {"profile": "calm"}}


def test_the_schema_says_what_steering_is(http: TestClient) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert "interventions" in schemas["Steering"]["properties"]
    for model in ("SteeredChatRequest", "SteeredCompletionRequest", "SteeredResponsesRequest"):
        assert {"$ref": "#/components/schemas/Steering"} in schemas[model]["properties"]["steering"]["anyOf"]
    text = json.dumps(schemas)
    for ref in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert ref in schemas, ref
