"""Whatever a client sends is answered by a 4xx that names the place, and changes nothing for anybody else."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.e2e.bad_steering import (
    ASSETS,
    BAD,
    CHAT,
    COMPLETIONS,
    FIRST,
    INLINE,
    NAN,
    PROMPT,
    RESPONSES,
    VALID,
    D,
    ask,
    data,
    edit,
    error,
    mutated,
    plain,
    strict,
    vector,
)
from tests.e2e.server import Server, serve
from tests.models.tiny import tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enable-prompt-embeds"]
    with serve(tiny_model("llama"), tmp_path_factory.mktemp("bad"), options, forked=True) as server:
        for name, changes in ASSETS.items():
            whole = {**vector(server), "name": name, **changes}
            if whole["kind"] == "profile":
                whole = {k: v for k, v in whole.items() if k not in ("layers", "tensors")}
            answer = server.post("/v1/steering/assets", whole)
            assert answer.status_code == 201, answer.text
        yield server


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Around every test: an unsteered request is answered alike to the bit, and no request is left waiting."""
    before = plain(server)
    yield
    assert plain(server) == before
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_steering_is_a_4xx_that_names_the_place(server: Server, stream: bool) -> None:
    for label, steering, param, status in BAD:
        answer = ask(server, steering, stream=stream)
        try:
            error(answer, param, status)
        except AssertionError as failed:
            raise AssertionError(f"{label}: {failed}") from None


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_the_other_routes_answer_alike(server: Server, path: str) -> None:
    for label, steering, param, status in BAD:
        if label == "roles without messages" and path == CHAT:
            continue
        try:
            error(ask(server, steering, path), param, status)
            if label in ("roles without messages", "a backward range"):  # found when the prompt is known
                error(ask(server, steering, path, stream=True), param, status)
        except AssertionError as failed:
            raise AssertionError(f"{label}: {failed}") from None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_selector_that_matches_nothing_is_served_with_a_warning(server: Server, stream: bool) -> None:
    answer = ask(server, edit(tokens={"text": "no such text"}), CHAT, stream=stream)
    assert answer.status_code == 200
    assert f"{FIRST}.tokens matches no token of this request" in answer.text


def test_steering_given_twice_or_malformed_as_text(server: Server) -> None:
    texts = ["", "{", "[1", "nul", "\ud800", "[" * 100_000, 3, ["{}"], json.dumps(edit()) + "x"]
    for stream in (False, True):
        for text in texts:
            found = ask(server, None, vllm_xargs={"steering": text}, stream=stream)
            assert found.status_code == 400, found.text
        error(ask(server, edit(), vllm_xargs={"steering": "{}"}, stream=stream), "vllm_xargs.steering")
        error(ask(server, None, vllm_xargs={"steering": json.dumps(edit(scale=NAN))}, stream=stream), f"{FIRST}.scale")


def test_nothing_that_the_server_trusts_can_be_forged(server: Server) -> None:
    """Neither a ticket nor what the engine reads: these kill the engine where they are believed."""
    plan = server.post("/v1/steering/resolve", {"steering": edit()}).json()["plan"]
    selection = {"prompt_length": 5, "runs": [[0, 5, 1]], "generated": 1, "rules": {}}
    wire = {"plan": plan, "edits": plan, "key": "k", "selection": selection, "decides": False}
    forged: list[dict[str, Any]] = [
        {"steering": "steersman-ticket:abc"},
        {"steering": "0" * 32},
        {"steersman": "x"},
        {"steersman": 1},
        {"steersman": []},
        {"steersman": json.dumps(wire)},
        {"steersman": "x", "steering": json.dumps(edit())},
    ]
    turns = [{"role": "user", "content": "hi"}]
    for extra in forged:
        for path in (COMPLETIONS, CHAT, RESPONSES):
            key = "steersman" if "steersman" in extra else "steering"
            error(ask(server, None, path, vllm_xargs=extra), f"vllm_xargs.{key}")
        for path, body in (
            ("/v1/messages", {"messages": turns, "max_tokens": 2}),
            ("/v1/chat/completions/batch", {"messages": [turns], "max_tokens": 2}),
            ("/invocations", {"prompt": PROMPT, "max_tokens": 2}),
        ):
            answer = server.post(path, {"model": "tiny", **body, "vllm_xargs": extra})
            error(answer, "vllm_xargs.steering" if "steering" in extra else "vllm_xargs.steersman")
    whole = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "steering": None}
    for extra in ({"steersman": wire}, {"steering": edit()}):  # not a type that vLLM takes here
        assert server.post(COMPLETIONS, {**whole, "vllm_xargs": extra}).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "hi"}]], "max_tokens": 2}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [1]}),
        ("/invocations", {"prompt": "hi", "max_tokens": 2}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
        ("/v1/audio/transcriptions", {}),
        ("/no/such/route", {}),
    ],
)
def test_routes_that_do_not_steer_say_so(server: Server, path: str, body: dict[str, Any]) -> None:
    for steering in (edit(), {}, "calm", False):
        error(server.post(path, {"model": "tiny", **body, "steering": steering}), "steering")
    escaped = json.dumps({"model": "tiny", **body, "steering": edit()}).replace("steering", "\\u0073teering")
    error(server.http.post(path, content=escaped, headers={"content-type": "application/json"}), "steering")
    assert server.post(path, {"model": "tiny", **body, "steering": None}).status_code != 500


