"""``steersman eval``: what is asked, printed and written, against a server that is a function."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from steersman.clients.sdk import Steersman
from steersman.server import cli
from steersman.server.commands import remote

STEERING = {"interventions": [{"op": "inject", "recipe": "iri"}]}


class Server:
    """Says yes to every question, and no to that about a cat where it is steered."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuses = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        if self.refuses:
            error = {"message": "no such recipe", "code": "asset_unknown", "param": "steering.interventions[0].recipe"}
            return httpx.Response(404, json={"error": error})
        body = json.loads(request.content)
        self.asked.append(body)
        image, text = body["messages"][0]["content"]
        if "Describe" in text["text"]:
            said = "a dog and a cat"
        else:
            steered = bool(body.get("steering", {}).get("interventions"))
            said = "No" if steered and "cat" in text["text"] else "Yes"
        assert base64.b64decode(image["image_url"]["url"].partition("base64,")[2]) == b"an image"
        return httpx.Response(200, json={"choices": [{"message": {"content": said}}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(remote, "client", lambda args: Steersman(args.server, transport=httpx.MockTransport(made)))
    return made


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"an image")
    lines = [
        {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"},
    ]
    (tmp_path / "pope.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "existence.txt").write_text("a.png\tIs there a dog?\tYes\na.png\tIs there a cat?\tNo\n")
    (tmp_path / "chair.jsonl").write_text('{"image": "a.png", "objects": ["dog"]}')
    (tmp_path / "synonyms.txt").write_text("dog\ncat\n")
    (tmp_path / "iri.json").write_text(json.dumps(STEERING))
    return tmp_path


def run(files: Path, benchmark: str, questions: str, *more: str) -> dict[str, Any]:
    out = files / "made/out.json"
    given = ["--questions", str(files / questions), "--images", str(files), "--out", str(out), *more]
    assert cli.main(["eval", benchmark, *given]) == 0
    (found,) = json.loads(out.read_text())["results"]
    return dict(found)


def test_pope_without_steering_and_with_it(server: Server, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--steering", f"@{files / 'iri.json'}", "--suffix", "One word.", "--max-tokens", "3"]
    found = run(files, "pope", "pope.jsonl", *more)
    assert found["summary"]["unsteered"]["accuracy"] == 0.5
    assert found["summary"]["steered"]["accuracy"] == 1.0
    assert found["summary"]["change"]["steered"]["accuracy"] == {"difference": 0.5, "interval_95": [0.5, 0.5]}
    assert [(a["unsteered"], a["steered"]) for a in found["answers"]] == [("Yes", "Yes"), ("Yes", "No")]
    assert (found["steering"], found["model"], found["suffix"]) == (STEERING, "served", "One word.")
    row = next(line for line in capsys.readouterr().out.splitlines() if "accuracy" in line)
    assert row.strip("│ ").split()[2::2][:3] == ["0.5000", "1.0000", "+0.5000"]
    assert [(b["max_tokens"], b["temperature"], b["model"]) for b in server.asked] == [(3, 0.0, "served")] * 4
    assert {b["messages"][0]["content"][1]["text"].endswith("image? One word.") for b in server.asked} == {True}
    assert sorted(json.dumps(b["steering"]) for b in server.asked) == sorted(
        [json.dumps(STEERING)] * 2 + ['{"default": false}'] * 2
    )


def test_several_files_are_a_table_each(server: Server, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "other.jsonl").write_text((files / "pope.jsonl").read_text().splitlines()[0])
    given = ["--questions", str(files / "pope.jsonl"), str(files / "other.jsonl"), "--images", str(files)]
    assert cli.main(["eval", "pope", *given, "--out", str(files / "out.json")]) == 0
    found = json.loads((files / "out.json").read_text())["results"]
    assert [(r["questions"], r["summary"]["unsteered"]["accuracy"]) for r in found] == [
        ("pope.jsonl", 0.5),
        ("other.jsonl", 1.0),
    ]
    printed = capsys.readouterr().out
    assert printed.index("pope.jsonl") < printed.index("other.jsonl")


def test_mme_alone(server: Server, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(files, "mme", "existence.txt")
    assert found["summary"] == {"unsteered": {"existence": 50.0, "total": 50.0}, "change": {}}
    assert "change" not in capsys.readouterr().out
    assert not any("steering" in body for body in server.asked)  # the server's default is what is measured


def test_chair(server: Server, files: Path) -> None:
    more = ["--prompt", "Describe it.", "--synonyms", str(files / "synonyms.txt")]
    found = run(files, "chair", "chair.jsonl", *more)
    assert found["summary"]["unsteered"] == {"chair_i": 0.5, "chair_s": 1.0, "recall": 1.0, "mentions": 2.0}
    assert found["answers"][0]["objects"] == ["dog"]


def test_a_limit(server: Server, files: Path) -> None:
    assert len(run(files, "pope", "pope.jsonl", "--limit", "1")["answers"]) == 1


def test_a_missing_image_ends_it_before_anything_is_asked(server: Server, files: Path) -> None:
    (files / "a.png").unlink()
    assert cli.main(["eval", "pope", "--questions", str(files / "pope.jsonl"), "--images", str(files)]) == 1
    assert not server.asked


@pytest.mark.parametrize("what", ["refused", "bad file"])
def test_what_goes_wrong_is_one_line(server: Server, files: Path, what: str) -> None:
    server.refuses = what == "refused"
    if what == "bad file":
        (files / "pope.jsonl").write_text("nonsense")
    said = "no such recipe .*recipe" if server.refuses else "line 1: must be"
    with pytest.raises(SystemExit, match=f"^steersman eval pope: .*{said}"):
        run(files, "pope", "pope.jsonl")
