"""`steersman trace` up to what it asks a server for, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from steersman.clients.sdk import Steersman
from steersman.server import cli
from steersman.server.commands import remote
from steersman.steering.assets import parse_metadata

MODEL = {"model": "org/tiny", "fingerprint": None, "n_layers": 4, "d_model": 8}


class Far:
    """A server whose jobs are done at once."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.added: list[Any] = []
        self.corrupted = 0.2
        self.first = 5

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/steering/model":
            return httpx.Response(200, json=MODEL)
        asked = json.loads(request.content)
        if request.url.path == "/v1/steering/assets":
            self.added.append(asked)
            return httpx.Response(201, json={"ref": "iri@1"})
        self.jobs.append(asked)
        done = {"id": "j", "state": "done", "error": None, "counts": {"done": 1, "total": 1}}
        return httpx.Response(202, json={**done, "result": self.result(asked)})

    def result(self, asked: Any) -> Any:
        if asked["kind"] == "trace":
            rates = {"attn": [0.2, 0.6, 0.4, 0.2], "mlp": [0.7, 0.2, 0.2, 0.3], "hidden": [0.8] * 4}
            patched = {part: {"last": row} for part, row in rates.items()}
            return {"questions": [{"clean": 0.8, "corrupted": self.corrupted, "patched": patched}]}
        about = {"answer": 5, "first": self.first, "clean": 0.5, "without": [0.5, 0.1], "first_without": [5, 1]}
        sets = [question.get("set", "") for question in asked["questions"]]
        return {"units": [[0, 0], [0, 1]], "questions": [{**about, "set": name} for name in sets]}


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Far:
    found = Far()
    monkeypatch.setattr(remote, "client", lambda args: Steersman(args.server, transport=httpx.MockTransport(found)))
    return found


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    lines = ({"prompt": f"The capital of {c} is", "object": c, "answer": " x", "set": c} for c in ("Peru", "Chad"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["trace", "--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]


def test_it_writes_tables_pictures_and_a_recipe_that_the_store_takes(
    far: Far, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--window", "3", "--sigma", "2", "--seed", "1", "--components", "attn", "mlp", "--layers", "0-3"]
    made = ["--store", "--recipe", "mine", "--lambda-a", "0.2", "--lambda-m", "0.1", "--sources", "1", "--targets", "3"]
    assert cli.main([*asked, *options, *made]) == 0
    assert [len(job["questions"]) for job in far.jobs] == [1, 1]
    job = far.jobs[0]
    assert (job["kind"], job["window"], job["sigma"], job["seed"], job["layers"]) == ("trace", 3, 2.0, 1, "0-3")
    out = tmp_path / "out"
    told = json.loads((out / "trace.json").read_text())
    assert (told["used"], told["settings"]["components"]) == (2, ["attn", "mlp"])
    assert told["recovery_rates"]["attn"]["last"] == pytest.approx([0.0, 2 / 3, 1 / 3, 0.0])
    assert (out / "rates.csv").read_text().startswith("component,group,layer")
    assert (out / "trace.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png" in (out / "trace.html").read_text()
    (added,) = far.added
    assert added == json.loads((out / "recipe.json").read_text())
    meta: Any = parse_metadata(added)
    assert (meta.name, meta.sources.attn, meta.targets.attn, meta.lambda_a) == ("mine", (1,), (0, 1, 2), 0.2)
    assert meta.sources.mlp == (0,)
    assert capsys.readouterr().out == "iri@1\n"
    assert cli.main([*asked, *options]) == 0
    assert len(far.jobs) == 2, "they were finished"


def test_noise_that_changes_nothing(far: Far, asked: list[str], tmp_path: Path) -> None:
    far.corrupted = 0.795
    with pytest.raises(SystemExit, match="no question's answer depends on what is noised"):
        cli.main(asked)
    assert json.loads((tmp_path / "out/trace.json").read_text())["used"] == 0
    assert not (tmp_path / "out/recipe.json").exists()
    assert cli.main([*asked, "--least", "0.001"]) == 0


def test_what_is_taken_out(far: Far, asked: list[str], tmp_path: Path) -> None:
    assert cli.main([*asked, "--kind", "heads", "--value", "mean", "--layers", "0"]) == 0
    (job,) = far.jobs
    assert (job["kind"], job["units"], job["value"], job["layers"]) == ("ablate", "heads", "mean", [0])
    told = json.loads((tmp_path / "out/ablation.json").read_text())
    assert told["units"] == [[0, 0], [0, 1]]
    assert told["sets"]["Peru"] == {
        "questions": 1,
        "right": 1,
        "probability_lost": [0.0, pytest.approx(0.8)],
        "answers_lost": [0.0, 1.0],
    }
    assert (tmp_path / "out/ablation.png").read_bytes()[:4] == b"\x89PNG"
    far.first = 1
    with pytest.raises(SystemExit, match="answers no question rightly"):
        cli.main([*asked, "--kind", "heads", "--layers", "1"])


def test_neurons_of_a_file(far: Far, asked: list[str], tmp_path: Path) -> None:
    file = tmp_path / "neurons.json"
    file.write_text(json.dumps({"neurons": [[0, 0], [0, 1]]}))
    assert cli.main([*asked, "--kind", "neurons", "--neurons", str(file)]) == 0
    assert far.jobs[0]["neurons"] == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kind", "neurons"], "--kind neurons and --neurons go together"),
        (["--kind", "heads", "--store"], "--store goes with --kind patch"),
        (["--layers", "x"], "--layers"),
    ],
)
def test_options_that_do_not_go_together(far: Far, asked: list[str], options: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match=f"steersman trace: {says}"):
        cli.main([*asked, *options])
    assert not far.jobs
