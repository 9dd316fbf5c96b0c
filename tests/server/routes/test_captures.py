"""Captures over HTTP around the toy model: what is answered is what its layers computed, or a refusal that says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from safetensors.numpy import load

from steersman.clients.activations import Capture
from steersman.clients.sdk import Steersman
from steersman.server import captures
from steersman.server.captures import capture
from steersman.server.policies.policy import Observation, Policy, PolicyPrompt
from steersman.server.policies.robots import Robots
from steersman.server.routes import captures as routes
from steersman.steering.activations import Captured, CapturedPrompt, nbytes, places_of
from steersman.steering.errors import EngineUnsteered
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from tests.server.engine.test_captures import truth
from tests.server.robots import SCENE, text_of
from tests.server.toy_engine import IMAGE, PATCHES, Tokenizer, ToyEngine
from tests.steering.library import LAYERS, MODEL, D, inline, noise, plan_of

PATH = "/v1/steering/captures"
TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
EDIT = {"op": "add", "vector": inline(noise(D, seed=3)), "layers": [1]}
FAR = {"op": "ablate", "vector": inline(noise(D, seed=4)), "layers": [0], "tokens": {"text": "ell"}}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyEngine]:
    made = ToyEngine(tmp_path, monkeypatch)
    yield made
    assert made.idle()


def taken(engine: ToyEngine, prompts: Any, **asked: Any) -> Capture:
    response = engine.http.post(PATH, json={"prompts": prompts, **asked})
    assert response.status_code == 200, response.text
    return Capture.from_bytes(response.content)


def refused(engine: ToyEngine, **body: Any) -> tuple[int, str, str, str]:
    """Status, code, param and message; nothing has run."""
    begun = engine.begun
    response = engine.http.post(PATH, json=body)
    error = response.json()["error"]
    assert engine.begun == begun
    return response.status_code, error["code"], error["param"], error["message"]


# -- what is answered -----------------------------------------------------------------------------------


def test_every_kind_of_prompt(engine: ToyEngine) -> None:
    prompts = ["hello there", [3, 9, 12, 4, 1, 60], TURNS]
    tokenizer = Tokenizer()
    wanted = [tokenizer.encode("hello there"), prompts[1], tokenizer.encode("system:be kind;user:hello;", False)]
    found = taken(engine, prompts, sites=["resid_post", "resid_pre"], layers=[0, 3])
    assert [p["token_ids"] for p in found.about["prompts"]] == wanted
    assert [p["positions"] for p in found.about["prompts"]] == [list(range(len(ids))) for ids in wanted]
    assert found.about["sites"] == {"resid_pre": [0, 3], "resid_post": [0, 3]}
    assert (found.about["reduce"], found.about["plan"], found.about["model"]) == ("none", None, "org/Tiny")
    assert len(found.arrays) == 3 * 4
    for i, ids in enumerate(wanted):
        for place, stream in truth(None, ids).items():
            if place.layer in (0, 3):
                assert np.array_equal(found.rows(place.site, place.layer, i), stream.numpy()), (i, place)


SELECTORS: list[Any] = [{"text": "lo"}, {"roles": ["user"]}, {"positions": [-2, 3]}, "last_prompt"]


@pytest.mark.parametrize("tokens", SELECTORS, ids=str)
@pytest.mark.parametrize("reduce", ["none", "mean", "last"])
def test_tokens_and_reductions(engine: ToyEngine, tokens: Any, reduce: str) -> None:
    messages = [{"role": "user", "content": "hello, alone"}]
    found = taken(engine, [TURNS, messages], tokens=tokens, reduce=reduce, layers="1-2")
    for i, prompt in enumerate(found.about["prompts"]):
        text = Tokenizer().decode(prompt["token_ids"])
        span = {"text": "lo", "roles": "hello, alone" if i else "hello"}.get(next(iter(tokens)), "")
        start = text.index(span)
        wanted = list(range(start, start + len(span)))
        if "positions" in tokens:
            wanted = [3, len(text) - 2]
        elif tokens == "last_prompt":
            wanted = [len(text) - 1]
        if i and "text" in tokens:
            wanted = [start, start + 1, text.rindex("lo"), text.rindex("lo") + 1]
        assert prompt["positions"] == (wanted[-1:] if reduce == "last" else wanted)
        for layer in (1, 2):
            own = truth(None, prompt["token_ids"])[Place(layer, Site.RESID_POST)][wanted].numpy()
            if reduce == "none":
                assert np.array_equal(found.rows("resid_post", layer, i), own)
            else:
                row = own.astype(np.float64).mean(0) if reduce == "mean" else own[-1]
                stacked = found.rows("resid_post", layer)
                assert stacked.shape == (2, D)
                np.testing.assert_allclose(stacked[i], row, rtol=2e-7, atol=1e-7)


def test_activations_under_steering(engine: ToyEngine) -> None:
    """After the edits, which select among the tokens of each prompt; and the plan is the same request's elsewhere."""
    steering = {"interventions": [EDIT, FAR]}
    found = taken(engine, ["hello", "a yell"], steering=steering)
    assert found.about["plan"] == plan_of(EDIT, FAR).id
    for i, prompt in enumerate(found.about["prompts"]):
        at = Tokenizer().decode(prompt["token_ids"]).index("ell")
        same = plan_of(EDIT, {**FAR, "tokens": {"ranges": [[at, at + 3]]}})
        for layer in range(LAYERS):
            stream = truth(same, prompt["token_ids"])[Place(layer, Site.RESID_POST)]
            assert np.array_equal(found.rows("resid_post", layer, i), stream.numpy())
            assert not torch.equal(stream, truth(None, prompt["token_ids"])[Place(layer, Site.RESID_POST)])


