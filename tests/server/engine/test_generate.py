"""A chat with pictures as token ids, by vLLM's own parameters and a renderer that notes what it is given."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import TokenizeParams

from steersman.server.engine.generate import chat
from steersman.steering.errors import InvalidRequest

PICTURE = np.full((2, 3, 3), 7, np.uint8)


class Renderer:
    """vLLM's default parameters of a multimodal model add special tokens, which a template has written already."""

    default_chat_tok_params = TokenizeParams(max_total_tokens=99, add_special_tokens=True)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        self.messages, self.params = messages, params
        if messages[0]["content"][-1]["text"] == "?":
            raise ValueError("no such content")
        return [], {"prompt": "<s>a"}

    async def tokenize_prompts_async(self, prompts: Any, params: TokenizeParams) -> Any:
        assert prompts == [{"prompt": "<s>a"}]
        return [{"prompt_token_ids": [0] * params.add_special_tokens + [0, 5]}]


def test_a_users_message_with_its_picture_first() -> None:
    renderer = Renderer()
    ids = asyncio.run(chat(SimpleNamespace(renderer=renderer), "is it?", [PICTURE], {"chat_template": "T", "x": 1}))
    assert ids == [0, 5], "special tokens are the template's"
    (message,) = renderer.messages
    assert [part["type"] for part in message["content"]] == ["image_pil", "text"]
    np.testing.assert_array_equal(np.asarray(message["content"][0]["image_pil"]), PICTURE)
    assert renderer.params.chat_template == "T"
    assert renderer.params.chat_template_kwargs == {"add_generation_prompt": True, "x": 1, "tokenize": False}


def test_what_the_template_does_not_take_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="no such content"):
        asyncio.run(chat(SimpleNamespace(renderer=Renderer()), "?", [], {}))


def test_vllm_has_what_is_called() -> None:
    for name in ("render_messages_async", "tokenize_prompts_async", "default_chat_tok_params"):
        assert hasattr(BaseRenderer, name), "vLLM changed what server/engine/generate.py relies on; see its docstring"
