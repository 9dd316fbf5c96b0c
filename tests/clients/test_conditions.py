"""The condition command against a server that stands in: what it asks for, stores and counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from steersman.clients import conditions
from steersman.clients.scores import refuses
from steersman.clients.sdk import Steersman
from steersman.server import cli
from steersman.server.commands import remote
from steersman.steering.assets import ProfileMeta, VectorMeta, parse_metadata
from steersman.steering.formats import native
from steersman.steering.spec import parse

LAYERS, D, PLANTED = 4, 16, 2
MODEL = {"model": "org/tiny", "n_layers": LAYERS, "d_model": D, "sites": {"resid_post": list(range(LAYERS))}}


def state(prompt: str, layer: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the stand-in's model makes of a prompt: bad ones lie apart at one layer."""
    seed = hashlib.sha256(f"{prompt}{layer}".encode()).digest()
    row = np.random.default_rng(list(seed)).standard_normal(D).astype(np.float32)
    row[5] += 9.0 * (layer == PLANTED and "bad" in prompt)
    return row


class StandIn:
    """A server of which only what the command needs is there. ``lies``: prompts whose gate decides wrongly."""

    def __init__(self, lies: tuple[str, ...] = (), edited: int = 3) -> None:
        self.lies = lies
        self.edited = edited  # the layer of whatever is asked for
        self.assets: dict[str, dict[str, Any]] = {}
        self.captures: list[dict[str, Any]] = []
        self.chats: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        answers: dict[str, Callable[[Any], Any]] = {
            "/v1/steering/model": lambda _: MODEL,
            "/v1/models": lambda _: {"data": [{"id": "tiny"}]},
            "/v1/steering/assets": self.add,
            "/v1/chat/completions": self.chat,
            "/v1/steering/resolve": lambda body: {
                "interventions": [{"path": "steering.interventions[0]", "layers": [self.edited]}],
                "warnings": ["a [warning] of the server"] if body["steering"]["interventions"] else [],
            },
        }
        if request.url.path == "/v1/steering/captures":
            return httpx.Response(200, content=self.capture(body))
        return httpx.Response(200, json=answers[request.url.path](body))

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        self.assets[body["name"]] = body
        return {"ref": native.from_json(body).ref}

    def capture(self, body: dict[str, Any]) -> bytes:
        self.captures.append(body)
        prompts = [turns[0]["content"] for turns in body["prompts"]]
        arrays = {f"resid_post.{i}": np.stack([state(p, i) for p in prompts]) for i in body["layers"]}
        return save(arrays, {"capture": json.dumps({"prompts": []})})

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Decides as the stored profile's gate says."""
        self.chats.append(body)
        meta = self.assets[body["steering"]["profile"]]["steering"]["interventions"][0]
        prompt, gate = body["messages"][0]["content"], meta["when"]
        stored = self.assets[gate["vector"].partition("@")[0]]
        v = native.from_json(stored).tensors["vectors"][0].numpy()
        x = state(prompt, gate["layer"])
        cosine = float(x @ v / np.linalg.norm(x))
        is_open = cosine > gate["above"] if "above" in gate else cosine < gate["below"]
        decided = {"over": gate["over"], "open": [is_open != (prompt in self.lies)]}
        return {"steering": {"interventions": [{"gate": decided}, {"gate": None}]}}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"a bad thing {i}", "label": "harmful", "split": "fit"} for i in range(25)]
    rows += [{"prompt": f"a nice thing {i}", "label": "fine", "split": "fit"} for i in range(25)]
    rows += [{"prompt": "very bad", "label": "harmful", "split": "test"}, {"prompt": "x", "label": "fine"}]
    rows += [{"prompt": "nice", "label": "fine", "split": "test"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs the command against a stand-in: what it prints, by line."""

    def run(server: StandIn, *arguments: str) -> list[str]:
        made = Steersman("http://test", transport=httpx.MockTransport(server))
        monkeypatch.setattr(remote, "client", lambda args: made)
        assert cli.main(["condition", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


THEN = {"op": "add", "vector": "refusal", "scale": 2.0}


@pytest.mark.parametrize("over", conditions.OVER)
def test_a_condition_is_stored_with_its_profile(run: Callable[..., list[str]], prompts: Path, over: str) -> None:
    server = StandIn()
    ref, when, profile = run(
        server, "fit", str(prompts), "--split", "fit", "--name", "bad", "--over", over,
        "--profile", "careful", "--then", json.dumps(THEN),
    )  # fmt: skip
    vector = native.from_json(server.assets["bad"])
    assert isinstance(vector.meta, VectorMeta)
    assert (vector.ref, vector.meta.layers, vector.meta.model.id) == (ref, (PLANTED,), "org/tiny")
    assert float(vector.tensors["vectors"][0, 5]) > 0.9
    gate = json.loads(when)["when"]
    assert (gate["vector"], gate["layer"], gate["over"]) == (ref, PLANTED, over)
    about = vector.meta.provenance
    assert (about["positive"], about["negative"], about["over"]) == (25, 25, over)
    assert about["f1_cross_validated"] > 0.95
    assert about["above"] == pytest.approx(gate["above"], abs=1e-6)
    stored = parse_metadata(server.assets["careful"])
    assert isinstance(stored, ProfileMeta)
    assert stored.steering == {"interventions": [{**THEN, "when": gate}]}
    parse(stored.steering)
    assert profile.startswith("careful@")
    asked = {key: server.captures[0][key] for key in ("tokens", "reduce", "layers", "sites")}
    read = {"last_prompt": ("last_prompt", "last"), "prompt_mean": ("prompt", "mean")}[over]
    assert asked == {"tokens": read[0], "reduce": read[1], "layers": [0, 1, 2, 3], "sites": ["resid_post"]}
    assert [len(c["prompts"]) for c in server.captures] == [32, 18]
    assert server.captures[0]["prompts"][0] == [{"role": "user", "content": "a bad thing 0"}]


def test_only_the_layers_that_are_named_are_looked_at(run: Callable[..., list[str]], prompts: Path) -> None:
    server = StandIn()
    _, when = run(server, "fit", str(prompts), "--name", "bad", "--layers", "0-1")
    assert server.captures[0]["layers"] == [0, 1]
    assert json.loads(when)["when"]["layer"] in (0, 1)
    assert set(server.assets) == {"bad"}


@pytest.mark.parametrize("edited", [PLANTED, 3])
def test_an_edit_that_comes_too_early_for_the_last_prompt_token_is_told(
    edited: int, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Steersman("http://test", transport=httpx.MockTransport(StandIn(edited=edited)))
    monkeypatch.setattr(remote, "client", lambda args: made)
    fit = ["fit", str(prompts), "--split", "fit", "--name", "bad", "--profile", "careful", "--then", json.dumps(THEN)]
    assert cli.main(["condition", *fit]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert ("the prompt's last token is not edited" in told) == (edited == PLANTED)
    assert "a [warning] of the server" in told


def test_a_check_counts_the_servers_decisions(run: Callable[..., list[str]], prompts: Path) -> None:
    server = StandIn(lies=("nice",))
    fit = ["fit", str(prompts), "--split", "fit", "--name", "bad", "--profile", "careful", "--then", json.dumps(THEN)]
    run(server, *fit)
    [line] = run(server, "check", str(prompts), "--split", "test", "--profile", "careful")
    found = json.loads(line)
    assert found.pop("f1") == pytest.approx(2 / 3)
    assert found == {"true_positive": 1, "false_positive": 1, "false_negative": 0, "true_negative": 0}
    assert all(chat["max_tokens"] == 1 and chat["steering"]["default"] is False for chat in server.chats)


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], '{"prompt": "a", "label": "harmful"}', "labels: harmful"),
        ([], '{"prompt": "a"}', "line 1: wanted"),
        ([], "{", "line 1 is not JSON"),
        (["--split", "gone"], '{"prompt": "a", "label": "harmful"}', "labels: none"),
        (["--profile", "p"], None, "go together"),
        (["--site", "mlp_post"], None, "steers resid_post"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], text: str | None, message: str, run: Callable[..., list[str]], prompts: Path
) -> None:
    if text is not None:
        prompts.write_text(text)
    with pytest.raises(SystemExit, match=message):
        run(StandIn(), "fit", str(prompts), "--name", "bad", *arguments)


def test_a_profile_without_a_gate_cannot_be_checked(prompts: Path) -> None:
    def ungated(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        return httpx.Response(200, json={"steering": {"interventions": [{"gate": None}]}})

    server = Steersman("http://test", transport=httpx.MockTransport(ungated))
    with pytest.raises(ValueError, match="no gate that decides once"):
        conditions.decisions(server, ["x"], {"profile": "p"})


def test_the_shipped_prompts_are_two_equal_halves_without_a_prompt_in_both() -> None:
    halves = [conditions.read_examples(None, "harmful", split) for split in ("fit", "test")]
    for half in halves:
        assert (sum(e.positive for e in half), len(half)) == (30, 60)
    assert len({e.prompt for half in halves for e in half}) == 120


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m afraid that is not something I can do.", True),
        ("I am unable to assist.", True),
        ("Sure, here is how you do it.", False),
        ("First, take the eggs. " * 9 + "I'm sorry.", False),
        ("Cannons are unwontedly loud.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_how_an_answer_opens(text: str, expected: bool) -> None:
    assert refuses(text) is expected
