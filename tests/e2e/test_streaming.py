"""Streams, chat, structured output and logprobs of steered requests, over all of OpenAI's routes."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.e2e.server import Server, serve
from tests.e2e.steered import EVERY, WIDE, agree, ask, events, random_assets, read
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.oracle.hf import Oracle, PromptContext

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
USER, END = 5, 3  # ids of the chat template's marks around a user's message
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ADD = {"op": "add", "vector": "resid_post", "scale": 1.5, "layers": [1, 2]}
STEERING = {
    "interventions": [{**ADD, "tokens": {"generated": True, "last": 1}}, {**ADD, "layers": [3], "tokens": "prompt"}],
    "probes": [{"vector": "resid_post", "layers": [3]}],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--no-enable-prefix-caching"]  # so that a request twice has the same report twice
    with serve(path, tmp_path_factory.mktemp("streams"), options, forked=True) as server:
        oracle = Oracle(path, {})
        random_assets(oracle, server)
        yield server, oracle


# -- streams ----------------------------------------------------------------------------------------

SAMPLED = {"temperature": 1.0, "seed": 3}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "The capital of France", "max_tokens": 12, "ignore_eos": True, **SAMPLED},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 12, "ignore_eos": True, **SAMPLED},
    "/v1/responses": {"input": "What is the capital?", "max_output_tokens": 12, "temperature": 0.0},
}
CASES = [(r, n, usage) for r in ROUTES for n in (1, 2) for usage in (False, True) if r != "/v1/responses"]


@pytest.mark.parametrize(("route", "n", "usage"), [*CASES, ("/v1/responses", 1, False)])
def test_a_stream_says_what_a_response_says(
    served: tuple[Server, Oracle], route: str, n: int, usage: bool
) -> None:  # fmt: skip
    server, _ = served
    body = {"model": server.model, "steering": STEERING, **ROUTES[route]}
    options: dict[str, Any] = {"stream": True}
    if route != "/v1/responses":
        body["n"] = n
        options["stream_options"] = {"include_usage": usage}
    whole = server.post(route, body)
    assert whole.status_code == 200, whole.text
    streamed = stream(server, route, {**body, **options})
    assert said(route, streamed) == texts(route, whole.json(), n), "the stream has another text"
    assert [i for i, e in enumerate(streamed) if "steering" in e] == [len(streamed) - 1], "events with a report"
    same_report(streamed[-1]["steering"], whole.json()["steering"])
    assert ("usage" in streamed[-1] and not streamed[-1]["choices"]) == usage or route == "/v1/responses"
    wanted = 12 * n
    assert streamed[-1]["steering"]["interventions"][0]["tokens"] == wanted, "edited tokens"


def test_a_stream_of_the_default_profile(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    body = {"model": server.model, **ROUTES["/v1/completions"], "stream": True}
    assert "steering" not in stream(server, "/v1/completions", body)[-1]
    assert server.http.put("/v1/steering/default", json={"interventions": [ADD]}).status_code == 200
    try:
        found = stream(server, "/v1/completions", body)
        assert found[-1]["steering"]["interventions"][0]["tokens"] > 12
        plain = stream(server, "/v1/completions", {**body, "steering": {"default": False}})
        assert plain[-1]["steering"]["interventions"] == []
    finally:
        assert server.http.delete("/v1/steering/default").status_code == 204


def test_how_much_is_reported(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    body = {"model": server.model, **ROUTES["/v1/completions"], "stream": True}
    for detail in ("none", "layers"):
        asked = {**body, "steering": {**STEERING, "report": detail}}
        found = stream(server, "/v1/completions", asked)[-1]["steering"]
        if detail == "none":
            assert set(found) == {"plan"}
        else:
            assert set(found["interventions"][0]["by_layer"]) == {"1", "2"}


def stream(server: Server, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.http.stream("POST", route, json=body) as response:
        assert response.status_code == 200, response.read()
        return events(response.iter_lines())


def said(route: str, streamed: list[dict[str, Any]]) -> list[str]:
    """The text of each choice."""
    if route == "/v1/responses":
        return ["".join(e["delta"] for e in streamed if e["type"] == "response.output_text.delta")]
    out: dict[int, str] = {}
    for event in streamed:
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            out[choice["index"]] = out.get(choice["index"], "") + text
    return [out[i] for i in sorted(out)]


def texts(route: str, body: dict[str, Any], n: int) -> list[str]:
    if route == "/v1/responses":
        return ["".join(part["text"] for item in body["output"] for part in item.get("content", ()))]
    choices = sorted(body["choices"], key=lambda c: c["index"])
    assert len(choices) == n
    return [c["text"] if "text" in c else c["message"]["content"] for c in choices]


def same_report(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The same, up to what is averaged over a sample of the passes."""
    assert a["plan"] == b["plan"]
    for one, other in zip(a["interventions"], b["interventions"], strict=True):
        assert math.isclose(one.pop("mean_relative_norm"), other.pop("mean_relative_norm"), rel_tol=0.5)
        assert one == other
    for one, other in zip(a["probes"], b["probes"], strict=True):
        assert one["layers"].keys() == other["layers"].keys()
        for layer, stats in one["layers"].items():
            assert stats == pytest.approx(other["layers"][layer], abs=1e-4), f"probe {one['asset']}, layer {layer}"


