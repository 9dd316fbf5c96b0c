"""A plain token-action policy on any image-text model: each number of a chunk is one of n consecutive tokens.

Described in the checkpoint's ``config.json``::

    "steersman_policy": {
      "type": "bins",
      "prompt": "In: {instruction}? State: {state}\\nOut:",   # {state}: one integer of 0..255 for each dimension
      "first_token": 505,       # the id of bin 0; bin i stands for the value -1 + (2 i + 1) / n
      "bins": 7,
      "chunk": 2,               # actions in one answer; default 1
      "image_token": 500,       # stands for one image in the prompt, after BOS; null: vLLM puts it there itself
      "cameras": 1,             # default 1
      "norm_stats": {...}       # of OpenVLA's form
    }

The state is scaled by the quantiles of ``proprio`` and cut into 256 equal cells of [-1, 1], as π0-FAST writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from steersman.server.policies.instructions import encoded
from steersman.server.policies.policy import Decoded, Observation, PolicyPrompt
from steersman.server.policies.statistics import NormStats
from steersman.steering.errors import InvalidRequest

CELLS = 256  # of the state


class Description(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    prompt: str
    first_token: int = Field(ge=0)
    bins: int = Field(ge=2)
    chunk: int = Field(1, ge=1)
    image_token: int | None = Field(None, ge=0)
    cameras: int = Field(1, ge=0)
    norm_stats: Any


class Bins:
    name = "bins"
    reads_seed = False

    def __init__(self, config: Mapping[str, Any], tokenizer: Any) -> None:
        """``config``: of the checkpoint. Raises ValueError where the description is missing or wrong."""
        if tokenizer is None:
            raise ValueError("the policy bins needs the tokenizer: start without --skip-tokenizer-init")
        self.about = Description.model_validate(config.get("steersman_policy"))
        self.tokenizer = tokenizer
        self.stats = NormStats.read(self.about.norm_stats)
        self.cameras = self.about.cameras
        self.reads_state = "{state}" in self.about.prompt
        if self.reads_state and (missing := self.stats.actions.keys() - self.stats.states.keys()):
            raise ValueError(f"the prompt has the state in it, but norm_stats of {', '.join(missing)} no 'proprio'")
        if self.about.first_token + self.about.bins > len(tokenizer):
            raise ValueError(f"first_token + bins must be at most {len(tokenizer)}, what the tokenizer has")

    def prompt(self, observation: Observation) -> PolicyPrompt:
        key = self.stats.key(observation.unnorm_key)
        state = self._state(observation, key) if self.reads_state else ""
        text = self.about.prompt.replace("{state}", state).replace("{instruction}", observation.instruction)
        ids = encoded(self.tokenizer, text, observation.instruction)
        if self.about.image_token is not None:
            start = int(ids[:1] == [self.tokenizer.bos_token_id])
            ids[start:start] = [self.about.image_token] * self.cameras
        n_tokens = self.about.chunk * self.stats.actions[key].dims
        return PolicyPrompt(ids, list(observation.pictures.values()), n_tokens)

    def decode(self, token_ids: Sequence[int], observation: Observation) -> Decoded:
        stats, n = self.stats.actions[self.stats.key(observation.unnorm_key)], self.about.bins
        bins = np.array(token_ids, np.int64) - self.about.first_token
        x = -1 + (2 * np.clip(bins, 0, n - 1) + 1) / n
        actions = stats.unnormalise(x.reshape(self.about.chunk, stats.dims))
        return Decoded(actions, stats.mask, int(((bins < 0) | (bins >= n)).sum()))

    def token_values(self) -> dict[int, float]:
        n = self.about.bins
        return {self.about.first_token + i: -1 + (2 * i + 1) / n for i in range(n)}

    def metadata(self) -> dict[str, Any]:
        dims = {key: stats.dims for key, stats in self.stats.actions.items()}
        return {"unnorm_keys": dims, "chunk": self.about.chunk, "action_bins": self.about.bins}

    def _state(self, observation: Observation, key: str) -> str:
        stats = self.stats.states[key]
        if observation.state is None or observation.state.shape != (stats.dims,):
            raise InvalidRequest(f"must be {stats.dims} numbers, as the statistics of {key} have", "state")
        cells = np.floor((stats.normalise(observation.state) + 1) / 2 * CELLS)
        return " ".join(str(int(c)) for c in np.clip(cells, 0, CELLS - 1))
