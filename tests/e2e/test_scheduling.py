"""When a token is computed, in which chunk, how often and beside whom, changes neither its edit nor the report.

The server takes 16 tokens a step and has 288 tokens of KV cache, so that prompts are cut up and requests preempted.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from steersman.clients.sdk import Steersman
from tests.e2e import captured
from tests.e2e.server import Server, serve
from tests.e2e.steered import (
    DEVELOPER,
    EVERY,
    Answer,
    Asked,
    agree,
    ask,
    distance,
    matters,
    metric,
    random_assets,
    read,
    together,
    upload,
)
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
CHUNK = 16
PLANS = 6
OPTIONS = [
    "--dtype", "float32", "--max-logprobs", "-1", "--max-model-len", "256",
    "--block-size", "32", "--num-gpu-blocks-override", "10",
    "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "8", "--steering-max-plans", str(PLANS),
]  # fmt: skip
ADD = {"op": "add", "vector": "resid_post", "scale": 1.5, "layers": [1, 2]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    folder = tmp_path_factory.mktemp("small")
    with serve(path, folder, OPTIONS, env={**DEVELOPER, "STEERSMAN_CAPTURES": str(folder / "captures")}) as server:
        oracle = Oracle(path, {})
        random_assets(oracle, server)
        yield server, oracle


def prompt_of(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [1, *(chance.randrange(8, 512) for _ in range(length - 1))]


def gate(oracle: Oracle, prompt: list[int], over: str, opens: bool) -> dict[str, Any]:
    """A gate that is open or closed as wanted; with ``token`` and ``hold`` for half of the prompt's tokens."""
    stream = oracle.capture(prompt, [(0, "resid_post")], prompt_len=len(prompt))[0, "resid_post"]
    v = oracle.assets["resid_post"].layers[0]
    seen = stream @ (v / v.norm())
    middle = {"prompt_mean": seen.mean(), "last_prompt": seen[-1], "token": seen.median(), "hold": seen.max()}[over]
    found = {"vector": "resid_post", "layer": 0, "measure": "projection", "above": float(middle) - 0.02}
    if not opens:
        found["above"] += 0.04
    return {**found, "hold": True} if over == "hold" else {**found, "over": over}


# -- chunks -----------------------------------------------------------------------------------------

SELECTORS: list[tuple[Any, int]] = [
    ("all", 68), ("prompt", 61), ("generated", 7), ("last_prompt", 1), ({"generated": True, "last": 1}, 8),
    ({"positions": [15, 16, 31, 32, 47, 48, 60, 61, 63]}, 9), ({"positions": [-1, -13, -14]}, 3),
    ({"ranges": [[14, 18], [46, 50], [59, 64]]}, 13), ({"last": 14}, 14), ({"exclude": {"ranges": [[16, 32]]}}, 52),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "count"), SELECTORS, ids=str)
def test_selectors_across_chunks(served: tuple[Server, Oracle], tokens: Any, count: int) -> None:
    server, oracle = served
    steering = {"interventions": [{**ADD, "tokens": tokens}]}
    answer = ask(server, prompt_of(61, 1), steering, 8)
    agree(answer, oracle, steering, str(tokens))
    matters(oracle, answer, steering, str(tokens))
    assert answer.edited == [count], f"{tokens}: edited tokens"


