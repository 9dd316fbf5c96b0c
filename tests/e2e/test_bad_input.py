"""Whatever a client sends is answered by a 4xx that names the place, and changes nothing for anybody else."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.server import Server, serve
from tests.models.tiny import tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
D, LAYERS, HEADS, WIDTH = 64, 4, 4, 160  # the tiny llama's
PROMPT = [1, 40, 51, 62, 73]
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
FIRST = "steering.interventions[0]"


def data(*shape: int, dtype: str = "<f4", fill: float | None = None) -> str:
    count = torch.Size(shape).numel()
    chance = random.Random(count)
    values = [chance.gauss(0, 1) if fill is None else fill for _ in range(count)]
    return base64.b64encode(struct.pack(f"<{count}{dtype[1]}", *values)).decode()


INLINE = {"inline": {"shape": [D], "data": data(D)}}
ADD = {"op": "add", "vector": INLINE, "layers": [1, 2], "scale": 2.0}
GATE = {"vector": INLINE, "layer": 1, "above": 0.1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enable-prompt-embeds"]
    with serve(tiny_model("llama"), tmp_path_factory.mktemp("bad"), options) as server:
        for name, changes in ASSETS.items():
            whole = {**vector(server), "name": name, **changes}
            if whole["kind"] == "profile":
                whole = {k: v for k, v in whole.items() if k not in ("layers", "tensors")}
            answer = server.post("/v1/steering/assets", whole)
            assert answer.status_code == 201, answer.text
        yield server


def vector(server: Server) -> dict[str, Any]:
    model = server.http.get("/v1/steering/model").json()
    about = {"id": model["model"], "n_layers": LAYERS, "d_model": D}
    tensors = {"vectors": {"shape": [2, D], "data": data(2, D)}}
    return {"kind": "vector", "layers": [1, 3], "model": about, "tensors": tensors}


WIDE = {"tensors": {"vectors": {"shape": [2, WIDTH], "data": data(2, WIDTH)}}, "site": "mlp_post"}
ASSETS: dict[str, dict[str, Any]] = {
    "v": {},
    "other-size": {"model": {"id": "tiny", "n_layers": 9, "d_model": D}},
    "other-width": {
        "model": {"id": "tiny", "n_layers": LAYERS, "d_model": 8},
        "tensors": {"vectors": {"shape": [2, 8], "data": data(2, 8)}},
    },
    "other-name": {"model": {"id": "org/another", "n_layers": LAYERS, "d_model": D}},
    "wide": WIDE,
    "calm": {"kind": "profile", "steering": {"interventions": [{"op": "add", "vector": "v"}]}, **{"tensors": {}}},
}


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Around every test: an unsteered request is answered alike to the bit, and no request is left waiting."""
    before = plain(server)
    yield
    assert plain(server) == before
    assert server.http.get("/health").status_code == 200


def plain(server: Server) -> Any:
    answer = server.complete(PROMPT, max_tokens=4, logprobs=5, return_token_ids=True)
    assert "steering" not in answer
    return answer["choices"]


def error(answer: httpx.Response, param: str | None, status: int = 400) -> dict[str, Any]:
    """Our error body."""
    assert answer.status_code == status, answer.text[:2000]
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}, found
    assert found["type"] == "invalid_request_error"
    assert isinstance(found["code"], str), found
    assert found["message"]
    if param is not None:
        assert found["param"] == param, found
    return found


