"""The server of a π0: robots' routes, batches of those that wait, and what goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from steersman.clients.robot import HttpRobot, SocketRobot
from steersman.clients.sdk import SteersmanError
from steersman.server.policies.policy import Observation
from tests.models.tiny_pi0 import BACKBONE, CHUNK, D_EXPERT, D_MODEL, DIMS, EXPERT, KEY, STATS, STEPS
from tests.server.pi0.served import Oracle, Station, observation
from tests.server.pi0.test_model import CLOSE, asked, edit
from tests.server.robots import listening, text_of

NAMES = ("observation/image", "observation/wrist_image")


@pytest.fixture
def http(station: Station) -> TestClient:
    return TestClient(station.app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def port(station: Station) -> Iterator[int]:
    with listening(station.app) as port:
        yield port


def body(seen: Observation, **more: Any) -> dict[str, Any]:
    assert seen.state is not None
    about = {
        "images": [text_of(p) for p in seen.pictures.values()],
        "instruction": seen.instruction,
        "state": seen.state.tolist(),
        "seed": seen.seed,
        **more,
    }
    return {k: v for k, v in about.items() if v is not ...}


def scaled(output: Any) -> Any:
    """The model's numbers in the robot's units, by openpi's formula."""
    mean, std = (np.array(STATS["action"][name]) for name in ("mean", "std"))
    return output[:, :DIMS] * (std + 1e-6) + mean


def test_an_observation_becomes_a_chunk_of_actions(http: TestClient, station: Station, oracle: Oracle) -> None:
    seen = observation(1)
    found = http.post("/v1/actions", json=body(seen)).json()
    np.testing.assert_allclose(found["actions"], scaled(oracle.sample(station.prompt(seen))), **CLOSE)
    assert np.shape(found["actions"]) == (CHUNK, DIMS)
    assert (found["policy"], found["strays"], found["ignored"]) == ("pi0", 0, [])
    assert "token_ids" not in found
    assert "steering" not in found


def test_a_steered_one_has_a_report(http: TestClient, station: Station) -> None:
    seen, steering = observation(2), asked(edit("add", 1), edit("add", BACKBONE + 1))
    found = http.post("/v1/actions", json=body(seen, steering=steering)).json()
    ((wanted, report),) = station.batch([(seen, steering)])
    np.testing.assert_allclose(found["actions"], scaled(wanted), atol=1e-12)
    assert found["steering"] == report
    assert [i["tokens"] for i in report["interventions"]] == [
        len(station.prompt(seen).token_ids), STEPS * (CHUNK + 1)
    ]  # fmt: skip
    assert not station.frontend.tickets
    assert not station.engine.model.runtime.requests


def test_without_a_seed_every_answer_begins_from_other_noise(http: TestClient) -> None:
    one, other = (http.post("/v1/actions", json=body(observation(3), seed=...)).json()["actions"] for _ in range(2))
    assert one != other
    one, other = (http.post("/v1/actions", json=body(observation(3), seed=5)).json()["actions"] for _ in range(2))
    assert one == other


def test_the_model_tells_its_parts(http: TestClient) -> None:
    found = http.get("/v1/steering/model").json()
    assert (found["n_layers"], found["d_model"]) == (BACKBONE + EXPERT, D_MODEL)
    assert found["parts"]["backbone"] == {
        "layers": [0, BACKBONE - 1], "tokens": "prompt", "d_model": D_MODEL, "n_heads": 4,
    }  # fmt: skip
    expert = found["parts"]["expert"]
    assert (expert["layers"], expert["tokens"], expert["d_model"]) == ([3, 5], "generated", D_EXPERT)
    assert (expert["steps"], expert["tokens_per_step"]) == (STEPS, CHUNK + 1)
    assert found["widths"]["resid_post"] == {str(i): D_MODEL if i < BACKBONE else D_EXPERT for i in range(6)}


