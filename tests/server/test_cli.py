from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
import torch
from safetensors.torch import save_file

from steersman.clients.sdk import Steersman
from steersman.server import cli
from steersman.server.commands import remote, serve
from steersman.steering.formats import gguf, native
from steersman.steering.store import Store
from tests.steering.library import D, asset, noise, vector

EAGER = "--enforce-eager"

# -- serve ------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Runs ``steersman serve`` up to vLLM: what vLLM is given. The environment is put back afterwards."""

    def run(*arguments: str, cpu: bool = False) -> list[str]:
        given: list[list[str]] = []
        monkeypatch.setattr(serve, "_on_cpu", lambda: cpu)
        monkeypatch.setattr(serve, "_vllm_serve", given.append)
        assert cli.main(["serve", *arguments]) == 0
        return given[0]

    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith(("STEERSMAN_", "VLLM_"))]:
            del os.environ[name]
        yield run


@pytest.mark.parametrize(
    "arguments",
    [
        ["./model"],
        ["./model", "--port", "8001", "--enforce-eager"],
        ["--port", "8001", "./model"],
        ["--config", "server.yaml"],
        ["./model", "-O3", "--max_model_len=2048", "-tp", "2", "--hf-overrides", '{"a": -1}'],
        ["./model", "--compilation-config.mode", "3", "--logits-processors", "a", "b"],
    ],
)
def test_vllms_options_are_passed_on_in_their_order(served: Callable[..., list[str]], arguments: list[str]) -> None:
    given = served(*arguments)
    assert given[: len(arguments) + 1] == ["serve", *arguments]
    assert given[len(arguments) + 1 :] == []


def test_our_options_go_to_the_environment(served: Callable[..., list[str]]) -> None:
    ours = ["--steering-store", "/s", "--steering-admin-key=k", "--steering-any-model", "--steering-max-plans", "3"]
    assert served(*ours[:3], "./model", "--port", "1", *ours[3:]) == ["serve", "./model", "--port", "1"]
    assert os.environ["STEERSMAN_STORE"] == "/s"
    assert os.environ["STEERSMAN_ADMIN_KEY"] == "k"
    assert os.environ["STEERSMAN_ANY_MODEL"] == "1"
    assert os.environ["STEERSMAN_MAX_PLANS"] == "3"
    assert "STEERSMAN_SITES" not in os.environ


@pytest.mark.parametrize(
    "bad", [["--steering-max-plans", "none"], ["--steering-sites", "x"], ["--steering-admin-key", ""]]
)
def test_bad_settings_end_it_with_one_line(served: Callable[..., list[str]], bad: list[str]) -> None:
    with pytest.raises(SystemExit, match="steersman serve: "):
        served("./model", *bad)


def test_the_plugin_is_named_beside_what_is_named_already(served: Callable[..., list[str]]) -> None:
    os.environ["VLLM_PLUGINS"] = "mine,,other"
    served("./model")
    assert os.environ["VLLM_PLUGINS"] == "mine,other,steersman"
    served("./model")
    assert os.environ["VLLM_PLUGINS"] == "mine,other,steersman"