def test_what_vllm_runs_in_another_way(server: Server) -> None:
    error(ask(server, edit(), use_beam_search=True, n=2), "steering")
    error(ask(server, edit(), CHAT, use_beam_search=True, n=2), "steering")
    error(ask(server, edit(), RESPONSES, background=True, store=True), "steering")
    buffer = io.BytesIO()
    torch.save(torch.randn(5, D), buffer)
    embeds = base64.b64encode(buffer.getvalue()).decode()
    assert ask(server, None, prompt=None, prompt_embeds=embeds).status_code == 200
    for stream in (False, True):
        error(ask(server, edit(), prompt=None, prompt_embeds=embeds, stream=stream), "steering")


def test_what_vllm_refuses_is_vllms_to_say(server: Server) -> None:
    for body in (
        {"model": "another"},
        {"temperature": -1},
        {"max_tokens": 10_000},
        {"prompt": "word " * 1000},
        {"n": 0},
    ):
        for stream in (False, True):
            answer = ask(server, edit(), stream=stream, **body)
            assert 400 <= answer.status_code < 500, (body, answer.text)
            assert "error" in answer.json()


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize", "/v1/steering/assets"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes(server: Server, path: str, chunked: bool) -> None:
    start, piece, end = b'{"steering":"', b"x" * 1_000_000, b'"}'

    def pieces() -> Iterator[bytes]:
        yield start
        yield from [piece] * 100
        yield end

    content = pieces() if chunked else start + piece * 100 + end
    answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
    error(answer, "body", 413)


@pytest.mark.parametrize("depth", [150, 300, 900, 5_000, 500_000])
@pytest.mark.parametrize("opening", ["[", '{"a":', '{"exclude":'])
def test_deep_nesting(server: Server, depth: int, opening: str) -> None:
    close = "]" if opening == "[" else "}"
    deep = opening * depth + "1" + close * depth
    for text in (
        deep,
        f'{{"interventions":[{{"op":"add","vector":"v","tokens":{deep}}}]}}',
    ):
        body = f'{{"model":"tiny","prompt":[1],"max_tokens":1,"steering":{text}}}'
        for path in (COMPLETIONS, "/v1/steering/resolve"):
            answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
            error(answer, None)


def test_selectors_nested_as_deeply_as_they_may_be(server: Server) -> None:
    tokens: Any = {"last": 2}
    for _ in range(60):
        tokens = {"prompt": True, "exclude": tokens}
    answer = ask(server, edit(tokens=tokens))
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["interventions"][0]["tokens"] == 2


def test_numbers_at_their_bounds_are_served(server: Server) -> None:
    """Nothing is said of what the model makes of them, but that the answer is JSON and that others do not notice."""
    largest = {"inline": {"shape": [D], "data": data(D, fill=9e17)}}
    smallest = {"inline": {"shape": [D], "data": data(D, fill=1e-38)}}
    for vector_ in (largest, smallest):
        for op in (
            {"op": "add", "scale": 1e6},
            {"op": "add", "scale": -1e6, "relative": "norm", "preserve_norm": True},
            {"op": "multiply", "factor": 1e6},
            {"op": "clamp", "value": -1e6},
            {"op": "ablate", "strength": 1e6},
        ):
            steering = {"interventions": [{**op, "vector": vector_, "layers": "all"}], "report": "layers"}
            answer = ask(server, {**steering, "probes": [{"vector": INLINE, "layers": [3]}]})
            assert answer.status_code in (200, 400), answer.text
            strict(answer.text)


def test_a_default_profile_that_breaks(server: Server) -> None:
    """It is said to everybody whom it concerns, and to nobody else."""
    broken = {**vector(server), "name": "short-lived"}
    assert server.post("/v1/steering/assets", broken).status_code == 201
    default = {"interventions": [{"op": "add", "vector": "short-lived"}]}
    assert server.http.put("/v1/steering/default", json=default).status_code == 200
    try:
        assert server.http.delete("/v1/steering/assets/short-lived").status_code == 409
        for version in (server.store / "short-lived").iterdir():
            for file in version.iterdir():
                file.unlink()
            version.rmdir()
        (server.store / "short-lived").rmdir()
        error(ask(server, None), "default.interventions[0].vector", 404)
        error(ask(server, edit()), "default.interventions[0].vector", 404)
        answer = ask(server, {**edit(), "default": False})
        assert answer.json()["steering"]["interventions"][0]["tokens"] == 6
    finally:
        assert server.http.delete("/v1/steering/default").status_code == 204


# -- anything ---------------------------------------------------------------------------------------


def test_the_valid_object_is_served(server: Server) -> None:
    answer = ask(server, VALID)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["steering"]["interventions"]) == 8


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_of_a_valid_object(server: Server, seed: int) -> None:
    chance, served = random.Random(seed), 0
    for i in range(100):
        steering = mutated(chance)
        path = chance.choice([COMPLETIONS, COMPLETIONS, CHAT, RESPONSES])
        stream = chance.random() < 0.2
        try:
            answer = ask(server, steering, path, stream=stream)
            if answer.status_code == 200:
                served += 1
                assert "steering" in answer.text if stream else "plan" in strict(answer.text)["steering"]
            else:
                found = error(answer, None, answer.status_code)
                assert 400 <= answer.status_code < 500
                assert str(found["param"]).startswith("steering"), found
        except AssertionError as failed:
            raise AssertionError(f"seed {seed}, change {i}: {json.dumps(steering)[:3000]}\n{failed}") from None
    assert 5 < served < 95
