"""``steersman extract`` and ``steersman calibrate`` up to what they ask a server for, and what they print of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from steersman.clients.sdk import Steersman
from steersman.server import cli
from steersman.server.commands import remote
from tests.clients.served import Served
from tests.clients.test_selection import OTHERS, SHOWING
from tests.clients.test_selection import Served as Tried

JOBS = "/v1/steering/jobs"


class Jobs:
    """A server whose job is done at once."""

    def __init__(self, **done: Any) -> None:
        self.done = {"id": "job-1", "state": "done", "error": None, "counts": {"done": 2, "total": 2}, **done}
        self.asked: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", JOBS)
        self.asked.append(json.loads(request.content))
        return httpx.Response(202, json=self.done)


RESULT = {
    "assets": ["calm@1"], "model": "m", "method": "pca", "site": "mlp_out", "token": -1, "layers": [3, 7],
    "examples": {"positive": 10, "negative": 12},
    "held_out": {
        "positive": 2, "negative": 2, "accuracy": [0.5, 0.75], "auc": [0.5, 0.75], "d_prime": [0.1, None]
    },
    "norms": {"calm@1": [1.5, 2.5]}, "read_norms": [30.0, 60.0],
}  # fmt: skip


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    found = Jobs(result=RESULT)
    monkeypatch.setattr(remote, "client", lambda args: Steersman(args.server, transport=httpx.MockTransport(found)))
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "positive": "a", "negative": "b"}))
    return str(file)


def test_extract_asks_for_what_the_options_say(far: Jobs, pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "pca", "--layers", "3,7", "--token", "-1", "--length", "unit", "--site", "mlp_out"]
    assert cli.main(["extract", "--name", "calm", "--pairs", pairs, "--prompt-as", "none", *options]) == 0
    assert far.asked == [
        {
            "kind": "extract",
            "name": "calm",
            "method": "pca",
            "layers": [3, 7],
            "token": -1,
            "length": "unit",
            "site": "mlp_out",
            "description": "",
            "licence": "",
            "pairs": [{"positive": "a", "negative": "b"}],
        }
    ]
    printed = capsys.readouterr()
    assert printed.out == "calm@1\n"
    assert "held-out examples: AUC 0.750 at layer 7" in printed.err


def test_extract_writes_and_draws_what_was_measured(far: Jobs, pairs: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [str(part) for name in ("out", "png", "html") for part in (f"--{name}", tmp_path / f"calm.{name}")]
    assert cli.main(["extract", "--name", "calm", "--pairs", pairs, *files]) == 0
    assert json.loads((tmp_path / "calm.out").read_text()) == RESULT
    assert (tmp_path / "calm.png").read_bytes()[:4] == b"\x89PNG"
    assert "calm@1" in (tmp_path / "calm.html").read_text()


def test_extract_from_two_files(far: Jobs, tmp_path: Path) -> None:
    for side in ("positive", "negative"):
        (tmp_path / f"{side}.txt").write_text(f"{side} one\n{side} two\n")
    files = ["--positive", str(tmp_path / "positive.txt"), "--negative", str(tmp_path / "negative.txt")]
    assert cli.main(["extract", "--name", "calm", "--heads", "2", "--method", "heads", *files]) == 0
    (asked,) = far.asked
    assert (asked["positive"], asked["negative"]) == (
        ["positive one", "positive two"],
        ["negative one", "negative two"],
    )
    assert (asked["layers"], asked["token"], asked["heads"]) == ("all", "mean", {"k": 2})
    assert {"length", "site", "pairs"}.isdisjoint(asked)


@pytest.mark.parametrize("options", [["--layers", "x"], ["--token", "first"], ["--pairs", "/nowhere.jsonl"]])
def test_extract_refuses_bad_options(far: Jobs, pairs: str, options: list[str]) -> None:
    given = ["extract", "--name", "calm", "--pairs", pairs, *options]
    if options[0] == "--pairs":
        assert cli.main(given) == 1
    else:
        with pytest.raises(SystemExit, match=f"steersman extract: {options[0]}: .* is not a number"):
            cli.main(given)
    assert not far.asked


def test_extract_says_why_a_job_failed(far: Jobs, pairs: str) -> None:
    far.done |= {"state": "failed", "error": {"message": "no such role", "param": "pairs[0].positive"}}
    with pytest.raises(SystemExit, match=r"steersman extract: no such role \(pairs\[0\]\.positive\)"):
        cli.main(["extract", "--name", "calm", "--pairs", pairs])


# -- calibrate --------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    found = Served()
    plain = httpx.AsyncClient

    def client(**kwargs: Any) -> httpx.AsyncClient:
        assert kwargs["headers"] == {"X-Admin-Key": "k"}
        return plain(base_url=kwargs["base_url"], transport=httpx.MockTransport(found))

    monkeypatch.setattr(httpx, "AsyncClient", client)
    return found


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("one\ntwo!\nthree\nfour\n")
    return ["calibrate", "french", "--prompts", str(tmp_path / "prompts.txt"), "--admin-key", "k"]


def test_calibrate_measures_stores_and_draws(
    served: Served, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--{kind}={tmp_path / f'out.{kind}'}" for kind in ("png", "html")] + [f"--out={tmp_path / 'out.json'}"]
    options = ["--lexicon", "french", "--layers", "1", "--scales", "0.1,0.2", "--repetition-penalty", "1.15"]
    assert cli.main([*asked, *options, *files]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "french@fedcba987654"
    assert "0.2 *" in printed
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["cells"][result["recommended"]]["scale"] == 0.2
    assert result["settings"]["repetition_penalty"] == 1.15
    assert all(body["repetition_penalty"] == 1.15 for body in served.asked if "messages" in body)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png;base64," in (tmp_path / "out.html").read_text()
    assert len(served.stored) == 1


def test_calibrate_can_leave_the_store_alone(served: Served, asked: list[str]) -> None:
    assert cli.main([*asked, "--tokens", "Oui", "--scales=0.4", "--no-store"]) == 0
    assert served.stored == []


def test_calibrate_recommends_nothing_that_it_cannot_stand_for(
    served: Served, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    served.reach = 0.0
    assert cli.main([*asked, "--lexicon", "french", "--scales", "0.1"]) == 1
    assert "Nothing is recommended: no layer and scale moves the score" in capsys.readouterr().err
    assert served.stored == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "("], "scorer.*is not a regular expression"),
        (["--lexicon", "french", "--count"], "--count goes with --regex"),
        (["--lexicon", "french", "--label", "x"], "--label and --classifier go together"),
        (["--classifier", "nowhere", "--label", "x", "--scales", "1"], "nowhere holds no classifier"),
        (["--lexicon", "french", "--seeds", "1"], "seeds: "),
        (["--lexicon", "french", "--layers", "2", "--scales", "1"], "has nothing for"),
    ],
)
def test_calibrate_refuses_in_one_line(served: Served, asked: list[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"steersman calibrate: .*{message}"):
        cli.main([*asked, *options])


# -- select -----------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    found = Tried()
    real = httpx.AsyncClient

    def client(**options: Any) -> httpx.AsyncClient:
        return real(**options, transport=httpx.MockTransport(found))

    monkeypatch.setattr(httpx, "AsyncClient", client)
    return found


def test_select_measures_stores_and_draws(tried: Tried, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    labelled = [{"prompt": text, "label": "bad"} for text in SHOWING]
    labelled += [{"prompt": text, "label": "good"} for text in OTHERS]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, labelled)))
    asked = ["select", "a", "b", "--prompts", str(file), "--positive", "bad", "--tokens", "No"]
    files = [f"--{kind}={tmp_path / f'out.{kind}'}" for kind in ("png", "html", "out")]
    assert cli.main([*asked, *files]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "b@new"
    assert "2 *" in printed
    result = json.loads((tmp_path / "out.out").read_text())
    assert result["prompts"] == {"showing": len(SHOWING), "others": len(OTHERS)}
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert "Selected: layer 2 of a@1." in (tmp_path / "out.html").read_text()
    assert len(tried.stored) == 1
    assert cli.main([*asked, "--no-store"]) == 0
    assert cli.main([*asked, "--min-induce", "9"]) == 1
    assert "Nothing is selected: no direction is left of 5 candidates" in capsys.readouterr().err.replace("\n", " ")
    assert len(tried.stored) == 1
    with pytest.raises(SystemExit, match=r"steersman select: last_share"):
        cli.main([*asked, "--last-share", "1"])
