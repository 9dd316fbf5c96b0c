"""π0-FAST (arXiv 2501.09747): a chunk's discrete cosine coefficients, in tokens of a BPE of their own.

As ``openpi/models/tokenizer.py`` of https://github.com/Physical-Intelligence/openpi writes the prompt and takes the
answer apart: ``Task: {instruction}, State: {256 bins};\\n`` → ``Action: <tokens>|``. Token t of the FAST tokenizer is
the language model's token V − 1 − 128 − t. Its BPE turns tokens into text whose characters are coefficients,
ord(c) + min_token; these, [chunk, dims] by rows and divided by ``scale``, are the orthonormal DCT of the chunk along
time. Actions and state are scaled by quantiles, (x + 1) / 2 · (q99 − q01 + 1e-6) + q01.

An answer that is anything else is refused, with what is wrong with it: openpi acts on zeros then, which are some
motion too. It is read from its token ids, so that no text that looks like the marks can stand for them.

Described in the checkpoint's ``config.json``::

    "steersman_policy": {
      "type": "pi0_fast",
      "fast": "fast",           # folder beside the language model's tokenizer, with tokenizer.json and the
                                # processor_config.json of physical-intelligence/fast: scale, min_token
      "vocab_size": 257152,     # V: of the language model's tokenizer without what was added to it
      "chunk": 10,
      "max_tokens": 256,        # of an answer; default 256
      "image_token": null,      # as for bins: null where vLLM puts the pictures' places there itself (PaliGemma)
      "cameras": 1,             # default 1
      "norm_stats": {...}       # quantiles of action and proprio
    }
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from steersman.server.policies.instructions import encoded
from steersman.server.policies.policy import Decoded, Floats, Observation, PolicyPrompt
from steersman.server.policies.statistics import NormStats, openpi_quantiles
from steersman.steering.errors import ActionsMalformed, InvalidRequest

SKIPPED = 128  # ids at the vocabulary's end, PaliGemma's for segmentation
CELLS = 256  # of the state
BEGIN, END = "Action: ", "|"


class Description(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["pi0_fast"]
    fast: str
    vocab_size: int = Field(ge=1)
    chunk: int = Field(ge=1)
    max_tokens: int = Field(256, ge=1)
    image_token: int | None = Field(None, ge=0)
    cameras: int = Field(1, ge=0)
    norm_stats: Any


class Fast:
    """The FAST tokenizer, to be read with."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder does not hold one."""
        from tokenizers import Tokenizer

        try:
            about = json.loads((folder / "processor_config.json").read_text())
            self.scale, self.least = float(about["scale"]), int(about["min_token"])
            self._bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare ones
            raise ValueError(f"{folder} is no FAST tokenizer: {error!r}") from None
        if not self.scale > 0:
            raise ValueError(f"{folder}: scale must be more than 0")
        self.size: int = self._bpe.get_vocab_size()

    def decode(self, tokens: Sequence[int], chunk: int, dims: int) -> Floats:
        """[chunk, dims] of tokens below ``size``. Raises ActionsMalformed where these are not as many coefficients."""
        text: str = self._bpe.decode(list(tokens), skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in text:
            raise ActionsMalformed("the answer's tokens do not spell whole coefficients")
        if len(text) != chunk * dims:
            wanted = f"{chunk} actions of {dims} numbers have {chunk * dims}"
            raise ActionsMalformed(f"the answer has {len(text)} coefficients; {wanted}")
        coefficients = np.array([ord(c) + self.least for c in text], np.float64).reshape(chunk, dims) / self.scale
        found: Floats = np.matmul(cosines(chunk).T, coefficients)
        return found


def cosines(n: int) -> Floats:
    """[n, n] the orthonormal DCT-II: coefficients = this @ values, and its transpose takes them back."""
    k, t = np.arange(n)[:, None], np.arange(n)[None]
    rows: Floats = np.sqrt(2 / n) * np.cos(np.pi * (2 * t + 1) * k / (2 * n))
    rows[0] /= np.sqrt(2)
    return rows


class Pi0Fast:
    name = "pi0_fast"
    reads_state = True
    reads_seed = False

    def __init__(self, config: Mapping[str, Any], tokenizer: Any) -> None:
        """``config``: of the checkpoint. Raises ValueError where the description is missing or wrong."""
        if tokenizer is None:
            raise ValueError("the policy pi0_fast needs the tokenizer: start without --skip-tokenizer-init")
        self.about = Description.model_validate(config.get("steersman_policy"))
        self.tokenizer = tokenizer
        self.cameras = self.about.cameras
        self.stats = NormStats.read(self.about.norm_stats, openpi_quantiles)
        if missing := self.stats.actions.keys() - self.stats.states.keys():
            raise ValueError(f"norm_stats of {', '.join(sorted(missing))} have no 'proprio', which the prompt needs")
        self.fast = Fast(Path(tokenizer.name_or_path) / self.about.fast)
        self.last = self.about.vocab_size - 1 - SKIPPED  # the id of FAST's token 0
        if self.about.vocab_size > len(tokenizer) or self.last < self.fast.size:
            raise ValueError(
                f"vocab_size {self.about.vocab_size} must be at most the tokenizer's {len(tokenizer)}, "
                f"and have room for {SKIPPED} + {self.fast.size} tokens"
            )
        self.begin: list[int] = tokenizer.encode(BEGIN, add_special_tokens=False)
        (*_, self.end) = tokenizer.encode(END, add_special_tokens=False)
        self.stop = (self.end, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))

    def prompt(self, observation: Observation) -> PolicyPrompt:
        state = self._state(observation)
        instruction = observation.instruction.lower().strip().replace("_", " ")
        ids = encoded(self.tokenizer, f"Task: {instruction}, State: {state};\n", instruction)
        if self.about.image_token is not None:
            ids[:0] = [self.about.image_token] * self.cameras
        return PolicyPrompt(ids, list(observation.pictures.values()), self.about.max_tokens, self.stop)

    def decode(self, token_ids: Sequence[int], observation: Observation) -> Decoded:
        """Raises ActionsMalformed for an answer that is no chunk of actions."""
        stats = self.stats.actions[self.stats.key(observation.unnorm_key)]
        found = self.fast.decode(self._tokens(token_ids), self.about.chunk, stats.dims)
        return Decoded(stats.unnormalise(found), stats.mask, 0)

    def token_values(self) -> dict[int, float]:
        """No token of this policy stands for a number by itself."""
        return {}

    def metadata(self) -> dict[str, Any]:
        dims = {key: stats.dims for key, stats in self.stats.actions.items()}
        return {"unnorm_keys": dims, "chunk": self.about.chunk}

    def _tokens(self, token_ids: Sequence[int]) -> list[int]:
        """Those of FAST's between the marks."""
        ids = list(token_ids)
        n = len(self.begin)
        if ids[:n] != self.begin:
            raise ActionsMalformed(f"the answer does not begin with {BEGIN!r}")
        stops = [i for i, token in enumerate(ids) if token in self.stop]
        if not stops:
            raise ActionsMalformed(f"the answer has no end within {self.about.max_tokens} tokens")
        found = [self.last - token for token in ids[n : stops[0]]]
        for i, token in enumerate(found):
            if not 0 <= token < self.fast.size:
                raise ActionsMalformed(f"token {ids[n + i]} of the answer, its {n + i + 1}., stands for no action")
        return found

    def _state(self, observation: Observation) -> str:
        """openpi's 256 bins; what is below the first one is −1 there."""
        key = self.stats.key(observation.unnorm_key)
        stats = self.stats.states[key]
        if observation.state is None or observation.state.shape != (stats.dims,):
            raise InvalidRequest(f"must be {stats.dims} numbers, as the statistics of {key} have", "state")
        edges = np.linspace(-1, 1, CELLS + 1)[:-1]
        return " ".join(map(str, np.digitize(stats.normalise(observation.state), edges) - 1))
