"""The text of each token id, as a person would search for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

SPACE: Final = "▁"  # SentencePiece's, at the start of a word


def texts(tokenizer: Any, rows: int, actions: Mapping[int, float] | None = None) -> list[str]:
    """For the ids that have a token, of at most `rows`; rows of an unembedding beyond them are padding.

    `tokenizer` is one of transformers. `actions` says what tokens stand for as a robot's action, from -1 to 1: they are
    `[action: 0.502]`, as Haon et al. 2025 write them, and not the rare words whose ids they took.
    """
    out = []
    for token in tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer))))):
        if token is None:
            out.append("")
        elif SPACE in token:  # which the tokenizer itself would drop at the start
            out.append(token.replace(SPACE, " "))
        else:
            out.append(tokenizer.convert_tokens_to_string([token]))
    for token, value in (actions or {}).items():
        if token < len(out):
            out[token] = f"[action: {value:.3f}]"
    return out