def ask(server: Server, steering: Any, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
    turns = [{"role": "user", "content": "Hello there"}]
    about = {COMPLETIONS: {"prompt": PROMPT, "max_tokens": 2}, CHAT: {"messages": turns, "max_tokens": 2}}
    asked = about.get(path, {"input": "Hello there", "max_output_tokens": 2})
    whole = {"model": "tiny", "temperature": 0, **asked, "steering": steering, **body}
    return server.http.post(path, content=json.dumps(whole), headers={"content-type": "application/json"})


def edit(**changes: Any) -> dict[str, Any]:
    """A steering object with one intervention; a change to ... takes a field away."""
    return {"interventions": [{k: v for k, v in {**ADD, **changes}.items() if v is not ...}]}


def inline(**changes: Any) -> dict[str, Any]:
    return edit(vector={"inline": {k: v for k, v in {**INLINE["inline"], **changes}.items() if v is not ...}})


NAN, INFINITY = float("nan"), float("inf")
BAD: list[tuple[str, Any, str, int]] = [
    # what it names
    ("unknown asset", edit(vector="gone"), f"{FIRST}.vector", 404),
    ("unknown version", edit(vector="v@ffffffffffff"), f"{FIRST}.vector", 404),
    ("a path", edit(vector="../../v"), f"{FIRST}.vector", 404),
    ("other layers", edit(vector="other-size"), f"{FIRST}.vector", 400),
    ("other d_model", edit(vector="other-width"), f"{FIRST}.vector", 400),
    ("other name", edit(vector="other-name"), f"{FIRST}.vector", 400),
    ("a profile as a vector", edit(vector="calm"), f"{FIRST}.vector", 400),
    ("a vector as a profile", {"profile": "v"}, "steering.profile", 400),
    ("unknown profile", {"profile": "gone"}, "steering.profile", 404),
    ("wrong width", edit(vector="wide", site="resid_post", layers=[1]), f"{FIRST}.vector", 400),
    ("layer out of range", edit(layers=[1, 4]), f"{FIRST}.layers", 400),
    ("layer far out", edit(layers=2**31 - 1), f"{FIRST}.layers", 400),
    ("negative layer", edit(layers=-1), f"{FIRST}.layers", 400),
    ("a layer that the asset lacks", edit(vector="v", layers=[1, 2]), f"{FIRST}.layers", 400),
    ("a backward span", edit(layers="3-1"), f"{FIRST}.layers", 400),
    ("a span out of range", edit(layers="0-999999"), f"{FIRST}.layers", 400),
    ("a layer twice", edit(layers=[1, 1]), f"{FIRST}.layers", 400),
    ("no layers", edit(layers=...), f"{FIRST}.layers", 400),
    ("unknown site", edit(site="resid"), f"{FIRST}.site", 400),
    ("unknown op", edit(op="sing"), f"{FIRST}.op", 400),
    ("no op", edit(op=...), f"{FIRST}.op", 400),
    ("no vector", edit(vector=...), f"{FIRST}.vector", 400),
    # numbers
    ("NaN", edit(scale=NAN), f"{FIRST}.scale", 400),
    ("infinity", edit(scale=-INFINITY), f"{FIRST}.scale", 400),
    ("1e30", edit(scale=1e30), f"{FIRST}.scale", 400),
    ("a number as text", edit(scale="2"), f"{FIRST}.scale", 400),
    ("a truth value", edit(scale=True), f"{FIRST}.scale", 400),
    ("a huge integer", edit(scale=10**400), f"{FIRST}.scale", 400),
    ("NaN in a gate", edit(when={**GATE, "layer": 0, "above": NAN}), f"{FIRST}.when.above", 400),
    # unknown fields
    ("at the top", {"intervention": []}, "steering.intervention", 400),
    ("in an intervention", edit(colour=1), f"{FIRST}.colour", 400),
    ("in an inline vector", inline(colour=1), f"{FIRST}.vector.inline.colour", 400),
    ("beside inline", edit(vector={**INLINE, "colour": 1}), f"{FIRST}.vector.colour", 400),
    ("in tokens", edit(tokens={"colour": 1}), f"{FIRST}.tokens.colour", 400),
    ("in exclude", edit(tokens={"exclude": {"exclude": {"colour": 1}}}), f"{FIRST}.tokens.exclude.exclude.colour", 400),
    ("in a gate", edit(when={**GATE, "colour": 1}), f"{FIRST}.when.colour", 400),
    ("in a gate's vector", edit(when={**GATE, "vector": {"inline": {**INLINE["inline"], "colour": 1}}}),
     f"{FIRST}.when.vector.inline.colour", 400),
    ("in a probe", {"probes": [{"vector": INLINE, "layers": [1], "colour": 1}]}, "steering.probes[0].colour", 400),
    # inline payloads
    ("too short", inline(shape=[D + 1]), f"{FIRST}.vector.inline.data", 400),
    ("another dtype", inline(dtype="float16"), f"{FIRST}.vector.inline.data", 400),
    ("no such dtype", inline(dtype="int8"), f"{FIRST}.vector.inline.dtype", 400),
    ("no base64", inline(data="%%%"), f"{FIRST}.vector.inline.data", 400),
    ("not ASCII", inline(data="é" * 8), f"{FIRST}.vector.inline.data", 400),
    ("no data", inline(data=...), f"{FIRST}.vector.inline.data", 400),
    ("a huge shape", inline(shape=[2**31 - 1, 2**31 - 1]), f"{FIRST}.vector.inline.shape", 400),
    ("a shape beyond integers", inline(shape=[2**70]), f"{FIRST}.vector.inline.shape[0]", 400),
    ("a shape of nothing", inline(shape=[0, D], data=""), f"{FIRST}.vector.inline.shape", 400),
    ("no shape", inline(shape=[]), f"{FIRST}.vector.inline.shape", 400),
    ("four dimensions", inline(shape=[1, 1, 1, D]), f"{FIRST}.vector.inline.shape", 400),
    ("wrong width inline", inline(shape=[8], data=data(8)), f"{FIRST}.vector", 400),
    ("NaN inside", inline(data=data(D, fill=NAN)), f"{FIRST}.vector.inline.data", 400),
    ("rows without layers", inline(shape=[2, D], data=data(2, D)), f"{FIRST}.vector.inline.layers", 400),
    ("a direction of nothing", {"interventions": [{"op": "ablate", "vector": {"inline": {"shape": [D], "data":
     data(D, fill=0.0)}}, "layers": [1]}]}, f"{FIRST}.vector", 400),
    # wrong types
    ("a list", [], "steering", 400),
    ("a string", "calm", "steering", 400),
    ("a number", 3, "steering", 400),
    ("a truth", True, "steering", 400),
    ("interventions of text", {"interventions": "add"}, "steering.interventions", 400),
    ("an intervention of text", {"interventions": ["add"]}, f"{FIRST}", 400),
    ("tokens of a number", edit(tokens=3), f"{FIRST}.tokens", 400),
    ("tokens of an unknown word", edit(tokens="everything"), f"{FIRST}.tokens", 400),
    ("report of an unknown word", {"report": "all"}, "steering.report", 400),
    ("default of text", {"default": "no"}, "steering.default", 400),
    # too many
    ("two thousand", {"interventions": [ADD] * 2000}, "steering.interventions", 400),
    ("65", {"interventions": [ADD] * 65}, "steering.interventions", 400),
    ("65 probes", {"probes": [{"vector": INLINE, "layers": [1]}] * 65}, "steering.probes", 400),
    # gates
    ("a gate after its edit", edit(when={**GATE, "layer": 3}), f"{FIRST}.when.layer", 400),
    ("a gate at its edit", edit(when=GATE), f"{FIRST}.when.layer", 400),
    ("a gate without bounds", edit(when={"vector": INLINE, "layer": 0}), f"{FIRST}.when", 400),
    ("a gate out of range", edit(when={**GATE, "layer": 99}), f"{FIRST}.when.layer", 400),
    # units that do not exist
    ("a head too far", {"interventions": [{"op": "heads", "heads": [[1, HEADS]], "factor": 0}]}, f"{FIRST}.heads", 400),
    ("a neuron too far", {"interventions": [{"op": "neurons", "neurons": {"inline": [[1, WIDTH]]}, "value": 1}]},
     f"{FIRST}.neurons", 400),
    # selectors that do not go with the request
    ("roles without messages", edit(tokens={"roles": ["user"]}), f"{FIRST}.tokens.roles", 400),
    ("a backward range", edit(tokens={"ranges": [[4, 1]]}), f"{FIRST}.tokens.ranges[0]", 400),
    # JSON that pydantic or the transport might stumble over
    ("a lone surrogate", edit(vector="\ud800"), "steering", 400),
    ("a NUL", edit(vector="v\x00"), f"{FIRST}.vector", 404),
    ("a long name", edit(vector="v" * 100_000), f"{FIRST}.vector", 404),
]  # fmt: skip


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
        {"prompt": [10**9]},
        {"prompt": "word " * 1000},
        {"n": 0},
    ):
        for stream in (False, True):
            answer = ask(server, edit(), stream=stream, **body)
            assert 400 <= answer.status_code < 500, (body, answer.text)
            assert "error" in answer.json()


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize", "/v1/steering/assets", "/v1/steering/resolve"])
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
    assert answer.json()["steering"]["interventions"][0]["tokens"] == 3


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

