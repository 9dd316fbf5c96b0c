"""The words of a small policy: an instruction's, every value of a state, and the actions' tokens at the end.

A number is one token, so that a prompt is short and a model need not learn to read digits. How prompts, states and
actions are written is what ``steersman_policy`` of type ``bins`` says (docs/robots.md): the server reads a checkpoint
that was trained on these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.clients import small_llava
from steersman.clients.simulators.metaworld import INSTRUCTIONS
from steersman.clients.simulators.simulator import Floats
from steersman.clients.small_llava import BOS, IMAGE, SPECIAL, UNKNOWN

PROMPT = "In: {instruction} State: {state} Out:"
CELLS = 256  # of each number of a state
BINS = 65  # of each number of an action: an odd one has a bin for standing still
_WORDS = sorted({word for text in (PROMPT, *INSTRUCTIONS.values()) for word in text.split() if "{" not in word})
WORDS = (*SPECIAL, *_WORDS, *map(str, range(CELLS)), *(f"<act{i}>" for i in range(BINS)))
FIRST_STATE = len(SPECIAL) + len(_WORDS)
FIRST_ACTION = len(WORDS) - BINS
_INDEX = {word: i for i, word in enumerate(WORDS)}

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Scale:
    """Between the robot's units and [-1, 1], OpenVLA's way."""

    low: Floats  # [dims]
    high: Floats  # [dims]
    mask: NDArray[np.bool_]  # [dims]; where it is false, the value is not scaled

    @classmethod
    def of(cls, values: NDArray[Any], mask: NDArray[np.bool_], quantile: float) -> Scale:
        """``values`` [n, dims]."""
        low, high = np.quantile(np.asarray(values, np.float64), [quantile, 1 - quantile], axis=0)
        return cls(low, high, mask)

    def into(self, values: NDArray[Any]) -> Floats:
        """``values`` [..., dims] in the robot's units; one that never varies is 0."""
        width = self.high - self.low
        x = np.divide(2 * (values - self.low), width, out=np.ones(np.shape(values)), where=width != 0) - 1
        return np.where(self.mask, x, values)

    def described(self) -> dict[str, Any]:
        return {"q01": self.low.tolist(), "q99": self.high.tolist(), "mask": self.mask.tolist()}


def words(text: str) -> list[int]:
    return [_INDEX.get(word, UNKNOWN) for word in text.split()]


def states(values: NDArray[Any], scale: Scale) -> Ids:
    """Token ids of states, [n, dims] both."""
    cells = np.floor((scale.into(values) + 1) / 2 * CELLS)
    return FIRST_STATE + np.clip(cells, 0, CELLS - 1).astype(np.int64)


def bins(values: NDArray[Any], scale: Scale) -> Floats:
    """Where actions [..., dims] lie among the bins, unrounded: bin i is at i."""
    x = np.clip(scale.into(values), -1, 1)
    return np.clip((x + 1) / 2 * BINS - 0.5, 0, BINS - 1)


def prompts(instruction: str, values: NDArray[Any], scale: Scale, images: int) -> Ids:
    """Prompts for states [n, dims]: [n, length], with the place of ``images`` image tokens after BOS."""
    before, _, after = PROMPT.replace("{instruction}", instruction).partition("{state}")
    start, end = [BOS, *[IMAGE] * images, *words(before)], words(after)
    n = len(values)
    return np.concatenate([np.tile(start, (n, 1)), states(values, scale), np.tile(end, (n, 1))], axis=1)


def tokenizer() -> Any:
    """The same words for transformers and vLLM."""
    return small_llava.tokenizer(WORDS, WORDS[FIRST_ACTION:])