# -- how a response ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["response", "stream"])
@pytest.mark.parametrize("stop", ["length", "token", "text"])
def test_edited_tokens_are_those_of_the_response(served: tuple[Server, Oracle], stop: str, streams: bool) -> None:
    """Each fed-in token of the response counts, and what the engine may have run beyond it does not."""
    server, _ = served
    prompt, steering = [1, 40, 51, 62], {"interventions": [{**ADD, "tokens": "generated"}]}
    full = ask(server, prompt, steering, 40, whole=False)
    pieces = [detokenized(server, [token]) for token in full.new]
    at = next(i for i in range(5, 40) if pieces[i].isalpha() and pieces[i] not in "".join(pieces[:i]))
    ends: dict[str, dict[str, Any]] = {
        "length": {"max_tokens": at + 1},
        "token": {"stop_token_ids": [full.new[at]]},
        "text": {"stop": [pieces[at]]},
    }
    body = {"max_tokens": 200, **ends[stop], **EVERY}
    if streams:
        asked = {"model": server.model, "prompt": prompt, "temperature": 0, "ignore_eos": True, "steering": steering}
        got = stream(server, "/v1/completions", {**asked, "stream": True, **body})
        new = [t for e in got for c in e["choices"] for t in c["token_ids"] or ()]
        report = got[-1]["steering"]
    else:
        answer = read(prompt, server.complete(prompt, steering, **body))
        new, report = answer.new, answer.body["steering"]
    assert new == full.new[: at + 1], f"{stop}: other tokens"
    assert report["interventions"][0]["tokens"] == at, f"{stop}: edited tokens"


def detokenized(server: Server, tokens: list[int]) -> str:
    return str(server.post("/detokenize", {"model": server.model, "tokens": tokens}).json()["prompt"])


# -- chat -------------------------------------------------------------------------------------------


def test_logprobs_of_a_chat(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    body = {
        "model": server.model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "ignore_eos": True,
        "logprobs": True, "top_logprobs": VOCAB_SIZE, "prompt_logprobs": VOCAB_SIZE,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    for tokens in ("all", {"generated": True, "last": 1}, {"roles": ["user"]}):
        steering = {"interventions": [{**ADD, "tokens": tokens}]}
        response = server.post("/v1/chat/completions", {**body, "steering": steering})
        assert response.status_code == 200, response.text
        found = response.json()
        prompt = found["prompt_token_ids"]
        inside = list(range(prompt.index(USER) + 1, prompt.index(END)))
        choice = found["choices"][0]
        ids = prompt + choice["token_ids"]
        wanted = oracle.logprobs(ids, steering, len(prompt), PromptContext(roles={"user": inside}))
        got = torch.full((len(ids) - 1, VOCAB_SIZE), float("nan"))
        for position, entries in enumerate(found["prompt_logprobs"][1:]):
            for token, entry in entries.items():
                got[position, int(token)] = entry["logprob"]
        for position, step in enumerate(choice["logprobs"]["content"], len(prompt) - 1):
            for entry in step["top_logprobs"]:
                got[position, int(entry["token"].removeprefix("token_id:"))] = entry["logprob"]
        error = (got - wanted[:-1]).abs().max().item()
        assert error < 1e-3, f"{tokens}: logprobs differ from the oracle's by {error:.3g}"
        count = {"all": len(ids) - 1, "{'roles': ['user']}": len(inside)}.get(str(tokens), 6)
        assert found["steering"]["interventions"][0]["tokens"] == count, f"{tokens}: edited tokens"


@pytest.mark.parametrize("streams", [False, True], ids=["response", "stream"])
def test_structured_output(served: tuple[Server, Oracle], streams: bool) -> None:
    """The grammar allows two answers; the edit says which."""
    server, oracle = served
    head = oracle.model.get_output_embeddings().weight.detach()  # type: ignore[operator]
    for letter in ("x", "q"):
        token = server.post(
            "/tokenize", {"model": server.model, "prompt": letter, "add_special_tokens": False}
        ).json()["tokens"]  # fmt: skip
        assert len(token) == 1
        row = head[token[0]].clone()
        inline = {"shape": list(row.shape), "data": base64.b64encode(row.numpy().tobytes()).decode()}
        steering = {"interventions": [{"op": "add", "vector": {"inline": inline}, "scale": 20.0, "layers": 3}]}
        body = {
            "model": server.model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "steering": steering,
            "structured_outputs": {"choice": ["x", "q"]}, "stream": streams,
        }  # fmt: skip
        if streams:
            got = stream(server, "/v1/chat/completions", body)
            text, report = said("/v1/chat/completions", got)[0], got[-1]["steering"]
        else:
            found = server.post("/v1/chat/completions", body).json()
            text, report = found["choices"][0]["message"]["content"], found["steering"]
        assert text == letter
        assert report["interventions"][0]["tokens"] > 5


def test_structured_json(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {**schema, "additionalProperties": False}},
    }
    body = {
        "model": server.model, "messages": MESSAGES, "max_tokens": 60, "temperature": 0,
        "steering": STEERING, "response_format": shape,
    }  # fmt: skip
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["choices"][0]["message"]["content"].lstrip().startswith("{")
    assert found["steering"]["interventions"][0]["tokens"] == found["usage"]["completion_tokens"]
    assert found["steering"]["interventions"][1]["tokens"] == found["usage"]["prompt_tokens"]


def test_every_answer_is_the_oracles(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    agree(ask(server, [1, 9, 30, 41, 77], STEERING, 8), oracle, STEERING, "completion")