def test_the_default_profile_is_for_steered_captures_alone(engine: ToyEngine) -> None:
    engine.frontend.set_default({"interventions": [EDIT]})
    bare, steered = taken(engine, ["hello"]), taken(engine, ["hello"], steering={})
    ids = Tokenizer().encode("hello")
    place = Place(3, Site.RESID_POST)
    assert np.array_equal(bare.rows("resid_post", 3, 0), truth(None, ids)[place].numpy())
    assert np.array_equal(steered.rows("resid_post", 3, 0), truth(plan_of(EDIT), ids)[place].numpy())


def test_many_prompts_are_fetched_in_pieces_and_in_order(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "PIECE", 100)
    prompts = [[1 + i % 60, *range(1, 2 + i % 20)] for i in range(50)]
    found = taken(engine, prompts, layers=2)
    assert 1 < engine.most <= captures.AT_ONCE
    for i, ids in enumerate(prompts):
        stream = truth(None, ids)[Place(2, Site.RESID_POST)]
        assert np.array_equal(found.rows("resid_post", 2, i), stream.numpy()), i


def test_a_chat_gets_the_servers_own_template(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def render(messages: list[Any], **options: Any) -> str:
        assert (options["tokenize"], options["add_generation_prompt"]) == (False, True)
        return f"{options['chat_template']} {options['voice']} {messages[0]['content']}"

    monkeypatch.setattr(engine.frontend.tokenizer, "apply_chat_template", render, raising=False)
    chat = SimpleNamespace(chat_template="mine", default_chat_template_kwargs={"voice": "low"})
    engine.state.serving = SimpleNamespace(openai_serving_chat=chat)
    (prompt,) = taken(engine, [TURNS]).about["prompts"]
    assert Tokenizer().decode(prompt["token_ids"]) == "mine low be kind"


class Robot:
    """A policy that reads one picture and the instruction."""

    name, cameras, reads_state = "toy", 1, False

    def prompt(self, observation: Observation) -> PolicyPrompt:
        ids = Tokenizer().encode(observation.instruction)
        return PolicyPrompt([ids[0], IMAGE, *ids[1:]], list(observation.pictures.values()), 7)


def observation(**changes: Any) -> dict[str, Any]:
    return {"observation": {"images": [text_of(SCENE)], "instruction": "pick up", **changes}}


@pytest.fixture
def robot(engine: ToyEngine) -> ToyEngine:
    registry, policy = CollectorRegistry(), cast(Policy, Robot())
    robots = Robots(engine.state, policy, engine, registry)
    engine.http.app.state.steersman_robots = robots  # type: ignore[attr-defined]
    return engine


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [("prompt", list(range(14))), ({"image": True}, [2, 3, 4, 5]), ({"last": 2}, [12, 13])],
    ids=str,
)
def test_what_a_policy_makes_of_an_observation(robot: ToyEngine, tokens: Any, positions: list[int]) -> None:
    found = taken(robot, [observation()], tokens=tokens, layers=1)
    again = taken(robot, [observation()], tokens=tokens, layers=1)  # the engine knows the picture now
    assert np.array_equal(again.rows("resid_post", 1, 0), found.rows("resid_post", 1, 0))
    start, *rest = Tokenizer().encode("pick up")
    ids = [start, *[IMAGE] * (PATCHES + 2), *rest]
    assert found.about["prompts"] == [{"token_ids": ids, "positions": positions}]
    stream = truth(None, ids)[Place(1, Site.RESID_POST)]
    assert np.array_equal(found.rows("resid_post", 1, 0), stream[positions].numpy())


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"images": []}, "images"),
        ({"images": ["x"]}, "images[0]"),
        ({"instruction": 3}, "instruction"),
        ({"steering": {}}, "steering"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_observations(robot: ToyEngine, changes: dict[str, Any], param: str) -> None:
    status, _, its_param, _ = refused(robot, prompts=["a", observation(**changes)])
    assert (status, its_param) == (400, f"prompts[1].observation.{param}")


def test_an_observation_where_no_policy_is_served(engine: ToyEngine) -> None:
    engine.http.app.state.steersman_robots = Robots(engine.state, None, engine, CollectorRegistry())  # type: ignore[attr-defined]
    assert refused(engine, prompts=[observation()])[:3] == (501, "policy_unavailable", "prompts[0].observation")


def test_the_file_is_one_that_safetensors_reads(engine: ToyEngine) -> None:
    data = engine.http.post(PATH, json={"prompts": ["ab"], "layers": [1]}).content
    assert {name: a.shape for name, a in load(data).items()} == {"0.resid_post.1": (3, D)}


# -- what is refused ------------------------------------------------------------------------------------

OK = {"prompts": ["hello"]}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "invalid_steering", "prompts"),
    ({"prompts": []}, "invalid_steering", "prompts"),
    ({"prompts": ["a", []]}, "invalid_steering", "prompts[1]"),
    ({"prompts": ["a", ""]}, "invalid_steering", "prompts[1]"),
    ({"prompts": [3]}, "invalid_steering", "prompts[0]"),
    ({"prompts": [[1, -2]]}, "out_of_range", "prompts[0][1]"),
    ({"prompts": [[1, True]]}, "invalid_steering", "prompts[0][1]"),
    ({"prompts": ["a", [{"content": "x"}]]}, "invalid_steering", "prompts[1]"),
    ({"prompts": [[1] * 64]}, "invalid_steering", "prompts[0]"),
    ({"prompts": ["a"] * 257}, "invalid_steering", "prompts"),
    ({"prompts": [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]]},
     "invalid_steering", "prompts[0]"),
    ({**OK, "colour": 1}, "unknown_field", "colour"),
    ({**OK, "sites": []}, "invalid_steering", "sites"),
    ({**OK, "sites": ["resid"]}, "invalid_steering", "sites[0]"),
    ({**OK, "layers": 4}, "layer_out_of_range", "layers"),
    ({**OK, "layers": [1, 1]}, "invalid_steering", "layers"),
    ({**OK, "layers": "b"}, "invalid_steering", "layers"),
    ({**OK, "tokens": "generated"}, "invalid_steering", "tokens"),
    ({**OK, "tokens": {"text": "xyz"}}, "invalid_steering", "tokens"),
    ({**OK, "tokens": {"roles": ["user"]}}, "invalid_steering", "tokens.roles"),
    ({**OK, "reduce": "max"}, "invalid_steering", "reduce"),
    ({**OK, "keep": 1}, "invalid_steering", "keep"),
    ({**OK, "steering": {"interventions": [{**EDIT, "layers": [9]}]}}, "layer_out_of_range",
     "steering.interventions[0].layers"),
    ({**OK, "steering": {"stream_probes": True}}, "invalid_steering", "steering.stream_probes"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param"), BAD, ids=[f"{p}-{i}" for i, (_, _, p) in enumerate(BAD)])
def test_bad_requests_name_the_field_before_anything_runs(
    engine: ToyEngine, body: dict[str, Any], code: str, param: str
) -> None:
    status, its_code, its_param, _ = refused(engine, **body)
    assert (status, its_code, its_param) == (400, code, param)


def test_a_token_that_the_model_has_not(engine: ToyEngine) -> None:
    response = engine.http.post(PATH, json={"prompts": ["a", [1, 64]]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompts[1]")
    assert "out of vocabulary" in response.json()["error"]["message"]


def test_too_large_is_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch, max_capture_mb=1, max_capture_prompts=2000)
    tokens = 2**20 // (4 * D * LAYERS)
    prompts = [[1] * 32] * (tokens // 32)
    status, code, param, message = refused(engine, prompts=[*prompts, [1]])
    assert (status, code, param) == (413, "payload_too_large", "prompts")
    assert f"{2**20 + 4 * D * LAYERS} bytes; at most {2**20} (--steering-max-capture-mb)" in message
    assert taken(engine, prompts[:9], reduce="mean").rows("resid_post", 0).shape == (9, D)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    layers=st.sets(st.integers(0, 3), min_size=1),
    reduce=st.sampled_from(["none", "mean", "last"]),
)
def test_the_size_that_is_checked_is_the_size_of_what_comes(counts: list[int], layers: set[int], reduce: Any) -> None:
    places = places_of({"resid_post": sorted(layers), "mlp_post": [1]})
    widths = [MODEL.width(place.site, place.layer) for place in places]
    prompts = [
        CapturedPrompt([1] * n, list(range(n)), {
            place: np.zeros((n, width) if reduce == "none" else width, np.float32)
            for place, width in zip(places, widths, strict=True)
        })
        for n in counts
    ]  # fmt: skip
    assert nbytes(counts, widths, reduce) == Captured("m", places, prompts, reduce, None).nbytes


def test_a_site_that_was_never_reached_is_an_error(engine: ToyEngine) -> None:
    with pytest.raises(EngineUnsteered, match="layer 1 attn_z was not captured"):
        asyncio.run(capture(engine.state, ["ab"], [Site.ATTN_Z], [1]))


# -- running --------------------------------------------------------------------------------------------


def test_captures_wait_for_room_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch, max_capture_mb=1)
    ids = [1] * 60
    size = 4 * D * LAYERS * 60

    async def many() -> None:
        engine.state.capturing.total = 3 * size
        engine.wait = asyncio.Event()
        tasks = [asyncio.create_task(capture(engine.state, [ids, ids], [Site.RESID_POST])) for _ in range(3)]
        for _ in range(200):
            await asyncio.sleep(0.001)
        assert (engine.running, engine.state.capturing.used) == (2, 2 * size)  # a second one has no room
        engine.wait.set()
        await asyncio.gather(*tasks)
        assert engine.most == 2

    asyncio.run(many())
    assert engine.idle()


def test_a_cancelled_capture_ends_its_requests(engine: ToyEngine) -> None:
    async def cancelled() -> None:
        engine.wait = asyncio.Event()
        task = asyncio.create_task(capture(engine.state, [[1, i] for i in range(20)], [Site.RESID_POST]))
        while engine.running < captures.AT_ONCE:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert engine.running == captures.AT_ONCE
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert engine.running == 0


def test_one_prompt_that_fails_ends_the_others(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("steersman.server.engine.captures.Capture._keep", fails)
    with pytest.raises(EngineUnsteered, match="capturing activations failed: no memory"):
        asyncio.run(capture(engine.state, ["ab", "cd"], [Site.RESID_POST]))


# -- kept -----------------------------------------------------------------------------------------------


def test_kept_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch, admin_key="secret", max_kept_captures_mb=1)
    engine.http.headers["x-admin-key"] = "secret"
    body = {"prompts": ["hello", TURNS], "layers": [1]}
    plain = engine.http.post(PATH, json=body).content
    kept = engine.http.post(PATH, json={**body, "keep": True})
    assert kept.status_code == 201
    about = kept.json()
    assert about["sites"] == {"resid_post": [1]}
    assert engine.http.get(f"{PATH}/{about['id']}").content == plain
    assert engine.http.get(PATH).json()["data"] == [about]
    assert about["bytes"] == len(plain)
    assert engine.http.post(PATH, json={**body, "keep": True}).json() == about  # the same content, the same id

    del engine.http.headers["x-admin-key"]
    assert engine.http.get(f"{PATH}/{about['id']}").status_code == 200
    assert engine.http.delete(f"{PATH}/{about['id']}").status_code == 401
    begun = engine.begun
    assert engine.http.post(PATH, json={**body, "keep": True}).json()["error"]["code"] == "unauthorized"
    assert engine.begun == begun
    assert engine.http.post(PATH, json=body).content == plain

    engine.http.headers["x-admin-key"] = "secret"
    assert engine.http.delete(f"{PATH}/{about['id']}").status_code == 204
    for method in ("GET", "DELETE"):
        gone = engine.http.request(method, f"{PATH}/{about['id']}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "capture_not_found")
    assert engine.http.get(f"{PATH}/..%2f..%2fetc").status_code == 404
    assert engine.http.get(PATH).json()["data"] == []


def test_what_is_kept_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch, chunk=64, max_kept_captures_mb=1)
    prompts = [[1 + i, *[2] * 60] for i in range(60)]  # 0.47 MB each time
    for seed in (5, 6):
        assert engine.http.post(PATH, json={"prompts": [[seed], *prompts], "keep": True}).status_code == 201
    status, code, param, message = refused(engine, prompts=[[7], *prompts], keep=True)
    assert (status, code, param) == (413, "payload_too_large", "keep")
    assert str(2**20) in message
    assert len(list((tmp_path / "captures").iterdir())) == 2
    doomed = engine.http.get(PATH).json()["data"][0]["id"]
    assert engine.http.delete(f"{PATH}/{doomed}").status_code == 204
    assert engine.http.post(PATH, json={"prompts": [[7], *prompts], "keep": True}).status_code == 201


# -- the client -----------------------------------------------------------------------------------------


def test_the_client(engine: ToyEngine) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        found = engine.http.request(request.method, request.url.raw_path.decode(), content=request.read())
        return httpx.Response(found.status_code, content=found.content)

    with Steersman(transport=httpx.MockTransport(handle)) as steersman:
        found = steersman.capture(["hello", [1, 2]], layers=[2], reduce="mean")
        assert found.rows("resid_post", 2).shape == (2, D)
        kept = steersman.keep_capture(["hello", [1, 2]], layers=[2], reduce="mean")
        again = steersman.kept_capture(kept["id"])
        assert np.array_equal(again.rows("resid_post", 2), found.rows("resid_post", 2))
        assert [about["id"] for about in steersman.kept_captures()] == [kept["id"]]
        steersman.forget_capture(kept["id"])
        assert steersman.kept_captures() == []


def test_the_schema_is_told() -> None:
    schemas: dict[str, Any] = {}
    routes.describe(schemas)
    assert {"prompts", "sites", "keep"} <= set(schemas["SteeringCapture"]["properties"])
    for ref in {part.split('"')[0] for part in json.dumps(schemas).split("#/components/schemas/")[1:]}:
        assert ref in schemas, ref
