"""Finding text and chat roles among a prompt's tokens."""

from __future__ import annotations

import bisect
import uuid
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from steersman.steering.errors import InvalidRequest

LONGEST_CHARACTER = 16
"""Tokens that are waited for to make a character whole. Four bytes do; but tokens may hold the end of one character and
the beginning of the next, and a prompt may hold bytes, or U+FFFD itself, that will never make one."""


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
        text, starts, ends = "", list[int](), list[int]()
        waiting = 0  # first token of a character that is not complete yet
        for i in range(len(self.ids)):
            piece = self.tokenizer.decode(self.ids[waiting : i + 1], skip_special_tokens=False)
            if waiting:  # some tokenizers drop a leading space at the start of what they decode
                context = self.tokenizer.decode(self.ids[waiting - 1 : i + 1], skip_special_tokens=False)
                alone = self.tokenizer.decode(self.ids[waiting - 1 : waiting], skip_special_tokens=False)
                piece = context[len(alone) :] if context.startswith(alone) else piece
            starts.append(len(text))
            if piece.endswith("\ufffd") and i + 1 - waiting < LONGEST_CHARACTER:
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
    around each; the real prompt is then read along those literals. Where the two do not agree it is an error, so no
    other token is ever taken for a message's.
    """

    def __init__(self, finder: TextFinder, messages: Sequence[Any], render: Callable[[Sequence[Any]], str]) -> None:
        self.finder = finder
        self.messages = messages
        self.render = render

    def __call__(self, role: str) -> list[int]:
        out: set[int] = set()
        for message_role, start, end in self._spans:
            if message_role == role:
                out.update(self.finder.overlapping(start, end))
        return sorted(out)

    @cached_property
    def _spans(self) -> list[tuple[str, int, int]]:
        """The role, first character and the one past the last of every message that has text."""
        spoken = [(i, texts) for i, message in enumerate(self.messages) if (texts := _texts(message))]
        for as_parts in (False, True):  # templates take a content as a string, as a list of parts, or both
            if (spans := self._read(spoken, as_parts)) is not None:
                return [(str(self.messages[i].get("role")), *span) for (i, _), span in zip(spoken, spans, strict=True)]
        raise InvalidRequest(
            "the chat template does not show where the messages stand in the prompt; use positions or text"
        )

    def _read(self, spoken: Sequence[tuple[int, list[str]]], as_parts: bool) -> list[tuple[int, int]] | None:
        """Where the texts stand, None when the prompt is not what the template makes of them."""
        marks = [f"mark{uuid.uuid4().hex}" for _ in spoken]
        marked = [dict(message) for message in self.messages]
        for (i, _), mark in zip(spoken, marks, strict=True):
            marked[i]["content"] = [{"type": "text", "text": mark}] if as_parts else mark
        try:
            rest = self.render(marked)
        except Exception:  # a template may raise anything
            return None
        literals = []
        for mark in marks:
            literal, found, rest = rest.partition(mark)
            if not found:
                return None
            literals.append(literal)
        literals.append(rest)
        text, at, spans = self.finder.text, -1, list[tuple[int, int]]()
        for (_, texts), literal, following in zip(spoken, literals, literals[1:], strict=False):
            if at < 0:  # a tokenizer may add a BOS that the template does not show
                fits = [(t, text.find(literal + t + following)) for t in texts]
            else:
                fits = [(t, at if text.startswith(literal + t + following, at) else -1) for t in texts]
            found_at = [(t, k) for t, k in fits if k >= 0]
            if not found_at:
                return None
            chosen, at = found_at[0][0], found_at[0][1] + len(literal)
            spans.append((at, at + len(chosen)))
            at += len(chosen)
        return spans


def _texts(message: Any) -> list[str]:
    """What a template may make of a message's content: as it stands, or stripped. None of a message without text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content]
        contents = ["\n".join(parts), "".join(parts)]
    else:
        contents = [content] if isinstance(content, str) else []
    forms = dict.fromkeys(form for c in contents for form in (c, c.rstrip(), c.lstrip(), c.strip()))
    return list(forms) if any(forms) else []
