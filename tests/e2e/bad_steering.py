"""Steering objects that are wrong, each with the field that is; and random changes of one that is right."""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
from typing import Any

import httpx
import torch

from tests.e2e.server import Server

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
    "calm": {"kind": "profile", "steering": {"interventions": [{"op": "add", "vector": "v"}]}},
}


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
    # features
    ("a dictionary that is not there", {"interventions": [{"op": "feature", "dictionary": "nope", "index": 0,
     "mode": "ablate"}]}, f"{FIRST}.dictionary", 404),
    ("a feature without a value", {"interventions": [{"op": "feature", "dictionary": "nope", "index": 0}]}, FIRST, 400),
    ("a probe of two things", {"probes": [{"vector": INLINE, "dictionary": "nope", "index": 0}]},
     "steering.probes[0]", 400),
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
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, NAN, INFINITY,
    "", "v", "all", "calm", "v@", "1-2", "generated", "\x00", "é🚢", "\ud800", "a" * 5000,
    [], [[]], [0, 0], [1, "a"], [None], {}, {"inline": {}}, {"a": {"b": []}}, {"exclude": "all"}, INLINE,
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