@pytest.mark.parametrize("opens", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("over", ["prompt_mean", "last_prompt", "token", "hold"])
@pytest.mark.parametrize("length", [16, 33, 61])
def test_gates_across_chunks(served: tuple[Server, Oracle], over: str, opens: bool, length: int) -> None:
    server, oracle = served
    prompt = prompt_of(length, 2)
    when = gate(oracle, prompt, over, opens)
    steering = {"interventions": [{**ADD, "when": when}]}
    label = f"{over} of {length} tokens"
    answer = ask(server, prompt, steering, 6)
    agree(answer, oracle, steering, label)
    if over in ("prompt_mean", "last_prompt"):
        assert answer.body["steering"]["interventions"][0]["gate"]["open"] == [opens], f"{label}: decision"
        assert answer.edited == [6 if opens else 0], f"{label}: the prompt's last token and what is generated"


# -- preemption -------------------------------------------------------------------------------------


def crowd(oracle: Oracle) -> list[Asked]:
    """Six requests that need twice the KV cache there is."""
    out = []
    for i, tokens in enumerate(["all", "generated", None, "prompt_mean", "hold", "last_prompt"]):
        prompt = prompt_of(50 + i, 10 + i)
        if tokens in ("prompt_mean", "hold", "last_prompt"):
            steering = {"interventions": [{**ADD, "when": gate(oracle, prompt, str(tokens), True)}]}
        else:
            chosen = [{**ADD, "tokens": tokens}, {**ADD, "layers": [3], "tokens": {"ranges": [[40, 70]]}}]
            steering = {"interventions": chosen} if tokens else None
        out.append(Asked(prompt, steering, 45, f"{i}, {tokens or 'unsteered'}"))
    return out


@pytest.mark.parametrize("whole", [False, True], ids=["generated logprobs", "all logprobs"])
def test_preempted_requests(served: tuple[Server, Oracle], whole: bool) -> None:
    server, oracle = served
    asked = crowd(oracle)
    before = metric(server, "vllm:num_preemptions_total")
    answers = together(server, asked, whole=whole)
    assert metric(server, "vllm:num_preemptions_total") > before, "nothing was preempted, so this shows nothing"
    for request, answer in zip(asked, answers, strict=True):
        agree(answer, oracle, request.steering, request.label)
        if request.steering:
            matters(oracle, answer, request.steering, request.label)
    n = [len(a.ids) - 1 for a in answers]
    counts = [a.edited for a in answers if "steering" in a.body]
    wanted = [[n[0], 30], [44, 30], [45], counts[3], [45]]
    assert counts == wanted, "edited tokens, each counted once"
    for request, answer in zip(asked, answers, strict=True):
        alone = ask(server, request.prompt, request.steering, request.new, whole=whole)
        assert alone.new == answer.new, f"{request.label}: other tokens than alone"
        if request.steering:
            assert alone.edited == answer.edited, f"{request.label}: other edited tokens than alone"


# -- captures ---------------------------------------------------------------------------------------


def test_captures_among_requests_that_are_preempted(served: tuple[Server, Oracle]) -> None:
    """Prompts of several chunks, which wait for room, beside requests whose answers stay what they are."""
    server, oracle = served
    asked = crowd(oracle)[:4]
    prompts = [prompt_of(length, 30) for length in (61, 16, 17, 120, 5)]
    steering = {"interventions": [{**ADD, "tokens": {"ranges": [[3, 9], [15, 33]]}}]}
    before = metric(server, "vllm:num_preemptions_total")
    with ThreadPoolExecutor(3) as pool:
        crowded = pool.submit(together, server, asked, whole=False)
        time.sleep(0.3)  # the scheduler is paused
        taken = [pool.submit(captured.capture, server, prompts, steering=s) for s in (None, steering)]
        found, answers = [future.result() for future in taken], crowded.result()
    assert metric(server, "vllm:num_preemptions_total") > before, "nothing was preempted, so this shows nothing"
    for capture, edits in zip(found, (None, steering), strict=True):
        captured.check(oracle, capture, edits, "steered" if edits else "bare")
    for request, answer in zip(asked, answers, strict=True):
        agree(answer, oracle, request.steering, request.label)
    assert not np.array_equal(found[0].rows("resid_post", 3, 0), found[1].rows("resid_post", 3, 0))


def test_a_patched_stream_goes_on_as_its_source(served: tuple[Server, Oracle]) -> None:
    """With all of a prompt's stream replaced at one layer, the model says what it says after the other prompt."""
    server, oracle = served
    source, prompt = prompt_of(37, 40), prompt_of(37, 41)
    with Steersman(server.url) as client:
        kept = client.keep_capture([source], layers=[1])
        steering = {"interventions": [{"op": "patch", "capture": kept["id"]}]}
        answer = ask(server, prompt, steering, 1)
        client.forget_capture(kept["id"])
    wanted = oracle.logprobs(source, None, len(source))
    assert distance(answer.logprobs, wanted) < 1e-3
    assert distance(oracle.logprobs(prompt, None, len(prompt)), wanted) > 0.1
    assert [step["tokens"] for step in answer.body["steering"]["interventions"]] == [len(source)]


def test_features_that_are_active_on_a_text(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    chance = torch.Generator().manual_seed(5)
    encoder = torch.randn(40, 64, generator=chance)
    tensors = {"encoder": encoder, "decoder": encoder, "b_enc": torch.zeros(40), "b_dec": torch.zeros(64)}
    model = {"id": server.http.get("/v1/steering/model").json()["model"], "n_layers": 4, "d_model": 64}
    about = {"name": "sae", "kind": "dictionary", "architecture": "standard", "layer": 2, "model": model}
    upload(server, about, tensors)
    found = server.http.get("/v1/steering/assets/sae/features", params={"active_on": "The ship.", "limit": 5}).json()
    ids = [token["id"] for token in found["tokens"]]
    assert "".join(token["token"] for token in found["tokens"]).endswith("The ship.")
    values = (oracle.capture(ids, [(2, "resid_post")], prompt_len=len(ids))[2, "resid_post"] @ encoder.T).relu()
    for token, row in zip(found["tokens"], values, strict=True):
        strongest = row.topk(5)
        assert [one["index"] for one in token["features"]] == strongest.indices.tolist()
        assert [one["activation"] for one in token["features"]] == pytest.approx(strongest.values.tolist(), rel=1e-3)


# -- several sequences ------------------------------------------------------------------------------


def test_sequences_with_seeds(served: tuple[Server, Oracle]) -> None:
    """Each of n sequences is the one that its seed gives alone.

    All three prompts fit into one step: vLLM 0.32 on the CPU dies of a seeded request whose prompt is cut up.
    """
    server, oracle = served
    prompt = prompt_of(CHUNK // 3, 3)
    steering = {"interventions": [{**ADD, "tokens": {"generated": True, "last": 1}}]}
    body = {"max_tokens": 9, "temperature": 1.0, **EVERY}
    together_ = server.complete(prompt, steering, n=3, seed=11, **body)
    assert together_["steering"]["interventions"][0]["tokens"] == 3 * 9
    for i in range(3):
        one = read(prompt, server.complete(prompt, steering, seed=11 + i, **body))
        three = read(prompt, together_, i)
        assert three.new == one.new, f"sequence {i}: other tokens than with its seed alone"
        assert distance(three.logprobs, one.logprobs) < 1e-5, f"sequence {i}"
        agree(three, oracle, steering, f"sequence {i}")
    assert len({tuple(c["token_ids"]) for c in together_["choices"]}) == 3


def test_prompts_of_one_request(served: tuple[Server, Oracle]) -> None:
    """What is reported of each is in the order of the prompts, of which the first takes longest."""
    server, oracle = served
    prompts = [prompt_of(length, 4) for length in (60, 5, 16)]
    v = oracle.assets["resid_post"].layers[0]
    where = [(0, "resid_post")]
    seen = [float(oracle.capture(p, where, prompt_len=len(p))[where[0]][-1] @ v / v.norm()) for p in prompts]
    above = sum(sorted(seen)[:2]) / 2
    when = {"vector": "resid_post", "layer": 0, "measure": "projection", "above": above, "over": "last_prompt"}
    for order in ([0, 1, 2], [2, 0, 1]):
        chosen = [prompts[i] for i in order]
        steering = {"interventions": [{**ADD, "tokens": {"positions": [-2]}}, {**ADD, "when": when}]}
        body = server.complete(chosen, steering, max_tokens=4, **EVERY)
        for i, prompt in enumerate(chosen):
            agree(read(prompt, body, i), oracle, steering, f"prompt {i} of {order}")
        first, second = body["steering"]["interventions"]
        assert first["tokens"] == 3
        assert second["gate"]["open"] == [seen[i] > above for i in order], f"decisions on the prompts {order}"


# -- clients that go away ---------------------------------------------------------------------------


def leave_stream(server: Server, body: dict[str, Any]) -> bool:
    """Hears two events and goes. False: there is no room yet."""
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return no_room(response)
        for count, _ in enumerate(response.iter_lines()):
            if count == 4:
                return True
    pytest.fail("the stream ended before its reader went")


def leave_response(server: Server, body: dict[str, Any]) -> bool:
    """Does not wait for the answer, which takes long. False: there is no room yet."""
    try:
        return no_room(server.post("/v1/completions", body, timeout=0.3))
    except httpx.ReadTimeout:
        return True


def no_room(response: httpx.Response) -> bool:
    """The one answer that a client who leaves may get: those who left before it have not been noticed yet."""
    response.read()
    assert response.json().get("error", {}).get("code") == "capacity_exceeded", response.text
    return False


@pytest.mark.parametrize("leave", [leave_stream, leave_response])
def test_clients_that_leave(
    served: tuple[Server, Oracle], leave: Callable[[Server, dict[str, Any]], bool]
) -> None:  # fmt: skip
    """Twice as many plans as the workers have room for are asked for and abandoned, beside one that stays."""
    server, oracle = served
    steering = {"interventions": [{**ADD, "tokens": "generated"}]}
    alone = ask(server, prompt_of(30, 5), steering, 80, whole=False)
    stays: list[Answer] = []
    beside = threading.Thread(
        target=lambda: stays.append(ask(server, prompt_of(30, 5), steering, 80, whole=False))
    )  # fmt: skip
    beside.start()
    for i in range(2 * PLANS):
        body = {  # an answer of ten seconds: beside a busy server this process may be at rest for seconds
            "model": server.model, "prompt": prompt_of(20, 100 + i), "max_tokens": 200, "n": 24, "ignore_eos": True,
            "steering": {"interventions": [{**ADD, "scale": 1.0 + i / 100}]},
        }  # fmt: skip
        until(lambda body=body: leave(server, body), "abandoned requests hold their room")  # type: ignore[misc]
    beside.join()
    assert stays, "the request that stayed has failed"
    assert distance(stays[0].logprobs, alone.logprobs) < 1e-5, "the request that stayed was told something else"
    assert stays[0].edited == [79]
    until(lambda: metric(server, "vllm:num_requests_running") == 0, "the engine still runs an abandoned request")
    batch = [
        Asked(prompt_of(12, 200 + i), {"interventions": [{**ADD, "scale": 2.0 + i / 100}]}, 3) for i in range(PLANS)
    ]  # fmt: skip
    for i, answer in enumerate(together(server, batch)):  # there is room for all of them
        agree(answer, oracle, batch[i].steering, f"after abandoned requests, {i}")


def test_a_client_that_leaves_the_queue(served: tuple[Server, Oracle]) -> None:
    """A request that the scheduler has never run leaves nothing behind."""
    server, _ = served
    for i in range(2 * PLANS):
        assert server.http.post("/pause", params={"mode": "keep"}).status_code == 200
        body = {"model": server.model, "prompt": prompt_of(20, i), "max_tokens": 20}
        body["steering"] = {"interventions": [{**ADD, "scale": 3.0 + i / 100}]}
        assert leave_response(server, body), "those who left the queue hold their room"
        assert server.http.post("/resume").status_code == 200
    until(lambda: metric(server, "vllm:num_requests_waiting") == 0, "an abandoned request still waits")
    assert ask(server, prompt_of(9, 6), {"interventions": [ADD]}, 3).edited == [11]


def until(condition: Callable[[], bool], message: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)