def test_where_none_is_named_those_that_would_load_still_do(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [
        EntryPoint("resolver", "x:y", "vllm.general_plugins"),
        EntryPoint("board", "x:y", "vllm.platform_plugins"),
        EntryPoint("routed", "x:y", "vllm.general_plugins"),
        EntryPoint("routed", "x:y", "vllm.endpoint_plugins"),
        EntryPoint("steersman", "x:y", "vllm.endpoint_plugins"),
        EntryPoint("steersman", "x:y", "vllm.general_plugins"),
        EntryPoint("vllm", "x:y", "console_scripts"),
    ]
    monkeypatch.setattr(serve, "entry_points", lambda: EntryPoints(installed))
    assert serve.plugins(None) == ["board", "resolver", "steersman"]
    assert serve.plugins("") == ["steersman"]


@pytest.mark.parametrize(
    "option", [*serve.COMPILING, "-O3", "--enforce_eager", "-cc.mode=3", "--compilation-config.mode"]
)
def test_on_a_cpu_the_mode_is_eager_unless_it_is_chosen(served: Callable[..., list[str]], option: str) -> None:
    assert served("./model", cpu=True) == ["serve", "./model", EAGER]
    assert served("./model", cpu=False) == ["serve", "./model"]
    for cpu in (True, False):
        assert served("./model", option, "x", cpu=cpu) == ["serve", "./model", option, "x"]


@pytest.mark.parametrize("option", [*serve.MEMORY, "--gpu_memory_utilization"])
def test_on_a_cpu_the_cache_is_small_unless_it_is_chosen(served: Callable[..., list[str]], option: str) -> None:
    served("./model", f"{option}=1", cpu=True)
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    served("./model", cpu=True)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "7"
    served("./model", cpu=True)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_on_a_gpu_the_cache_is_vllms_affair(served: Callable[..., list[str]]) -> None:
    served("./model")
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_other_commands_take_no_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["assets", "list", "--port", "1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --port 1" in capsys.readouterr().err


def test_a_bad_variable_of_the_server_stops_no_other_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEERSMAN_MAX_PLANS", "none")
    assert cli.main(["assets", "--store", str(tmp_path), "list"]) == 0


# -- assets -----------------------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["assets", "--store", str(tmp_path / "store"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_files_of_every_form_are_added(assets: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    own = vector("new", noise(1, D), [1])
    files = {"a.json": json.dumps(native.to_json(own)).encode(), "b.safetensors": native.to_safetensors(own)}
    files["c.gguf"] = gguf.to_gguf(own)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert assets("add", str(tmp_path / name)) == (0, f"{own.ref}\n", "")
    metadata = {key: value for key, value in native.to_json(own).items() if key not in ("tensors", "name")}
    code, out, _ = assets("add", str(tmp_path / "b.safetensors"), "--metadata", json.dumps(metadata), "--name", "other")
    assert (code, out) == (0, f"{vector('other', noise(1, D), [1]).ref}\n")


def test_list_show_rm_verify(assets: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    kept = store.add(vector("kept", noise(2, D), [1, 3], description="a long\ndescription " + "of it " * 40))
    gone = store.add(asset("gone", "profile", steering={}))
    _, listed, _ = assets("list")
    assert [line.split("\t")[0] for line in listed.splitlines()] == [gone, kept]
    assert assets("list", "--kind", "vector")[1].split("\t")[:4] == [kept, "vector", "org/tiny", "1-3"]
    assert assets("list", "--text", "LONG")[1].count("\n") == 1
    assert assets("list", "--model", "other")[1] == ""
    shown = json.loads(assets("show", "kept")[1])
    assert (shown["ref"], shown["layers"]) == (kept, [1, 3])
    assert assets("rm", "gone") == (0, f"removed {gone}\n", "")
    assert assets("verify") == (0, f"{kept}: ok\n", "")
    (tmp_path / "store/kept" / kept.partition("@")[2] / "tensors.safetensors").write_bytes(b"x")
    code, out, _ = assets("verify", "kept")
    assert code == 1
    assert "damaged" in out


def test_verify_looks_at_directions_beside_the_weights(
    assets: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """A direction that W_down cannot see is warned of, and is no failure."""
    width, down = 32, [noise(D, 32, seed=layer) for layer in range(4)]
    model = {f"model.layers.{i}.mlp.down_proj.weight": weight for i, weight in enumerate(down)}
    (tmp_path / "model").mkdir()
    save_file({"model.embed_tokens.weight": noise(11, D), **model}, tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    store, drawn = Store(tmp_path / "store"), noise(width)
    null = drawn - torch.linalg.pinv(down[1]) @ (down[1] @ drawn)
    unseen = store.add(vector("unseen", null[None], [1], site="mlp_post"))
    seen = store.add(vector("seen", down[1][:1].clone(), [1], site="mlp_post"))
    stream = store.add(vector("stream", noise(1, D), [1]))
    code, out, _ = assets("verify", "--weights", str(tmp_path / "model"))
    told = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in out.splitlines() if not line.endswith(": ok")}
    assert code == 0
    assert told[unseen].startswith("warning: layer 1: 1.000 of its length lies where the next map reads nothing")
    assert told[seen] == "W_down reads its directions as well as random ones"
    assert told[stream].startswith("not compared with the weights")
    code, _, err = assets("verify", "--weights", str(tmp_path))
    assert code == 1
    assert "no model's folder" in err


def test_what_fails_is_one_line(assets: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    for arguments in (
        ("show", "gone"),
        ("rm", "gone"),
        ("verify", "gone"),
        ("add", str(tmp_path / "missing")),
        ("add", str(tmp_path / "bad.json")),
        ("add", str(tmp_path / "bad.safetensors")),
        ("add", str(tmp_path)),
    ):
        code, out, err = assets(*arguments)
        assert (code, out) == (1, ""), arguments
        assert err.startswith("steersman: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("metadata", ["{", "[1]", "3"])
def test_metadata_must_be_an_object(assets: Callable[..., tuple[int, str, str]], metadata: str) -> None:
    with pytest.raises(SystemExit) as caught:
        assets("add", "x", "--metadata", metadata)
    assert caught.value.code == 2


# -- chat and resolve -------------------------------------------------------------------------------


class Remote:
    """A server that answers with ``answers`` by path, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, tuple[int, Any]] = {"/v1/models": (200, {"data": [{"id": "tiny"}]})}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, json.loads(request.content) if request.content else None))
        status, answer = self.answers[request.url.path]
        return httpx.Response(status, json=answer)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Remote:
    found = Remote()
    monkeypatch.setattr(remote, "client", lambda args: Steersman(args.server, transport=httpx.MockTransport(found)))
    return found


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "steering": {"plan": "p"}, **more}


def test_resolve_prints_the_plan(far: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    far.answers["/v1/steering/resolve"] = (200, {"plan": "p"})
    steering = '{"profile": "calm", "interventions": [{"op": "multiply"}]}'
    assert (
        cli.main(["resolve", "--add", "french=6", "--add", "kind", "--ablate", "refusal", "--steering", steering, "hi"])
        == 0
    )
    assert json.loads(capsys.readouterr().out) == {"plan": "p"}
    assert far.asked[0][1] == {
        "steering": {
            "profile": "calm",
            "interventions": [
                {"op": "multiply"},
                {"op": "add", "vector": "french", "scale": 6.0},
                {"op": "add", "vector": "kind"},
                {"op": "ablate", "vector": "refusal"},
            ],
        },
        "messages": [{"role": "user", "content": "hi"}],
    }


def test_chat_asks_both_ways(far: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    done = {"op": "add", "assets": ["french@1"], "tokens": 7, "mean_relative_norm": 0.25}
    text = "Bonjour [/bold] [b]"
    far.answers["/v1/chat/completions"] = (200, answer(text, steering={"interventions": [done]}))
    assert cli.main(["chat", "--add", "french=6", "--max-tokens", "5", "Hello?"]) == 0
    out = capsys.readouterr().out
    assert text in out
    assert "7 tokens edited, 25.0% of the stream's norm" in out
    bodies = [body for path, body in far.asked if path == "/v1/chat/completions"]
    assert sorted("steering" in body for body in bodies) == [False, True]
    assert all(body["max_tokens"] == 5 and body["model"] == "tiny" for body in bodies)


def test_chat_without_a_report(far: Remote) -> None:
    far.answers["/v1/chat/completions"] = (200, answer("hi"))
    assert cli.main(["chat", "--steering", '{"report": "none"}', "Hello?"]) == 0


@pytest.mark.parametrize("command", ["chat", "resolve"])
def test_a_servers_refusal_is_said_in_one_line(far: Remote, command: str) -> None:
    refusal = {"error": {"message": "no asset 'x'", "code": "asset_not_found", "param": None}}
    far.answers = dict.fromkeys(("/v1/models", "/v1/steering/resolve"), (404, refusal))
    with pytest.raises(SystemExit, match=f"steersman {command}: no asset 'x'"):
        cli.main([command, "--add", "x", "hi"])


@pytest.mark.parametrize(
    "options", [["--add", "x=much"], ["--steering", "[1]"], ["--steering", "{"], ["--steering", '{"interventions": 3}']]
)
def test_options_that_make_no_steering(far: Remote, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["resolve", *options, "hi"])
    assert caught.value.code
    assert not far.asked


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="steersman resolve: "):
        cli.main(["resolve", "--server", "http://127.0.0.1:9", "hi"])
