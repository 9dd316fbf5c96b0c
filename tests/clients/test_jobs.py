from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from steersman.clients.jobs import JobFailed, follow, read_examples, read_pairs
from steersman.clients.sdk import Steersman, SteersmanError


class Server:
    """Answers a submission, and then each question with the next state."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self.states: Iterator[dict[str, Any]] = iter(states)
        self.asked: list[tuple[str, str]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path))
        if request.method == "DELETE":
            return httpx.Response(200, json={"state": "cancelled"})
        state = {"id": "job-1", "error": None, "result": None, **next(self.states)}
        return httpx.Response(202 if request.method == "POST" else 200, json=state)

    def follow(self, tell: Any = lambda job: None) -> dict[str, Any]:
        with Steersman("http://server", transport=httpx.MockTransport(self)) as client:
            return follow(client, {"kind": "extract"}, tell, every=0)


def test_a_job_is_followed_to_its_result() -> None:
    server = Server({"state": "queued"}, {"state": "running"}, {"state": "done", "result": {"assets": ["a@1"]}})
    seen: list[str] = []
    assert server.follow(lambda job: seen.append(job["state"])) == {"assets": ["a@1"]}
    assert seen == ["queued", "running", "done"]
    assert server.asked == [("POST", "/v1/steering/jobs"), *[("GET", "/v1/steering/jobs/job-1")] * 2]


def test_what_goes_wrong_is_said() -> None:
    error = {"message": "no such role", "param": "pairs[3].positive", "code": "invalid_steering"}
    with pytest.raises(JobFailed, match=r"no such role \(pairs\[3\]\.positive\)"):
        Server({"state": "failed", "error": error}).follow()
    with pytest.raises(JobFailed, match="job-1 was cancelled"):
        Server({"state": "running"}, {"state": "cancelled"}).follow()


def test_an_interruption_cancels_the_job() -> None:
    server = Server({"state": "running"})

    def stop(job: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.follow(stop)
    assert server.asked[-1] == ("DELETE", "/v1/steering/jobs/job-1")


def test_a_refusal_cancels_nothing() -> None:
    asked: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        return httpx.Response(503, json={"error": {"message": "full", "code": "too_many_jobs"}})

    with Steersman("http://server", transport=httpx.MockTransport(refuse)) as client, pytest.raises(SteersmanError):
        follow(client, {"kind": "extract"})
    assert asked == ["POST"]


def test_pairs_from_either_form(tmp_path: Path) -> None:
    pairs = [{"prompt": "Why?", "positive": "a", "negative": "b"}, {"positive": "c", "negative": "d"}]
    lines, whole = tmp_path / "pairs.jsonl", tmp_path / "pairs.json"
    lines.write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    whole.write_text(json.dumps({"licence": "x", "pairs": pairs}))
    for file in (lines, whole):
        assert read_pairs(file, "text") == pairs
        assert read_pairs(file, "chat")[0]["prompt"] == [{"role": "user", "content": "Why?"}]
        assert "prompt" not in read_pairs(file, "none")[0]


def test_examples_from_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('"one\\ntwo"\n[{"role": "user", "content": "x"}]\n')
    (tmp_path / "a.json").write_text('{"prompts": ["one"]}')
    assert read_examples(tmp_path / "a.txt", "prompts") == ["one", "two"]
    assert read_examples(tmp_path / "a.jsonl", "prompts") == ["one\ntwo", [{"role": "user", "content": "x"}]]
    assert read_examples(tmp_path / "a.json", "prompts") == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"positive": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", "[1]", "a pair must be an object"),
        ("a.json", "{}", "with the list 'pairs'"),
        ("a.json", '{"pairs": 3}', "'pairs' must be a list"),
        ("a.jsonl", "\n", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / name)
