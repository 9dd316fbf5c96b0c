"""OpenVLA (arXiv 2406.09246): actions are the last ids of the vocabulary, one token for each dimension.

As in ``prismatic/vla/action_tokenizer.py`` and ``predict_action`` of https://github.com/openvla/openvla. V is the
tokenizer's vocabulary: the embedding's size less the padding that training added (32064 − 64; with 32064 every action
would be read 64 bins too high, and nothing would say so). 256 edges on [−1, 1] make 255 centres, and two ids share the
last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steersman.server.policies.instructions import encoded
from steersman.server.policies.policy import Decoded, Observation, PolicyPrompt
from steersman.server.policies.statistics import NormStats

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY = 29871  # Llama's "▁", which ended every prompt in training and which its tokenizer does not add
PADDING = 64  # the default of ``pad_to_multiple_of`` in OpenVLA's own config class


class OpenVla:
    name = "openvla"
    cameras = 1
    reads_state = False
    reads_seed = False

    def __init__(self, config: Mapping[str, Any], tokenizer: Any) -> None:
        """``config``: of the checkpoint. Raises ValueError where it is not OpenVLA's."""
        if tokenizer is None:
            raise ValueError("the policy openvla needs the tokenizer: start without --skip-tokenizer-init")
        size, padding = config["text_config"]["vocab_size"], config.get("pad_to_multiple_of", PADDING)
        self.vocabulary = int(size) - int(padding)
        if not 0 < self.vocabulary <= len(tokenizer):
            raise ValueError(
                f"text_config.vocab_size {size} less pad_to_multiple_of {padding} is {self.vocabulary}, but the "
                f"tokenizer has {len(tokenizer)} tokens: the actions' tokens are its last ones"
            )
        self.tokenizer = tokenizer
        self.stats = NormStats.read(config.get("norm_stats"))
        edges = np.linspace(-1, 1, int(config.get("n_action_bins", 256)))
        self.centres = (edges[:-1] + edges[1:]) / 2  # [bins − 1]

    def prompt(self, observation: Observation) -> PolicyPrompt:
        key = self.stats.key(observation.unnorm_key)
        instruction = observation.instruction.lower()
        ids = encoded(self.tokenizer, PROMPT.format(instruction=instruction), instruction)
        if ids[-1] != EMPTY:
            ids.append(EMPTY)
        return PolicyPrompt(ids, list(observation.pictures.values()), self.stats.actions[key].dims)

    def decode(self, token_ids: Sequence[int], observation: Observation) -> Decoded:
        stats = self.stats.actions[self.stats.key(observation.unnorm_key)]
        bins = self.vocabulary - np.array(token_ids, np.int64) - 1
        strays = int(((bins < 0) | (bins > len(self.centres))).sum())
        x = self.centres[np.clip(bins, 0, len(self.centres) - 1)]
        return Decoded(stats.unnormalise(x)[None], stats.mask, strays)

    def token_values(self) -> dict[int, float]:
        last = len(self.centres) - 1
        return {self.vocabulary - 1 - i: float(self.centres[min(i, last)]) for i in range(last + 2)}

    def metadata(self) -> dict[str, Any]:
        dims = {key: stats.dims for key, stats in self.stats.actions.items()}
        return {"unnorm_keys": dims, "chunk": 1, "action_bins": len(self.centres) + 1}
