"""Conflict's formula, and what is asked of a server for it."""

import json
import math
from typing import Any

import httpx
import pytest

from steersman.clients.conflict import FLOOR, conflict, measure, without_images
from steersman.clients.sdk import Steersman

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "A cat?"}]},
]


def test_the_formula() -> None:
    p, q = [0.9, 0.5, 1e-12, 1.0], [0.3, 0.5, 0.2, 1e-30]
    found = conflict([math.log(x) for x in p], [math.log(x) for x in q])
    assert found == pytest.approx([math.log((a + 1e-9) / (b + 1e-9)) for a, b in zip(p, q, strict=True)], rel=1e-12)
    assert found[0] == pytest.approx(math.log(3), rel=1e-8)
    assert found[3] == pytest.approx(-math.log(FLOOR), rel=1e-6)  # the floor bounds it
    with pytest.raises(ValueError):
        conflict([0.0], [])


def test_messages_without_images() -> None:
    plain = without_images(MESSAGES)
    assert plain == [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "A cat?"}]}]
    assert without_images(MESSAGES[:1]) == MESSAGES[:1]


def server(ids: list[int], sampled: list[float], replayed: list[float]) -> tuple[Steersman, list[tuple[str, Any]]]:
    seen: list[tuple[str, Any]] = []
    prompt = [1, 7, 8]

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append((request.url.path, body))
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": prompt})
        if request.url.path == "/v1/completions":
            rows: list[Any] = [None, {"7": {"logprob": -9.0}}, {"8": {"logprob": -9.0}}]
            rows += [{str(i): {"logprob": x}, "99": {"logprob": 0.0}} for i, x in zip(ids, replayed, strict=True)]
            return httpx.Response(200, json={"choices": [{"prompt_logprobs": rows}]})
        logprobs = {"content": [{"logprob": x} for x in sampled]}
        choice = {"token_ids": ids, "logprobs": logprobs, "message": {"content": "Yes."}}
        return httpx.Response(200, json={"choices": [choice]})

    return Steersman("http://server", transport=httpx.MockTransport(handle)), seen


def test_the_answers_own_tokens_are_replayed_after_the_words_alone() -> None:
    ids, sampled, replayed = [40, 41], [-0.1, -0.2], [-1.5, -0.2]
    client, seen = server(ids, sampled, replayed)
    found = measure(client, MESSAGES, model="m", steering={"signals": ["answer_entropy"]}, max_tokens=5)
    assert (found.text, found.token_ids, found.with_image, found.without) == (
        "Yes.",
        (40, 41),
        (-0.1, -0.2),
        (-1.5, -0.2),
    )
    assert found.conflict == pytest.approx([1.4, 0.0], abs=1e-6)
    (chat, asked), (tokenize, plain), (completions, replay) = seen
    assert (chat, tokenize, completions) == ("/v1/chat/completions", "/tokenize", "/v1/completions")
    assert asked["messages"] == MESSAGES
    assert asked["steering"] == {"signals": ["answer_entropy"], "default": False}
    assert plain["messages"] == without_images(MESSAGES)
    assert (replay["prompt"], replay["prompt_logprobs"], replay["steering"]) == (
        [1, 7, 8, 40, 41],
        0,
        {"default": False},
    )


@pytest.mark.parametrize(
    ("messages", "steering", "ids", "message"),
    [
        (MESSAGES[:1], None, [4], "no image"),
        (MESSAGES, {"interventions": [{"op": "add", "vector": "v"}]}, [4], "probes and signals alone"),
        (MESSAGES, {"profile": "calm"}, [4], "probes and signals alone"),
        (MESSAGES, None, [], "generated nothing"),
    ],
)
def test_what_cannot_be_measured(messages: Any, steering: Any, ids: list[int], message: str) -> None:
    client, _ = server(ids, [0.0] * len(ids), [0.0] * len(ids))
    with pytest.raises(ValueError, match=message):
        measure(client, messages, model="m", steering=steering)
