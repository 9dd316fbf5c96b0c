"""openpi's WebSocket: the real ``openpi-client`` and ours against it, floods, limits, and robots that go away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from steersman.clients import arrays
from steersman.clients.robot import HttpRobot, SocketRobot
from steersman.clients.sdk import SteersmanError
from steersman.server.engine.intake import FIELD
from steersman.server.policies.openvla import PROMPT
from steersman.server.policies.pictures import Limits
from steersman.server.routes.observations import Defaults, openpi, unpacked
from tests.server.robots import ADD, IDS, KEY, SCENE, Station, listening
from tests.server.routes.test_actions import WANTED

SEEN = {
    "observation/image": SCENE,
    "observation/wrist_image": SCENE,
    "observation/state": np.zeros(8, np.float32),
    "prompt": "go",
    "unnorm_key": KEY,
}


class Harbour:
    """A station on a real port."""

    def __init__(self, station: Station, port: int) -> None:
        self.station = station
        self.url = f"ws://127.0.0.1:{port}"
        self.port = port
        self.opened = ExitStack()

    def raw(self) -> ClientConnection:
        socket = self.opened.enter_context(connect(self.url, compression=None, max_size=None))
        arrays.unpack(socket.recv(5))  # type: ignore[arg-type]
        return socket


Make = Callable[..., Harbour]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as opened:

        def harbour(**settings: Any) -> Harbour:
            station = Station(tmp_path, **settings)
            made = Harbour(station, opened.enter_context(listening(station.app)))
            opened.enter_context(made.opened)
            return made

        yield harbour


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def drain(socket: ClientConnection, answers: list[Any]) -> None:
    while True:
        answers.append(socket.recv(5))


def failed(socket: ClientConnection) -> tuple[str, str | None]:
    """Code and field of the error that comes, after which the connection closes with 1011."""
    text = socket.recv(5)
    assert isinstance(text, str), "an answer came instead of an error"
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(5)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    error = json.loads(text)["error"]
    return error["code"], error["param"]


# -- the protocol -----------------------------------------------------------------------------------


def test_the_real_openpi_client(make: Make) -> None:
    policy = pytest.importorskip(
        "openpi_client.websocket_client_policy", reason="pip install --no-deps openpi-client==0.1.2 msgpack"
    )
    harbour = make()
    client = policy.WebsocketClientPolicy("127.0.0.1", harbour.port)
    metadata = client.get_server_metadata()
    assert (metadata["policy"], metadata["unnorm_keys"]) == ("openvla", {KEY: 7, "other": 2})
    first = client.infer(SEEN)
    np.testing.assert_allclose(first["actions"], [WANTED], atol=1e-15)
    assert set(first["server_timing"]) == {"infer_ms"}
    second = client.infer({**SEEN, "steering": ADD})
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
    assert second["policy_timing"]["infer_ms"] <= second["server_timing"]["infer_ms"]
    assert second["steering"]["interventions"][0]["tokens"] == 3
    with pytest.raises(RuntimeError, match="non_finite"):
        client.infer({**SEEN, "observation/state": np.array([np.nan])})
    assert harbour.station.idle()


def test_the_real_chunk_broker(make: Make) -> None:
    """It slices every array of the answer by step: there must be none but the actions."""
    broker = pytest.importorskip("openpi_client.action_chunk_broker", reason="pip install --no-deps openpi-client")
    policy = pytest.importorskip("openpi_client.websocket_client_policy", reason="pip install --no-deps openpi-client")
    client = broker.ActionChunkBroker(policy.WebsocketClientPolicy("127.0.0.1", make().port), action_horizon=1)
    np.testing.assert_allclose(client.infer(SEEN)["actions"], WANTED, atol=1e-15)


def test_our_own_clients_get_the_same(make: Make) -> None:
    harbour = make()
    with SocketRobot(harbour.url) as robot, HttpRobot(f"http://127.0.0.1:{harbour.port}") as http:
        over_socket = robot.infer({**SEEN, "steering": ADD})
        over_http = http.act({"a": SCENE}, "go", unnorm_key=KEY, steering=ADD, state=np.zeros(8))
        np.testing.assert_array_equal(over_socket.actions, over_http.actions)
        assert over_socket.about["steering"] == over_http.about["steering"]
        assert over_socket.about["token_ids"] == IDS
        assert over_socket.about["ignored"] == ["observation/wrist_image", "state"]
        with pytest.raises(SteersmanError) as refused:
            http.act({"a": SCENE}, "go")
        assert (refused.value.status, refused.value.param) == (400, "unnorm_key")
        with pytest.raises(SteersmanError) as refused:
            robot.infer({**SEEN, "unnorm_key": "libero"})
        assert (refused.value.code, refused.value.param) == ("invalid_steering", "unnorm_key")


@pytest.mark.parametrize(
    ("names", "state"),
    [
        (("observation/exterior_image_1_left", "observation/wrist_image_left"), 8),
        (("base_rgb", "wrist_rgb"), 7),
    ],
)
def test_the_names_of_other_robots(make: Make, names: tuple[str, str], state: int) -> None:
    joints = {
        "observation/exterior_image_1_left": ("observation/joint_position", "observation/gripper_position"),
        "base_rgb": ("joints", "gripper"),
    }[names[0]]
    other = np.zeros_like(SCENE)
    seen = {names[1]: other, names[0]: SCENE, joints[0]: np.ones(state - 1), joints[1]: np.ones(1), "prompt": "go"}
    harbour = make()
    with SocketRobot(harbour.url, unnorm_key=KEY) as robot:
        assert robot.infer(seen).about["ignored"] == [names[1], "state"]
    np.testing.assert_array_equal(np.asarray(harbour.station.engine.prompts[0]["multi_modal_data"]["image"][0]), SCENE)


@pytest.mark.parametrize("gripper", [np.array([0.5]), np.array(0.5), np.float32(0.5), 0.5, [0.5]])
def test_the_state_is_joined(gripper: Any) -> None:
    seen = {"joints": np.arange(3), "gripper": gripper, "prompt": "go", "image": SCENE}
    found = openpi(unpacked(arrays.pack(seen), ""), Limits(1 << 20, 1 << 20), 1, Defaults())
    np.testing.assert_array_equal(found.observation.state, [0, 1, 2, 0.5])
    assert found.ignored == ()


def test_healthz(make: Make) -> None:
    answer = make().station.http.get("/healthz")
    assert (answer.status_code, answer.text) == (200, "OK\n")


# -- steering ---------------------------------------------------------------------------------------


def test_steering_of_the_query_of_a_session_and_of_one_observation(make: Make) -> None:
    harbour = make()
    params = harbour.station.engine.params
    plans = []
    with SocketRobot(harbour.url, steering={"profile": "calm"}) as robot:
        for change, own in ((None, {}), (None, {"steering": ADD}), ({"steering": ADD}, {}), ({"steering": None}, {})):
            if change is not None:
                assert robot.session(**change)["steering"] == change["steering"]
            answer = robot.infer({**SEEN, **own})
            assert bool(params[-1].extra_args and FIELD in params[-1].extra_args) == ("steering" in answer.about)
            plans.append(answer.about.get("steering", {}).get("plan"))
        assert robot.session(unnorm_key="other") == {"steering": None, "unnorm_key": "other"}
        assert robot.infer({k: v for k, v in SEEN.items() if k != "unnorm_key"}).actions.shape == (1, 2)
    query, one, session, none = plans
    assert one == session != query
    assert query is not None
    assert none is None


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("steering=%7B", 400, "steering"),
        ("profile=gone", 404, "steering.profile"),
        ("temperature=1", 400, "temperature"),
        ("unnorm_key=gone", 400, "unnorm_key"),
        ("steering=%7B%22stream_probes%22:true%7D", 400, "steering.stream_probes"),
    ],
)
def test_a_robot_with_wrong_steering_does_not_connect(make: Make, query: str, status: int, param: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{make().url}/?{query}")
    response = refused.value.response
    assert response.status_code == status
    assert json.loads(response.body)["error"]["param"] == param


def test_the_api_key(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    harbour = make()
    for key in (None, "wrong"):
        with pytest.raises(SteersmanError) as refused:
            SocketRobot(harbour.url, api_key=key)
        assert (refused.value.status, refused.value.code) == (401, "unauthorized")
    with SocketRobot(harbour.url, api_key="key") as robot:
        assert robot.metadata["policy"] == "openvla"


# -- what goes wrong --------------------------------------------------------------------------------

BAD = [
    (b"\xc1", "invalid_steering", "observation"),
    ("text", "invalid_steering", "observation"),
    (arrays.pack([1]), "invalid_steering", None),
    (arrays.pack({**SEEN, "observation/image": SCENE.astype(np.float32)}), "invalid_steering", "observation/image"),
    (arrays.pack({**SEEN, "observation/image": SCENE[0]}), "invalid_steering", "observation/image"),
    (arrays.pack({"prompt": "go"}), "invalid_steering", "observation/image"),
    (arrays.pack({"observation/image": SCENE}), "invalid_steering", "prompt"),
    (arrays.pack({**SEEN, "observation/state": np.array([np.nan])}), "non_finite", "observation/state"),
    (arrays.pack({**SEEN, "observation/state": np.array([True])}), "invalid_steering", "observation/state"),
    (arrays.pack({**SEEN, "unnorm_key": "libero"}), "invalid_steering", "unnorm_key"),
    (arrays.pack({**SEEN, "steering": {"interventions": SCENE}}), "invalid_steering", "steering"),
    (arrays.pack({**SEEN, "steering": {"profile": "gone"}}), "asset_not_found", "steering.profile"),
    (arrays.pack({**SEEN, "session": {}}), "invalid_steering", "session"),
    (arrays.pack({"session": {"profile": "calm"}}), "unknown_field", "session.profile"),
    (arrays.pack({"session": {"unnorm_key": 7}}), "invalid_steering", "session.unnorm_key"),
    (arrays.pack({"session": {"unnorm_key": "gone"}}), "invalid_steering", "session.unnorm_key"),
    (arrays.pack({"session": {"steering": {"profile": "gone"}}}), "asset_not_found", "session.steering.profile"),
]


def test_errors_are_text_then_1011_and_others_go_on(make: Make) -> None:
    harbour = make()
    with SocketRobot(harbour.url) as neighbour:
        before = neighbour.infer(SEEN).actions
        for frame, code, param in BAD:
            socket = harbour.raw()
            socket.send(frame)
            assert failed(socket) == (code, param), frame[:80]
            np.testing.assert_array_equal(neighbour.infer(SEEN).actions, before)
    assert harbour.station.idle()
    errors = harbour.station.app.state.steersman.metrics.store_errors
    assert errors.labels("asset_not_found")._value.get() == sum(code == "asset_not_found" for _, code, _ in BAD)


def test_errors_have_a_size(make: Make) -> None:
    about = {b"__ndarray__": True, b"data": b"", b"dtype": "x" * 100_000, b"shape": [0]}
    socket = make().raw()
    socket.send(arrays.pack({**SEEN, "observation/image": about}))
    assert len(socket.recv(5)) < 1000


def test_an_engine_that_fails_tells_no_internals(make: Make) -> None:
    harbour = make()
    harbour.station.engine.fail = RuntimeError("secret")
    socket = harbour.raw()
    socket.send(arrays.pack(SEEN))
    text = socket.recv(5)
    assert "secret" not in str(text)
    assert json.loads(text)["error"]["type"] == "internal_error"


def test_a_robot_that_vanishes_stops_its_own_action_only(make: Make) -> None:
    harbour = make()
    engine = harbour.station.engine
    engine.hanging = True
    socket = harbour.raw()
    socket.send(arrays.pack({**SEEN, "steering": ADD}))
    assert engine.started.wait(10)
    socket.socket.close()  # without a closing handshake
    assert engine.stopped.wait(10)
    until(lambda: harbour.station.outcome("cancelled") == 1)
    until(harbour.station.idle)
    engine.hanging = False
    with SocketRobot(harbour.url) as robot:
        np.testing.assert_allclose(robot.infer(SEEN).actions, [WANTED], atol=1e-15)


def test_a_flood_is_ended_and_does_not_reach_the_engine(make: Make) -> None:
    harbour = make(max_robot_rate=5)
    socket = harbour.raw()
    frame = arrays.pack(SEEN)
    with SocketRobot(harbour.url) as neighbour:
        try:
            for _ in range(300):
                socket.send(frame)
        except ConnectionClosed:
            pass
        answers: list[Any] = []
        with pytest.raises(ConnectionClosed):
            drain(socket, answers)
        assert sum(isinstance(a, bytes) for a in answers) < 20
        assert json.loads(answers[-1])["error"]["code"] == "rate_limited"
        assert len(harbour.station.engine.prompts) < 20
        np.testing.assert_allclose(neighbour.infer(SEEN).actions, [WANTED], atol=1e-15)


def test_so_many_robots_and_no_more(make: Make) -> None:
    harbour = make(max_robots=2)
    first, second = SocketRobot(harbour.url), SocketRobot(harbour.url)
    with pytest.raises(SteersmanError) as refused:
        SocketRobot(harbour.url)
    assert (refused.value.status, refused.value.code) == (503, "too_many_sessions")
    first.close()

    def fits() -> bool:
        try:
            SocketRobot(harbour.url).close()
        except SteersmanError:
            return False
        return True

    until(fits)
    assert second.infer(SEEN).actions.shape == (1, 7)
    second.close()


def test_sixteen_robots_get_their_own_answers(make: Make) -> None:
    harbour = make()
    alone = len(harbour.station.app.state.steersman_robots.policy.tokenizer.encode(PROMPT.format(instruction=""))) + 1
    harbour.station.engine.ids = lambda prompt, n: [31744 + len(prompt["prompt_token_ids"]) - alone] * n

    def fly(i: int) -> list[int]:
        with SocketRobot(harbour.url) as robot:
            seen = {**SEEN, "prompt": "x" * (i + 1), **({"steering": ADD} if i % 2 else {})}
            answer = robot.infer(seen)
            assert ("steering" in answer.about) == bool(i % 2)
            return list(answer.about["token_ids"])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(fly, range(16))) == [[31744 + i + 1] * 7 for i in range(16)]
    assert harbour.station.outcome("ok") == 16
