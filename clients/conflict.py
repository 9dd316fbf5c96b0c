"""Inferential conflict: how much more likely an image made the answer than the words alone do.

S_Conf = ln(p(y|image, text) + ε) − ln(p(y|text) + ε) with ε = 10⁻⁹, of "Anatomy of a Lie" (CAD), for each token y of an
answer: the answer is generated once with the image, then replayed token by token ("teacher forced") after the same
messages without their images, and each token's probability compared. Near 0 the image made no difference; below 0 the
words alone had made the token likelier.

Both probabilities are the model's own, before temperature, of the token ids that were generated: the answer's text is
not tokenised again. The server's default profile is left out of both: a replay generates no token that it could edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from steersman.clients.sdk import Steersman

FLOOR: Final = 1e-9


@dataclass(frozen=True)
class Replayed:
    """An answer, its token ids, and of each token ln p with the image, without it, and the conflict."""

    text: str
    token_ids: tuple[int, ...]
    with_image: tuple[float, ...]
    without: tuple[float, ...]
    conflict: tuple[float, ...]
    response: Mapping[str, Any]  # of the first request, as the server sent it


def conflict(with_image: Sequence[float], without: Sequence[float]) -> list[float]:
    """By token, of ln p with the image and without it."""
    pairs = zip(with_image, without, strict=True)
    return [math.log(math.exp(a) + FLOOR) - math.log(math.exp(b) + FLOOR) for a, b in pairs]


def measure(
    server: Steersman,
    messages: Sequence[Mapping[str, Any]],
    *,
    model: str,
    steering: Mapping[str, Any] | None = None,
    **body: Any,
) -> Replayed:
    """Asks for an answer and replays it without the images.

    ``steering`` may ask for probes and signals; interventions are refused: the replay would be edited at other tokens.
    ``body`` goes with the chat request. Raises ValueError where there is no image or nothing was generated.
    """
    if steering is not None and (steering.get("interventions") or steering.get("profile")):
        raise ValueError("conflict is measured of the model as it is: steering may hold probes and signals alone")
    plain = without_images(messages)
    if plain == list(messages):
        raise ValueError("the messages have no image to leave out")
    asked = {"logprobs": True, "return_token_ids": True, "model": model, **body}
    answer = server.chat([dict(m) for m in messages], {**(steering or {}), "default": False}, **asked)
    choice = answer["choices"][0]
    ids = [int(i) for i in choice["token_ids"]]
    if not ids:
        raise ValueError("the model generated nothing")
    seen = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    kept = {name: body[name] for name in ("chat_template", "chat_template_kwargs") if name in body}
    prompt = server.tokenize(plain, model=model, **kept)
    replay = server.completion(
        [*prompt, *ids], model=model, max_tokens=1, prompt_logprobs=0, temperature=0, steering={"default": False}
    )
    rows = replay["choices"][0]["prompt_logprobs"][len(prompt) :]
    blind = [float(row[str(i)]["logprob"]) for row, i in zip(rows, ids, strict=True)]
    text = str(choice["message"]["content"] or "")
    return Replayed(text, tuple(ids), tuple(seen), tuple(blind), tuple(conflict(seen, blind)), answer)


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, of their parts only the texts."""
    out = []
    for message in messages:
        parts = message.get("content")
        kept = [p for p in parts if p.get("type") == "text"] if isinstance(parts, list) else parts
        out.append({**message, "content": kept})
    return out