VALID: dict[str, Any] = {
    "profile": "calm",
    "default": True,
    "interventions": [
        {**ADD, "tokens": {"prompt": True, "exclude": {"last": 1}, "positions": [1, -1], "ranges": [[0, 2]]}},
        {**ADD, "relative": "norm", "preserve_norm": True, "layers": "2-3", "when": GATE},
        {"op": "ablate", "vector": "v", "strength": 0.5, "tokens": "generated"},
        {"op": "clamp", "vector": INLINE, "min": -1, "max": 2, "layers": 2, "site": "mlp_out"},
        {"op": "rotate", "vector": "v", "toward": INLINE, "degrees": 30, "layers": [1]},
        {"op": "neurons", "neurons": {"inline": [[1, 3], [2, 7]]}, "mode": "add", "value": 1.5},
        {"op": "heads", "heads": [[1, 0], [3, 2]], "factor": 0.5},
    ],
    "probes": [{"vector": INLINE, "layers": [3]}, {"vector": "v"}],
    "report": "layers",
}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, NAN, INFINITY, "", "v", "all",
    "calm", "v@", "1-2", "generated", "\x00", "é🚢", "\ud800", "a" * 5000, [], [[]], [0, 0], [1, "a"], {}, {"inline": {}},
    {"a": {"b": []}}, {"exclude": "all"}, INLINE, [None],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, each in inner for p in places(each, (*path, key)))]


def mutated(chance: random.Random) -> Any:
    """The valid object with one to three changes: something else, nothing, twice, under another name, or more of it."""
    whole = copy.deepcopy(VALID)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        path = chance.choice(places(whole))
        if not path:
            continue
        parent, key = whole, path[-1]
        for step in path[:-1]:
            parent = parent[step]
        match chance.randrange(6):
            case 0 | 1:
                parent[key] = copy.deepcopy(chance.choice(ODD))
            case 2:
                del parent[key]
            case 3 if isinstance(parent, list):
                parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
            case 3:
                parent[chance.choice(["colour", "op", "layers", "scale", "inline", "tokens", str(key) * 2])] = (
                    parent.pop(key)
                )
            case 4 if isinstance(parent[key], int | float):
                parent[key] = parent[key] * chance.choice([-1, 1e3, 1e9, 0.1])
            case 4 if isinstance(parent[key], list):
                parent[key] = parent[key] * chance.choice([2, 40])
            case _:
                parent[key] = copy.deepcopy(whole if chance.random() < 0.1 else VALID[chance.choice(list(VALID))])
    return whole


def strict(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


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
