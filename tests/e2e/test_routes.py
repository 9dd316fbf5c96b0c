"""The routes of a real server, started by ``steersman serve`` and by vLLM's own module: both are the same."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI

from steersman.clients import conditions
from steersman.clients.jobs import follow
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.clients.selection import log_odds
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.conditions import holds, scores
from steersman.steering.formats import native
from tests.e2e.server import Server, serve
from tests.models.tiny import tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
D, LAYERS = 64, 4
PROMPT = [1, 40, 51, 62, 73]
OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16"]
TURNS: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where is the ship?"}]
ADD = {"op": "add", "vector": "calm-sea", "scale": 2.0}
STEERING = {"interventions": [ADD]}
ADMIN = {"STEERSMAN_ADMIN_KEY": "secret"}


@pytest.fixture(scope="module", params=["steersman", "vllm"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path, folder = tiny_model("llama"), tmp_path_factory.mktemp(request.param)
    command, env = None, ADMIN
    if request.param == "vllm":
        command = ["-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--model", str(path)]
        env = {**ADMIN, "VLLM_PLUGINS": "steersman", "STEERSMAN_STORE": str(folder / "store")}
    with serve(path, folder, OPTIONS, env=env, command=command) as server:
        admin(server).upload(asset_file(server, folder))
        yield server


def admin(server: Server) -> Steersman:
    return Steersman(server.url, admin_key="secret")


def asset_file(server: Server, folder: Path) -> Path:
    model = server.http.get("/v1/steering/model").json()
    about = {"id": model["model"], "n_layers": LAYERS, "d_model": D}
    meta = {"name": "calm-sea", "kind": "vector", "layers": [1, 2], "model": about, "recommended": {"scale": 2.0}}
    vectors = torch.randn(2, D, generator=torch.Generator().manual_seed(3))
    (folder / "calm.safetensors").write_bytes(native.to_safetensors(Asset(parse_metadata(meta), {"vectors": vectors})))
    return folder / "calm.safetensors"


def tokens(answer: dict[str, Any]) -> Any:
    return answer["choices"][0]["token_ids"]


def edited(report: dict[str, Any]) -> list[int]:
    return [entry["tokens"] for entry in report["interventions"]]


# -- assets -----------------------------------------------------------------------------------------


def test_assets_from_upload_to_deletion(server: Server, tmp_path: Path) -> None:
    client = admin(server)
    whole = json.loads(client.download("calm-sea", "json"))
    other = {**whole, "name": "other", "description": "made by a test"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    ref = client.upload(tmp_path / "other.json")["ref"]
    assert [a["ref"] for a in client.assets(text="MADE BY")] == [ref]
    assert client.asset(ref[: len("other@") + 4])["sha256"].startswith(ref.removeprefix("other@"))
    for form in ("safetensors", "gguf"):
        file = tmp_path / f"other.{form}"
        file.write_bytes(client.download("other", form))
        assert client.upload(file)["ref"] == ref
    assert client.delete("other") == [ref]
    with pytest.raises(SteersmanError) as caught:
        client.asset("other")
    assert (caught.value.status, caught.value.code) == (404, "asset_not_found")


def test_changes_need_the_key(server: Server) -> None:
    with pytest.raises(SteersmanError) as caught:
        Steersman(server.url).delete("calm-sea")
    assert (caught.value.status, caught.value.code) == (401, "unauthorized")
    assert server.complete(PROMPT, STEERING, max_tokens=1)["steering"]


def test_the_model_and_the_schema(server: Server) -> None:
    model = server.http.get("/v1/steering/model").json()
    assert (model["n_layers"], model["d_model"]) == (LAYERS, D)
    assert set(model["sites"]) >= {"resid_post", "attn_z", "mlp_post"}
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert "interventions" in schemas["Steering"]["properties"]
    field = schemas["SteeredChatRequest"]["properties"]["steering"]
    assert {"$ref": "#/components/schemas/Steering"} in field["anyOf"]
    for ref in re.findall(r"#/components/schemas/([^\"]+)", json.dumps(schemas)):
        assert ref in schemas, ref
    assert "messages" in schemas["SteeredChatRequest"]["properties"]


# -- the same by every way --------------------------------------------------------------------------


def test_the_field_and_vllm_xargs_mean_the_same(server: Server) -> None:
    plain = server.complete(PROMPT, max_tokens=6, return_token_ids=True)
    field = server.complete(PROMPT, STEERING, max_tokens=6, return_token_ids=True)
    xargs = {"steering": json.dumps(STEERING)}
    text = server.complete(PROMPT, max_tokens=6, return_token_ids=True, vllm_xargs=xargs)
    assert tokens(field) == tokens(text) != tokens(plain)
    assert field["steering"]["plan"] == text["steering"]["plan"]
    assert edited(field["steering"]) == edited(text["steering"]) == [10]


@pytest.mark.parametrize("report", ["none", "summary", "layers"])
def test_reports(server: Server, report: str) -> None:
    found = server.complete(PROMPT, {**STEERING, "report": report}, max_tokens=2)["steering"]
    if report == "none":
        assert set(found) == {"plan"}
        return
    entry = found["interventions"][0]
    assert entry["assets"][0].startswith("calm-sea@")
    assert entry["layers"] == [1, 2]
    assert 0 < entry["mean_relative_norm"] < 10
    assert ("by_layer" in entry) == (report == "layers")
    if report == "layers":
        assert set(entry["by_layer"]) == {"1", "2"}


def test_the_openai_client(server: Server) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    extra = {"steering": STEERING}
    asked: dict[str, Any] = {"model": "tiny", "messages": TURNS, "max_tokens": 5, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    whole = client.chat.completions.create(**asked, extra_body=extra)
    assert whole.choices[0].message.content != plain.choices[0].message.content
    report = whole.model_extra["steering"]  # type: ignore[index]
    assert edited(report) == [whole.usage.prompt_tokens + 4]  # type: ignore[union-attr]
    chunks = list(client.chat.completions.create(**asked, extra_body=extra, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    reports = [c.model_extra.get("steering") for c in chunks]  # type: ignore[union-attr]
    assert [r is not None for r in reports] == [False] * (len(chunks) - 1) + [True]
    assert edited(reports[-1]) == edited(report)
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**asked, extra_body={"steering": {"colour": 1}}, stream=True)
    assert (caught.value.param, caught.value.code) == ("steering.colour", "unknown_field")


def test_responses(server: Server) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked: dict[str, Any] = {"model": "tiny", "input": "Where is the ship?", "max_output_tokens": 5, "temperature": 0}
    plain = client.responses.create(**asked)
    whole = client.responses.create(**asked, extra_body={"steering": STEERING})
    assert whole.output_text != plain.output_text
    report = whole.model_extra["steering"]  # type: ignore[index]
    assert edited(report)[0] == whole.usage.total_tokens - 1  # type: ignore[union-attr]
    last: Any = list(client.responses.create(**asked, extra_body={"steering": STEERING}, stream=True))[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    assert edited(last.model_extra["steering"]) == edited(report)


def test_several_prompts_and_sequences(server: Server) -> None:
    answer = server.complete([PROMPT, PROMPT[:3]], STEERING, max_tokens=2, n=2, temperature=1.0, seed=1)
    assert len(answer["choices"]) == 4
    assert edited(answer["steering"]) == [2 * (5 + 1) + 2 * (3 + 1)]
    for usage in (False, True):
        with server.http.stream(
            "POST",
            "/v1/completions",
            json={"model": "tiny", "prompt": [PROMPT, PROMPT[:3]], "max_tokens": 2, "n": 2, "stream": True}
            | {"steering": STEERING, "stream_options": {"include_usage": usage}},
        ) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        found = [json.loads(line) for line in lines[:-1]]
        assert ["steering" in event for event in found] == [False] * (len(found) - 1) + [True]
        assert edited(found[-1]["steering"]) == [20]


# -- dry runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selector", ["prompt", "last_prompt", {"text": "ship"}, {"roles": ["user"]}, {"roles": ["system"], "last": 2}]
)
def test_a_dry_run_says_what_is_then_done(server: Server, selector: Any) -> None:
    steering = {"interventions": [{**ADD, "tokens": selector}]}
    client = Steersman(server.url)
    dry = client.resolve(steering, messages=TURNS)
    done = client.chat(TURNS, steering, model="tiny", max_tokens=2)
    count = sum(b - a for a, b in dry["interventions"][0]["prompt_positions"])
    assert count > 0
    assert edited(done["steering"]) == [count]
    assert dry["plan"] == done["steering"]["plan"]
    assert dry["prompt_tokens"] == done["usage"]["prompt_tokens"]


@pytest.mark.parametrize("over", conditions.OVER)
def test_a_condition_decides_as_it_was_fitted(server: Server, over: conditions.Over) -> None:
    """What captures read and a bound says offline is what the gates of requests decide, prompt by prompt."""
    client = admin(server)
    prompts = [f"The {noun} has number {i * i}." for i in range(12) for noun in ("ship", "tree")]
    examples = [conditions.Example(prompt, "ship" in prompt) for prompt in prompts]
    found = conditions.fit(client, examples, [0, 1, 2], over=over)
    ref = client.add(found.asset("about-ships", client.model()))["ref"]
    try:
        gated = {"interventions": [{**ADD, "layers": 2, "when": found.gate(ref)}]}
        decided = conditions.decisions(client, prompts, gated)
        read = conditions.states(client, prompts, [found.layer], "resid_post", over)
        cosines = scores(read, found.condition.direction[None])[:, 0]
        assert decided == holds(found.condition.bound, cosines).tolist()
        assert 0 < sum(decided) < len(decided)
    finally:
        client.delete("about-ships")


# -- the default profile ----------------------------------------------------------------------------


def test_the_default_profile(server: Server) -> None:
    client = admin(server)
    plain = server.complete(PROMPT, max_tokens=5, return_token_ids=True)
    assert client.default() is None
    client.set_default(STEERING)
    try:
        assert client.default() == STEERING
        said_nothing = server.complete(PROMPT, max_tokens=5, return_token_ids=True)
        assert edited(said_nothing["steering"]) == [9]
        assert tokens(said_nothing) == tokens(server.complete(PROMPT, {}, max_tokens=5, return_token_ids=True))
        assert tokens(said_nothing) != tokens(plain)
        left_out = server.complete(PROMPT, {"default": False}, max_tokens=5, return_token_ids=True)
        assert tokens(left_out) == tokens(plain)
        assert left_out["steering"]["interventions"] == []
        both = server.complete(PROMPT, {"interventions": [{**ADD, "scale": -2.0}]}, max_tokens=5, return_token_ids=True)
        assert tokens(both) == tokens(plain)
        assert len(both["steering"]["interventions"]) == 2
        with pytest.raises(SteersmanError) as caught:
            client.delete("calm-sea")
        assert caught.value.code == "asset_in_use"
    finally:
        client.set_default(None)
    assert "steering" not in server.complete(PROMPT, max_tokens=1)


# -- metrics ----------------------------------------------------------------------------------------


def sample(server: Server, name: str) -> float:
    text = server.http.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics(server: Server) -> None:
    names = {
        "steered": 'steersman_requests_total{outcome="steered"}',
        "refused": 'steersman_requests_total{outcome="refused"}',
        "cancelled": 'steersman_requests_total{outcome="cancelled"}',
        "edited": 'steersman_edited_tokens_total{asset="calm-sea"}',
        "missing": 'steersman_store_errors_total{reason="asset_not_found"}',
        "built": "steersman_plan_build_seconds_count",
    }
    before = {key: sample(server, name) for key, name in names.items()}
    server.complete(PROMPT, STEERING, max_tokens=3)
    assert server.post("/v1/completions", {"prompt": PROMPT, "model": "tiny", "steering": 3}).status_code == 400
    gone = {"interventions": [{"op": "add", "vector": "gone"}]}
    assert server.post("/v1/completions", {"prompt": PROMPT, "model": "tiny", "steering": gone}).status_code == 404
    grown = {key: sample(server, name) - before[key] for key, name in names.items()}
    assert grown["steered"] == 1
    assert grown["refused"] == 2
    assert grown["edited"] == 7
    assert grown["missing"] == 1
    assert grown["built"] >= 1
    assert sample(server, "steersman_plans_resident") >= 1
    assert sample(server, 'steersman_store_assets{kind="vector"}') == 1


def outcomes(server: Server) -> dict[str, float]:
    known = ("steered", "refused", "failed", "cancelled")
    return {name: sample(server, f'steersman_requests_total{{outcome="{name}"}}') for name in known}


def test_a_client_that_goes_away_in_a_stream_is_counted_and_done_with(server: Server) -> None:
    before = outcomes(server)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 240, "ignore_eos": True, "n": 8, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "steering": STEERING}) as stream:
        assert stream.status_code == 200
        next(stream.iter_raw())
    deadline = time.monotonic() + 20
    while outcomes(server) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert outcomes(server) == {**before, "cancelled": before["cancelled"] + 1}


def test_the_command_line_talks_to_it(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from steersman.server import cli

    assert cli.main(["resolve", "--server", server.url, "--add", "calm-sea=2", "Where is it?"]) == 0
    assert json.loads(capsys.readouterr().out)["interventions"][0]["op"] == "add"
    assert cli.main(["chat", "--server", server.url, "--add", "calm-sea=2", "--max-tokens", "5", "Where is it?"]) == 0
    assert "tokens edited" in capsys.readouterr().out


def test_a_direction_is_selected_by_what_it_does(server: Server) -> None:
    """Each layer's numbers are those of requests made by hand, and the choice is stored."""
    plain, asks = {"default": False}, {"showing": ["Where is the ship?"], "others": ["Be kind."]}

    def top(prompt: str, interventions: list[dict[str, Any]]) -> list[tuple[str, float]]:
        """Several tokens may be spelled alike: bytes that are no letter."""
        turns = [{"role": "user", "content": prompt}]
        asked = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        steering = {**plain, "interventions": interventions}
        answer = server.post(
            "/v1/chat/completions", {"model": "tiny", "messages": turns, **asked, "steering": steering}
        )
        assert answer.status_code == 200, answer.text
        first = answer.json()["choices"][0]["logprobs"]["content"][0]
        return [(e["token"], e["logprob"]) for e in first["top_logprobs"]]

    (made,) = [a for a in server.http.get("/v1/steering/assets").json()["data"] if a["name"] == "calm-sea"]
    source = f"calm-sea@{made['version']}"  # the job stores another version
    likely = list(dict.fromkeys(top(prompt, [])[0][0] for (prompt,) in asks.values()))
    limits = {"max_kl": 1e3, "min_induce": -1e3, "last_share": 0.0}
    job = {"kind": "select", "vectors": ["calm-sea"], **asks, "tokens": likely, "scale": 3.0, **limits}
    result = follow(admin(server), job, every=0.1)
    found = result["selection"]
    assert [c["layer"] for c in found["candidates"]] == [1, 2]
    for candidate in found["candidates"]:
        layer = candidate["layer"]
        without = [
            {"op": "ablate", "vector": source, "from_layer": layer, "site": site, "layers": layers}
            for site, layers in (("resid_pre", [0]), ("attn_out", "all"), ("mlp_out", "all"))
        ]
        added = [{**ADD, "vector": source, "layers": [layer], "scale": 3.0}]
        for name, prompt, edits in (("bypass", asks["showing"][0], without), ("induce", asks["others"][0], added)):
            share = sum(math.exp(logprob) for token, logprob in top(prompt, edits) if token in likely)
            assert candidate[name] == pytest.approx(log_odds(share), abs=1e-3)
        assert candidate["kl"] > 0
    best = min(found["candidates"], key=lambda c: c["bypass"])
    (ref,) = result["assets"]
    stored = server.http.get(f"/v1/steering/assets/{ref}").json()
    assert (stored["layers"], stored["provenance"]["selection"]["selected"]) == ([best["layer"]], found["selected"])
    assert server.http.delete(f"/v1/steering/assets/{ref}", headers={"X-Admin-Key": "secret"}).status_code == 200
