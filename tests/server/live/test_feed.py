"""Frames are the numbers that the workers said, the same for all viewers, and nobody holds anybody up."""

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from steersman.server.live.feed import BEHIND, HISTORY, MAX_PROBES, MAX_VIEWERS, Feed, Viewer
from steersman.server.monitoring import LayerMetrics, Monitoring
from steersman.steering.errors import TooManySessions
from tests.server.fakes import frontend
from tests.server.live.watched import answer, feed


def decoded(event: bytes) -> tuple[str, Any]:
    head, _, rest = event.partition(b"\ndata: ")
    assert rest.endswith(b"\n\n")
    assert rest.count(b"\n") == 2
    return head.removeprefix(b"event: ").decode(), json.loads(rest)


def waiting(viewer: Viewer) -> list[tuple[str, Any]]:
    return [decoded(viewer.waiting.get_nowait()) for _ in range(viewer.waiting.qsize())]


def published(live: Feed, *answers: dict[str, Any]) -> dict[str, Any]:
    for told in answers:
        live.take(told)
    live.publish()
    with live.viewing() as viewer:
        name, hello = decoded(viewer.hello)
    assert name == "hello"
    frame: dict[str, Any] = hello["frames"][-1]
    return frame


def test_a_frame_adds_workers_and_groups_up() -> None:
    first = answer(
        norms=[[0, 0, 3, 6.0, 2.5], [0, 3, 1, 4.0, 4.0], [1, 0, 4, 0.0, None]],
        edits=[["calm", 0, 2, 0.4], ["calm", 1, 2, 0.1], ["other", -1, 5, 1.0]],
        probes=[["v", 0, 4, -8.0]],
    )
    second = answer(
        passes=2,
        norms=[[0, 1, 2, 5.0, 3.0], [2, 1, 2, 2.00004, 1.5]],
        edits=[["loud", 0, 2, 1.2]],
        probes=[["v", 0, 4, 2.0], ["v", 1, 1, 7.0]],
    )
    live = feed()
    frame = published(live, first, second)
    assert frame.pop("time") > 1.7e9
    assert frame == {
        "passes": 3,
        "tokens": [6, 3],  # of layer 0; layer 1 belongs to another stage of the pipeline
        "requests": [None, {}],
        "norms": [[0, 2.5, 4.0], [2, 1.0, 1.5]],
        "not_finite": [1],
        "edits": [[0, 0.4], [1, 0.05]],
        "assets": [["calm", 0.125, 4], ["loud", 0.6, 2], ["other", 0.2, 5]],
        "probes": [["v", 0, -0.75, 8], ["v", 1, 7.0, 1]],
        "left_out": 0,
    }
    nothing = published(live)
    assert (nothing["passes"], nothing["tokens"], nothing["norms"], nothing["probes"]) == (0, [0, 0], [], [])


def test_requests_are_those_since_the_last_frame() -> None:
    registry = CollectorRegistry()
    steered = Counter("steersman_requests", "", ["outcome"], registry=registry)
    steered.labels("steered").inc(10)
    live = feed(registry)
    steered.labels("steered").inc(2)
    steered.labels("refused").inc()
    assert published(live)["requests"] == [None, {"steered": 2, "refused": 1}]
    ended = Counter("vllm:request_success", "", ["engine", "finished_reason"], registry=registry)
    ended.labels("0", "stop").inc(3)
    ended.labels("1", "length").inc(4)
    assert published(live)["requests"] == [7, {"steered": 0, "refused": 0}]
    assert published(live)["requests"] == [0, {"steered": 0, "refused": 0}]


def test_curves_are_capped_and_those_that_came_first_stay() -> None:
    live = feed()
    late = [["a", i, 1, 1.0] for i in range(5)]
    early = [["b", i, 1, 1.0] for i in range(MAX_PROBES)]
    assert published(live, answer(probes=early))["left_out"] == 0
    frame = published(live, answer(probes=[*late, *early]))
    assert {p[0] for p in frame["probes"]} == {"b"}
    assert (len(frame["probes"]), frame["left_out"]) == (MAX_PROBES, 5)
    for _ in range(HISTORY):
        live.publish()
    assert [p[0] for p in published(live, answer(probes=late))["probes"]] == ["a"] * 5


def test_all_viewers_share_one_greeting_and_the_same_events() -> None:
    live = feed()
    for n in range(HISTORY + 3):
        live.take(answer(passes=n))
        live.publish()
    with live.viewing() as one, live.viewing() as two:
        assert one.hello is two.hello
        _, hello = decoded(one.hello)
        assert [f["passes"] for f in hello["frames"]] == list(range(3, HISTORY + 3))
        assert (hello["model"], hello["interval"], hello["history"], hello["monitor"]) == ("m", 2.0, HISTORY, "on")
        live.take(answer(passes=7))
        live.publish()
        assert one.waiting.get_nowait() is two.waiting.get_nowait()
        with live.viewing() as three:
            assert decoded(three.hello)[1]["frames"][-1]["passes"] == 7
            assert three.waiting.empty()
    assert not live.viewers


def test_a_viewer_that_falls_behind_is_dropped_and_no_other() -> None:
    live = feed()
    with live.viewing() as slow, live.viewing() as quick:
        got = []
        for _ in range(BEHIND + 1):
            live.publish()
            got += waiting(quick)
        assert slow.dropped
        assert live.viewers == {quick}
        assert len(got) == BEHIND + 1


def test_no_more_viewers_than_may_be() -> None:
    live = feed()
    with ExitStack() as stack:
        for _ in range(MAX_VIEWERS):
            stack.enter_context(live.viewing())
        with pytest.raises(TooManySessions, match=f"{MAX_VIEWERS} pages"), live.viewing():
            pass
    with live.viewing():
        pass


def test_lag_is_told_when_it_is_long() -> None:
    live = feed(interval=2.0)
    with live.viewing() as viewer:
        for lag in (0.5, 8.0, 8.2):
            live.late(lag)
        assert waiting(viewer) == [("lag", {"lag": 8.2})]


def test_frames_come_from_the_one_reading_however_many_watch(tmp_path: Path) -> None:
    live, calls = feed(), 0

    async def rpc(*_: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the engine is dead")
        return [answer(number=1 if calls < 3 else 2, passes=5), None]  # the second one comes again

    async def run() -> list[list[tuple[str, Any]]]:
        made = frontend(tmp_path)
        made._rpc = rpc
        monitoring = Monitoring(made, LayerMetrics(CollectorRegistry()), 0.1, live, busy=lambda: True)
        with ExitStack() as stack:
            viewers = [stack.enter_context(live.viewing()) for _ in range(5)]
            task = asyncio.create_task(monitoring.watch())
            while calls < 4 or viewers[0].waiting.qsize() < 3:
                await asyncio.sleep(0.01)
            task.cancel()
            return [waiting(v)[:3] for v in viewers]

    seen = asyncio.run(asyncio.wait_for(run(), 10))
    assert calls <= 5
    assert all(events == seen[0] for events in seen)
    assert [(name, told["passes"]) for name, told in seen[0]] == [("frame", 5), ("frame", 0), ("frame", 5)]