def test_openpis_websocket_and_sessions(port: int, station: Station) -> None:
    seen, steering = observation(4), asked(edit("add", BACKBONE, scale=2.0))
    sent: dict[str, Any] = {**dict(zip(NAMES, seen.pictures.values(), strict=True)), "prompt": seen.instruction}
    sent |= {"observation/state": seen.state, "seed": seen.seed}
    with SocketRobot(f"ws://127.0.0.1:{port}", steering=steering, timeout=60) as robot:
        assert (robot.metadata["policy"], robot.metadata["unnorm_keys"]) == ("pi0", {KEY: DIMS})
        steered = robot.infer(sent)
        robot.session(steering=None)
        plain = robot.infer(sent)
    (wanted, _), (bare, _) = station.batch([(seen, steering)])[0], station.batch([(seen, None)])[0]
    np.testing.assert_allclose(steered.actions, scaled(wanted), atol=1e-6)
    np.testing.assert_allclose(plain.actions, scaled(bare), atol=1e-6)
    assert "steering" in steered.about
    assert "steering" not in plain.about


def test_sixteen_robots_get_their_own_actions(port: int, station: Station) -> None:
    """Sixteen robots, every second one steered in its own way, get what each gets alone."""
    seen = [observation(50 + i, "go up now"[: 2 + i % 7]) for i in range(16)]
    steering = [asked(edit("add", i % 6, scale=1.0 + i)) if i % 2 else None for i in range(16)]
    alone = [station.batch([(o, s)])[0][0] for o, s in zip(seen, steering, strict=True)]
    ready = threading.Barrier(16)

    def fly(i: int) -> list[Any]:
        with HttpRobot(f"http://127.0.0.1:{port}", timeout=120) as robot:
            ready.wait(60)
            images = {str(k): p for k, p in enumerate(seen[i].pictures.values())}
            about: dict[str, Any] = {"state": seen[i].state, "seed": seen[i].seed, "steering": steering[i]}
            return [robot.act(images, seen[i].instruction, **about).actions for _ in range(3)]

    with ThreadPoolExecutor(16) as pool:
        for got, wanted in zip(pool.map(fly, range(16)), alone, strict=True):
            for actions in got:
                np.testing.assert_allclose(actions, scaled(wanted), **CLOSE)


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["param"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"state": ...}, (400, "state")),
        ({"state": [1.0]}, (400, "state")),
        ({"images": []}, (400, "images")),
        ({"seed": -1}, (400, "seed")),
        ({"seed": True}, (400, "seed")),
        ({"unnorm_key": "gone"}, (400, "unnorm_key")),
        ({"instruction": "word " * 60}, (400, "instruction")),
        ({"instruction": "go <|bos|>"}, (400, "instruction")),
        ({"steering": asked(edit("add", 1, tokens="generated"))}, (400, "steering.interventions[0].tokens")),
        ({"steering": asked(edit("add", 1, tokens={"image": 2}))}, (400, "steering.interventions[0].tokens.image")),
        ({"steering": asked({**edit("add", 1), "layers": [BACKBONE]})}, (400, "steering.interventions[0].vector")),
        ({"steering": {"signals": ["entropy"]}}, (400, "steering.signals")),
    ],
)
def test_what_cannot_be_done_is_refused(http: TestClient, station: Station, changes: Any, wanted: Any) -> None:
    assert refused(http.post("/v1/actions", json=body(observation(5), **changes))) == wanted
    assert not station.frontend.tickets
    assert http.post("/v1/actions", json=body(observation(5))).status_code == 200


def test_one_picture_is_too_few_for_openvlas_route(http: TestClient) -> None:
    answer = http.post("/act", json={"image": observation(6).pictures["camera 0"].tolist(), "instruction": "go"})
    assert refused(answer) == (400, "image")


