"""Prompts with a robot's instruction in them, as token ids."""

from __future__ import annotations

from typing import Any

from steersman.steering.errors import InvalidRequest


def encoded(tokenizer: Any, text: str, instruction: str) -> list[int]:
    """The ids of ``text``, which has ``instruction`` in it, and BOS where the tokenizer adds it.

    Raises InvalidRequest where the instruction spells a special token: it would stand for an image, or end the prompt.
    """
    known = set(tokenizer.all_special_ids)  # the named ones; an image's token need not be among them
    known.update(i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    special = known.intersection(tokenizer.encode(instruction, add_special_tokens=False))
    if special:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(special)))
        raise InvalidRequest(f"must not have the model's own tokens in it: {names}", "instruction")
    return list(tokenizer.encode(text))
