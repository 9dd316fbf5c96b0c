"""Inferential conflict: how much more likely an image made an answer than the words alone do.

S_Conf = ln(p(y|image, text) + ε) − ln(p(y|text) + ε) with ε = 10⁻⁹, of "Anatomy of a Lie" (CAD), for each token y of an
answer that was generated with the image: it is replayed token by token ("teacher forced") after the same messages
without their images, and each token's probability compared. Near 0 the image made no difference; below 0 the words
alone had made the token likelier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from steersman.steering.errors import InvalidRequest

SIGNAL: Final = "conflict"
FLOOR: Final = 1e-9


def conflict(with_image: Sequence[float], without: Sequence[float]) -> list[float]:
    """By token, of ln p with the image and without it."""
    pairs = zip(with_image, without, strict=True)
    return [math.log(math.exp(a) + FLOOR) - math.log(math.exp(b) + FLOOR) for a, b in pairs]


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages of a chat, without their parts that are images."""
    out = []
    for message in messages:
        parts = message.get("content")
        kept = [part for part in parts if not _is_image(part)] if isinstance(parts, list) else parts
        out.append({**message, "content": kept} if "content" in message else dict(message))
    return out


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    contents = [message.get("content") for message in messages]
    return any(_is_image(part) for parts in contents if isinstance(parts, list) for part in parts)


def check_images(signals: Sequence[str], messages: Sequence[Mapping[str, Any]] | None) -> None:
    """Raises InvalidRequest where conflict is asked for without an image; ``messages``: None of what is no chat."""
    if SIGNAL in signals and not has_images(messages or ()):
        wanted = "conflict compares an answer with what the words alone say: it needs a chat with an image"
        raise InvalidRequest(wanted, f"steering.signals[{list(signals).index(SIGNAL)}]")


def _is_image(part: Any) -> bool:
    """``{"type": "image_url", ..}``, and what engines take besides: other types of images, and parts without a type."""
    if not isinstance(part, Mapping):
        return False
    names = [part["type"]] if "type" in part else list(part)
    return any("image" in str(name) for name in names)
