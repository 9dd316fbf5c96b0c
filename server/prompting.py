"""Prompts that our own routes are given, as tokens: text, token ids or chat messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steersman.server.engine.prompts import RoleFinder, TextFinder
from steersman.server.policies.policy import PolicyPrompt
from steersman.steering.errors import InvalidRequest
from steersman.steering.tokens import Prompt

Given = str | Sequence[int] | Sequence[Mapping[str, Any]] | PolicyPrompt
"""Text, token ids, chat messages, or what a robot policy makes of an observation."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and for a chat what finding roles in it needs."""

    prompt: Prompt
    messages: Sequence[Any] | None = None
    render: Callable[[Sequence[Any]], str] | None = None
    pictured: PolicyPrompt | None = None  # before its pictures' places were filled in

    @property
    def token_ids(self) -> list[int]:
        return list(self.prompt.token_ids)


def template_options(serving: Any) -> dict[str, Any]:
    """What the server was started with for chat templates.

    The contract with vLLM: ``serving``, its application's state, has ``openai_serving_chat`` with ``chat_template`` and
    ``default_chat_template_kwargs``.
    """
    chat = getattr(serving, "openai_serving_chat", None)
    options = dict(getattr(chat, "default_chat_template_kwargs", None) or {})
    template = getattr(chat, "chat_template", None)
    return options if template is None else {**options, "chat_template": template}


def read(given: str | Sequence[int] | Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any]) -> Asked:
    """Raises InvalidRequest for what cannot be tokenized here."""
    if not given:
        raise InvalidRequest("is empty")
    if not isinstance(given, str) and isinstance(given[0], int):
        ids = [i for i in given if isinstance(i, int)]
        return Asked(Prompt(ids, None if tokenizer is None else TextFinder(tokenizer, ids)))
    if tokenizer is None:
        raise InvalidRequest("this server has no tokenizer; give token ids")
    if isinstance(given, str):
        ids = tokenizer.encode(given)
        return Asked(Prompt(ids, TextFinder(tokenizer, ids)))

    def render(messages: Any) -> str:
        asked = {"add_generation_prompt": True, **options, "tokenize": False}
        return str(tokenizer.apply_chat_template(list(messages), **asked))

    messages = [_joined(message) for message in given if isinstance(message, Mapping)]
    try:
        ids = tokenizer.encode(render(messages), add_special_tokens=False)
    except Exception as error:  # a template may raise anything
        raise InvalidRequest(f"the chat template does not take these messages: {error}") from None
    text = TextFinder(tokenizer, ids)
    return Asked(Prompt(ids, text, RoleFinder(text, messages, render)), messages, render)


def _joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose parts are all text, as the engine gives it to templates that take a string."""
    parts = message.get("content")
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return {**message, "content": "\n".join(p["text"] for p in parts)}
    return message
