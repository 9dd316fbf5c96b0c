"""The words of the model of scenes, its questions (POPE's) and its captions, and how a chat becomes a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steersman.clients import small_llava
from steersman.clients.lvlm.scenes import COLOURS, KINDS, SHAPES
from steersman.clients.small_llava import SPECIAL, UNKNOWN

QUESTION = "Is there a {} in the image?"
CAPTION = "Describe the image."
REPLY = "ASSISTANT:"
YES, NO = "yes", "no"
_TEXTS = (QUESTION.replace("{}", ""), CAPTION, YES, NO, ",", *COLOURS, *SHAPES)
_split = [word for text in _TEXTS for word in text.replace("?", " ?").replace(".", " .").split()]
WORDS = (*SPECIAL, REPLY, *dict.fromkeys(_split))
_INDEX = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} " + REPLY + "{% endif %}"
)


def ids(text: str) -> list[int]:
    return [_INDEX.get(word, UNKNOWN) for word in text.replace("?", " ?").replace(".", " .").replace(",", " ,").split()]


def question(kind: int) -> str:
    return QUESTION.format(KINDS[kind])


def caption(kinds: Sequence[int]) -> str:
    """What an answer to ``CAPTION`` is: the objects from the left to the right."""
    return ", ".join(f"a {KINDS[kind]}" for kind in kinds) + "."


def tokenizer() -> Any:
    return small_llava.tokenizer(WORDS, (REPLY,), TEMPLATE)
