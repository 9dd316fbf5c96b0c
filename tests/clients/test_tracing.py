"""What `steersman trace` does on its own side: questions, going on from what is finished, tables, pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from steersman.clients.sdk import Steersman
from steersman.clients.tracing import Finished, ablated, jobs_of, key_of, read_questions, run, to_csv, to_json, traced
from steersman.clients.tracing_picture import NEURONS, ablation_png, page, recovery_png
from steersman.steering.tracing import Falls, Table

PNG = b"\x89PNG"


class Jobs:
    """A server whose jobs are done at once, unless they are to fail."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.fails_at = -1
        self.fingerprint = "f"

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/steering/model":
            return httpx.Response(200, json={"model": "m", "fingerprint": self.fingerprint})
        assert (request.method, request.url.path) == ("POST", "/v1/steering/jobs")
        asked = json.loads(request.content)
        if len(self.asked) == self.fails_at:
            return httpx.Response(503, json={"error": {"message": "full"}})
        self.asked.append(asked)
        counts = {"done": 1, "total": 1}
        done = {"id": "j", "state": "done", "error": None, "counts": counts, "result": {"is": asked["questions"]}}
        return httpx.Response(202, json=done)


@pytest.fixture
def far() -> Jobs:
    return Jobs()


def results(far: Jobs, file: Path, questions: list[Mapping[str, Any]], **settings: Any) -> list[Any]:
    with Steersman("http://server", transport=httpx.MockTransport(far)) as server:
        return list(run(server, jobs_of({"kind": "trace", **settings}, questions), Finished(file)))


QUESTIONS: list[Mapping[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]


def test_it_goes_on_where_it_was_cut_off(far: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "finished.jsonl"
    far.fails_at = 2
    with pytest.raises(Exception, match="full"):
        results(far, file, QUESTIONS)
    with file.open("a") as out:
        out.write('{"key": "half')  # killed while it wrote
    far.fails_at = -1
    found = results(far, file, QUESTIONS)
    assert found == [{"is": [question]} for question in QUESTIONS]
    assert [job["questions"] for job in far.asked] == [[question] for question in QUESTIONS]
    assert results(far, file, QUESTIONS) == found
    assert len(far.asked) == 3
    assert len(Finished(file)) == 3


def test_other_settings_and_other_weights_are_asked_anew(far: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "finished.jsonl"
    results(far, file, QUESTIONS[:1])
    results(far, file, QUESTIONS[:1], seed=1)
    far.fingerprint = "g"
    results(far, file, QUESTIONS[:1])
    assert len(far.asked) == 3
    assert key_of({"a": 1, "b": 2}, "m") == key_of({"b": 2, "a": 1}, "m") != key_of({"a": 1, "b": 2}, "n")


def test_means_are_over_all_questions_and_so_one_job() -> None:
    assert jobs_of({"value": "mean"}, QUESTIONS) == [{"value": "mean", "questions": QUESTIONS}]
    assert len(jobs_of({"value": "zero"}, QUESTIONS)) == 3


def test_questions_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"picture")
    file = tmp_path / "questions.jsonl"
    file.write_text('{"text": "is it?", "image": "one.png", "answer": "Yes"}\n\n{"prompt": "a", "answer": " b"}\n')
    first, second = read_questions(file, tmp_path)
    assert first == {"text": "is it?", "image": base64.b64encode(b"picture").decode(), "answer": "Yes"}
    assert second == {"prompt": "a", "answer": " b"}
    with pytest.raises(ValueError, match="question 0 has an image; say where"):
        read_questions(file, None)
    file.write_text('["a"]\n')
    with pytest.raises(ValueError, match="must be an object"):
        read_questions(file, None)


TRACED = {
    "clean": 0.8,
    "corrupted": 0.4,
    "patched": {"attn": {"last": [0.4, 0.6, None]}, "mlp": {"last": [0.8, 0.4, 0.4], "object_text": [0.5, 0.4, 0.4]}},
}


def test_tables_as_csv_and_json() -> None:
    table = Table.of(traced([{"questions": [TRACED, {**TRACED, "corrupted": 0.8}]}]))
    assert to_csv(table).splitlines() == [
        "component,group,layer,recovery_rate,questions",
        "attn,last,0,0,1",
        "attn,last,1,0.5,1",
        "mlp,object_text,0,0.25,1",
        "mlp,object_text,1,0,1",
        "mlp,object_text,2,0,1",
        "mlp,last,0,1,1",
        "mlp,last,1,0,1",
        "mlp,last,2,0,1",
    ]
    told = to_json(table)
    assert (told["questions"], told["used"]) == (2, 1)
    assert told["recovery_rates"]["attn"]["last"] == [0.0, pytest.approx(0.5), None]
    json.dumps(told, allow_nan=False)


def test_what_jobs_tell_of_ablations() -> None:
    told = {"clean": 0.5, "first": 7, "answer": 7, "without": [0.1, 0.5], "first_without": [3, 7], "set": "a"}
    (found,) = ablated([{"questions": [told]}])
    assert (found.right, list(found.stays), found.set) == (True, [False, True], "a")


def test_pictures_and_the_page() -> None:
    table = Table.of(traced([{"questions": [TRACED]}]))
    picture = recovery_png(table, "capitals")
    assert picture[:4] == PNG
    text = page("a <b>", "told", picture, {"attn": [("last", [0.5, float("nan")])]})
    assert "a &lt;b&gt;" in text
    assert "<td>0.5</td><td></td>" in text
    assert base64.b64encode(picture).decode() in text


@pytest.mark.parametrize(
    "units",
    [
        [[layer, part] for part in ("attn", "mlp") for layer in range(3)],
        [[layer, head] for layer in range(3) for head in range(2)],
        [[layer, 17 * layer + i] for layer in range(3) for i in range(NEURONS)],
    ],
)
def test_pictures_of_what_was_taken_out(units: list[list[Any]]) -> None:
    values = np.linspace(-0.1, 1, len(units))
    falls = {"recall": Falls(values, values, 4, 3), "context": Falls(values * np.nan, values, 4, 0)}
    assert ablation_png(units, falls, "title")[:4] == PNG
