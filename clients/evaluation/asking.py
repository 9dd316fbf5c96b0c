"""Questions about images, asked of a running server many at a time."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.clients.sdk import Steersman

Steering = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    id: str
    image: Path
    text: str


@dataclass(frozen=True)
class Settings:
    """How every question is asked. ``suffix`` follows the question after a space."""

    model: str
    max_tokens: int
    suffix: str = ""
    concurrency: int = 16


def message(image: Path, text: str) -> dict[str, Any]:
    """A user's message: an image, then a text."""
    kind = mimetypes.guess_type(image.name)[0] or "image/jpeg"
    url = f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def ask(
    server: Steersman,
    questions: Sequence[Question],
    steering: Steering | None,
    settings: Settings,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The greedy answers, in the order of the questions. The first that fails ends it, with the server's error."""

    def one(question: Question) -> str:
        text = f"{question.text} {settings.suffix}".strip()
        answer = server.chat(
            [message(question.image, text)],
            steering,
            model=settings.model,
            max_tokens=settings.max_tokens,
            temperature=0.0,
        )
        advance(1)
        return str(answer["choices"][0]["message"]["content"] or "")

    with ThreadPoolExecutor(settings.concurrency) as pool:
        waiting = [pool.submit(one, question) for question in questions]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def missing(questions: Sequence[Question]) -> None:
    """Raises FileNotFoundError where a question's image is not there: before anything is asked."""
    for question in questions:
        if not question.image.is_file():
            raise FileNotFoundError(f"question {question.id}: no image {question.image}")
