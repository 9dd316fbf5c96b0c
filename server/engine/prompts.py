"""Finding text and chat roles among a prompt's tokens."""

from __future__ import annotations

import bisect
import uuid
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from steersman.steering.errors import InvalidRequest


class TextFinder:
    """Positions of the tokens that overlap a text, wherever it occurs in the prompt.

    Tokens are decoded one after another, special ones too; where a character is spread over several tokens, it
    belongs to all of them.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(ids)

    def __call__(self, text: str) -> list[int]:
        found: set[int] = set()
        at = self.text.find(text) if text else -1
        while at >= 0:
            found.update(self.overlapping(at, at + len(text)))
            at = self.text.find(text, at + 1)
        return sorted(found)

    @cached_property
    def _decoded(self) -> tuple[str, list[int], list[int]]:
        """The text, and each token's first character and the one past its last."""
        text, starts, ends = "", [], []
        waiting = 0  # first token of a character that is not complete yet
        for i in range(len(self.ids)):
            piece = self.tokenizer.decode(self.ids[waiting : i + 1], skip_special_tokens=False)
            if waiting:  # some tokenizers drop a leading space at the start of what they decode
                context = self.tokenizer.decode(self.ids[waiting - 1 : i + 1], skip_special_tokens=False)
                alone = self.tokenizer.decode(self.ids[waiting - 1 : waiting], skip_special_tokens=False)
                piece = context[len(alone) :] if context.startswith(alone) else piece
            starts.append(len(text))
            if piece.endswith("\ufffd"):
                continue
            text += piece
            ends += [len(text)] * (i + 1 - len(ends))
            waiting = i + 1
        ends += [len(text)] * (len(self.ids) - len(ends))
        return text, starts, ends

    @property
    def text(self) -> str:
        return self._decoded[0]

    def overlapping(self, start: int, end: int) -> list[int]:
        """Tokens that have a character between ``start`` and ``end``."""
        _, starts, ends = self._decoded
        first = bisect.bisect_right(ends, start)
        return [i for i in range(first, bisect.bisect_left(starts, end)) if ends[i] > start and starts[i] < end]


class RoleFinder:
    """Positions of the contents of a chat's messages with a given role.

    The chat template is rendered with unique marks in place of the contents, which shows the literal text
    around each; the real prompt is then read along those literals.
    """

    def __init__(self, finder: TextFinder, messages: Sequence[Any], render: Callable[[Sequence[Any]], str]) -> None:
        self.finder = finder
        self.messages = messages
        self.render = render

    def __call__(self, role: str) -> list[int]:
        out: set[int] = set()
        for (message_role, _), (start, end) in zip(self._contents, self._spans, strict=True):
            if message_role == role:
                out.update(self.finder.overlapping(start, end))
        return sorted(out)

    @cached_property
    def _contents(self) -> list[tuple[str, str]]:
        out = []
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
            out.append((str(message.get("role")), str(content or "")))
        return out

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        marks = [f"mark{uuid.uuid4().hex}" for _ in self._contents]
        marked = self.render(
            [{"role": role, "content": mark} for (role, _), mark in zip(self._contents, marks, strict=True)]
        )
        text, at, spans = self.finder.text, 0, []
        for i, ((_, content), mark) in enumerate(zip(self._contents, marks, strict=True)):
            literal, found, rest = marked.partition(mark)
            variants = [v for v in (content, content.strip()) if text.startswith(literal + v, at)] if found else []
            if not variants and i == 0 and found:  # a tokenizer may add a BOS that the template does not show
                at = max(text.find(literal + content.strip()), 0)
                variants = [v for v in (content, content.strip()) if text.startswith(literal + v, at)]
            if not variants:
                raise InvalidRequest(
                    f"the chat template does not show where message {i} stands in the prompt; use positions or text"
                )
            start = at + len(literal)
            spans.append((start, start + len(variants[0])))
            at, marked = spans[-1][1], rest
        return spans