def test_actions_that_are_no_numbers_are_an_error(
    http: TestClient, station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(station.engine.model, "sample", lambda jobs: [np.full((CHUNK, 6), np.nan) for _ in jobs])
        answer = http.post("/v1/actions", json=body(observation(7)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "actions_malformed")


def test_a_batch_that_fails_fails_its_own_robots_alone(
    http: TestClient, station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(station.engine.model.model, "forward", None)
        answer = http.post("/v1/actions", json=body(observation(8), steering=asked(edit("add", 1))))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_unsteered")
    assert not station.engine.model.runtime.requests
    assert http.post("/v1/actions", json=body(observation(8))).status_code == 200


def test_those_that_wait_are_computed_together_without_one_that_has_gone(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five wait behind a batch that takes long, one of them goes away, and at most three are computed together."""
    engine, sample, computed = station.engine, station.engine.model.sample, []
    go = threading.Event()

    def slow(jobs: Any) -> Any:
        computed.append(list(jobs))
        assert go.wait(60)
        return sample(jobs)

    monkeypatch.setattr(engine.model, "sample", slow)
    monkeypatch.setattr(engine, "limit", 3)
    compute = engine.compute(station.frontend)
    prompts = [station.prompt(observation(60 + i)) for i in range(6)]

    async def fly() -> Any:
        tasks = []
        for i, prompt in enumerate(prompts):
            tasks.append(asyncio.create_task(compute(f"r{i}", prompt, None)))
            while not computed:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(fly())
    assert computed == [["r0"], ["r2", "r3", "r4"], ["r5"]]
    assert isinstance(found.pop(1), asyncio.CancelledError)
    alone = [station.batch([(observation(60 + i), None)])[0][0] for i in (0, 2, 3, 4, 5)]
    np.testing.assert_allclose(found, alone, **CLOSE)


def test_default_profile_health_and_metrics(http: TestClient, station: Station) -> None:
    steering = asked(edit("add", BACKBONE + 1))
    assert http.put("/v1/steering/default", json=steering).status_code == 200
    try:
        found = http.post("/v1/actions", json=body(observation(9))).json()
        assert found["steering"]["interventions"][0]["tokens"] == STEPS * (CHUNK + 1)
        bare = http.post("/v1/actions", json=body(observation(9), steering={"default": False})).json()
        assert bare["actions"] != found["actions"]
    finally:
        assert http.delete("/v1/steering/default").status_code == 204
    assert http.get("/health").status_code == 200
    assert http.get("/healthz").text == "OK\n"
    text = http.get("/metrics/").text
    assert 'steersman_actions_total{outcome="ok",policy="pi0"}' in text
    assert 'steersman_action_seconds_count{policy="pi0"}' in text


def test_keys(folder: Path, tmp_path: Path) -> None:
    app = Station(folder, tmp_path, api_keys=["key"]).app
    http = TestClient(app, raise_server_exceptions=False)
    for path in ("/v1/actions", "/act"):
        assert http.post(path, json={}).status_code == 401
    assert http.get("/v1/steering/model").status_code == 401
    assert http.get("/health").status_code == 200
    answer = http.post("/v1/actions", json=body(observation(1)), headers={"authorization": "Bearer key"})
    assert answer.status_code == 200
    with listening(app) as port, pytest.raises(SteersmanError) as error:
        SocketRobot(f"ws://127.0.0.1:{port}")
    assert error.value.status == 401


def test_the_schema_has_what_its_routes_name(http: TestClient) -> None:
    found = http.get("/openapi.json").json()
    assert "Steering" in found["components"]["schemas"]
    assert {"/v1/actions", "/act", "/v1/steering/model"} <= found["paths"].keys()
    assert "/v1/chat/completions" not in found["paths"]


def test_a_checkpoint_of_another_kind(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a llama, not a pi0"):
        Station(tmp_path, tmp_path / "store")


def test_settings_that_mean_nothing_here(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--steering-norm-baseline is not for this model"):
        Station(folder, tmp_path, settings={"norm_baseline": "usual"})


def test_a_dry_run_counts_the_tokens_of_each_part(http: TestClient) -> None:
    steering = asked(edit("add", 1), edit("add", BACKBONE))
    found = http.post("/v1/steering/resolve", json={"steering": steering, "prompt": [1, 5, 6]}).json()
    told = [(i["prompt_positions"], i["edits_generated"]) for i in found["interventions"]]
    assert told == [([[0, 3]], False), ([], True)]
