"""What extraction jobs need where there is no engine: a tokenizer of letters, and captures from a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steersman.server.captures import Captured, CapturedPrompt
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from steersman.steering.spec import TokenSet
from tests.steering.library import LAYERS, WIDTHS, D

READ = tuple(range(LAYERS - 1))  # Hugging Face's last hidden state has been normed


class Letters:
    """One token per letter, BOS where special tokens are asked for; roles are told by a letter before and after."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [2 + ord(letter) % 60 for letter in text]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        if any(m["role"] not in ("user", "assistant") for m in messages):
            raise ValueError("no such role")
        text = "".join(f"<{m['role'][0]}{m['content']}>" for m in messages)
        return text[:-1] if continue_final_message else text + "<a" * add_generation_prompt


@cache
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=D,
            intermediate_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return LlamaForCausalLM(config).eval()


class Captures:
    """Stands in for ``captures.capture``. The stream is the model's own; other sites are a number per token."""

    def __init__(self, served: Any = None) -> None:
        """``served``: the model, in place of the tiny one."""
        self.model = served or model()
        self.asked: list[tuple[list[int], Any]] = []
        self.most = self._running = 0
        self.hold: asyncio.Event | None = None  # what a capture waits for
        self.together = 1  # so many captures are waited for before the first one answers
        self._reached = asyncio.Event()

    async def __call__(
        self, state: Any, prompts: Sequence[Any], sites: Sequence[Site], layers: Any, tokens: Any, reduce: str
    ) -> Captured:
        assert reduce == "mean"
        self._running += 1
        self.most = max(self.most, self._running)
        if self.most >= self.together:
            self._reached.set()
        try:
            if self.together > 1:
                await asyncio.wait_for(self._reached.wait(), 20)
            await (self.hold.wait() if self.hold is not None else asyncio.sleep(0))
        finally:
            self._running -= 1
        ((ids,), (site,)) = prompts, sites
        self.asked.append((list(ids), tokens))
        chosen = _chosen(tokens, len(ids))
        places = [Place(layer, site) for layer in layers]
        rows = {place: self.states(ids, place)[chosen].mean(0).numpy() for place in places}
        return Captured("m", places, [CapturedPrompt(list(ids), chosen, rows)], "mean", None)

    def states(self, ids: Sequence[int], place: Place) -> torch.Tensor:
        """[tokens, width]"""
        if place.site is Site.RESID_POST:
            with torch.inference_mode():
                out = self.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
            return out.hidden_states[place.layer + 1][0]
        generator = torch.Generator().manual_seed(sum(ids) * 31 + place.layer)
        return torch.randn(len(ids), WIDTHS[place.site], generator=generator)


def _chosen(tokens: TokenSet, length: int) -> list[int]:
    if tokens.positions:
        return [position % length for position in tokens.positions]
    assert tokens.ranges
    ((a, b),) = tokens.ranges
    return list(range(a, b))
