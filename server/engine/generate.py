"""Generating a fixed number of tokens greedily from token ids and pictures, beside vLLM's own routes.

The contract with vLLM: ``engine.renderer.render_cmpl_async`` runs the model's image processor in threads of its own and
makes what ``engine.generate`` takes, of prompts with ``prompt_token_ids`` and ``multi_modal_data``; a ValueError or
TypeError of it means that the processor does not take the prompt. ``generate`` aborts the request when its iteration is
cancelled or closed.
What it makes of pictures has ``prompt_token_ids`` with their places filled in, and in ``mm_placeholders`` and
``mm_hashes``, under ``image``, what becomes ``mm_position`` and ``mm_hash`` of the request's features (see ``images``).
It takes for granted that this goes to the engine, and sends the same picture but once; with ``skip_mm_cache`` it does
not.
``SamplingParams.extra_args["steering"]`` carries a ticket's key (see ``intake``).
``engine.renderer.render_messages_async(messages, ChatParams)`` writes a chat by its template, a picture's part
(``{"type": "image_pil", "image_pil": ..}``) as the model's placeholder; ``tokenize_prompts_async`` makes it token ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from PIL import Image
from vllm import SamplingParams, exceptions
from vllm.sampling_params import RequestOutputKind

from steersman.server.engine.frontend import TicketKey
from steersman.server.engine.images import prompt_images
from steersman.server.engine.intake import FIELD
from steersman.server.policies.policy import Picture, PolicyPrompt
from steersman.server.policies.robots import Compute
from steersman.steering.errors import EngineUnsteered, InvalidRequest
from steersman.steering.tokens import Prompt

_Client: Any = getattr(exceptions, "VLLMClientError", ValueError)  # older versions raise a ValueError


async def expanded(engine: Any, token_ids: Sequence[int], pictures: Sequence[Picture]) -> Prompt:
    """What the model is fed of such a prompt: its tokens once the pictures have theirs, and which these are."""
    try:
        ready = await _rendered(engine, token_ids, pictures, skip_mm_cache=True)
    except (_Client, ValueError, TypeError) as error:
        raise _untaken(error) from None
    places = zip(ready["mm_placeholders"]["image"], ready["mm_hashes"]["image"], strict=True)
    features = [SimpleNamespace(modality="image", mm_position=at, mm_hash=name) for at, name in places]
    return Prompt(list(ready["prompt_token_ids"]), images=prompt_images(features))


async def chat(engine: Any, text: str, pictures: Sequence[Picture], template: Mapping[str, Any]) -> list[int]:
    """The tokens of a user's message, its pictures first, each as the one token or the few that stand for it.

    ``template``: options of the chat template, as ``prompting.template_options`` has them.
    """
    from vllm.renderers.params import ChatParams  # moves between versions, and nothing else needs it

    options = {"add_generation_prompt": True, **template, "tokenize": False}
    params = ChatParams(chat_template=options.pop("chat_template", None), chat_template_kwargs=options)
    parts: list[Any] = [{"type": "image_pil", "image_pil": Image.fromarray(p)} for p in pictures]
    messages: list[Any] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    renderer = engine.renderer
    try:
        _, prompt = await renderer.render_messages_async(messages, params)
        as_written = replace(renderer.default_chat_tok_params, add_special_tokens=False)  # the template has them
        (found,) = await renderer.tokenize_prompts_async([prompt], as_written)
    except (_Client, ValueError, TypeError) as error:
        raise _untaken(error) from None
    return list(found["prompt_token_ids"])


async def prefill(
    engine: Any, request_id: str, token_ids: Sequence[int], pictures: Sequence[Picture], key: TicketKey
) -> int:
    """Computes a prompt, and one token more, which it returns. Raises InvalidRequest for what the model cannot take."""
    try:
        output = await _last(engine, await _rendered(engine, token_ids, pictures), 1, request_id, key)
    except (_Client, ValueError, TypeError) as error:
        raise _untaken(error) from None
    if output is None or len(output.outputs[0].token_ids) != 1:
        raise EngineUnsteered("the engine ended the request before its prompt was computed")
    return int(output.outputs[0].token_ids[0])


async def generate(
    engine: Any,
    request_id: str,
    token_ids: Sequence[int],
    pictures: Sequence[Picture],
    n: int,
    key: TicketKey | None,
    stop: Sequence[int] = (),
) -> list[int]:
    """Exactly ``n`` token ids, or fewer that end in one of ``stop``. Raises InvalidRequest for what cannot be taken."""
    try:
        ready = await _rendered(engine, token_ids, pictures)
    except (_Client, ValueError, TypeError) as error:
        raise _refused(error, "images") from None
    try:
        last = await _last(engine, ready, n, request_id, key, stop)
    except _Client as error:
        raise _refused(error, "instruction") from None
    found = list(last.outputs[0].token_ids) if last is not None else []
    if len(found) != n and not (found and found[-1] in stop):
        length, limit = len(getattr(last, "prompt_token_ids", None) or ()), engine.model_config.max_model_len
        if length + n > limit:
            room = f"the prompt's {length} tokens leave no room for {n} of actions: --max-model-len is {limit}"
            raise InvalidRequest(room, "instruction")
        raise EngineUnsteered(f"the engine generated {len(found)} of {n} tokens")
    return found


def computing(engine: Any) -> Compute:
    """How a policy's prompts become its tokens, by vLLM's engine."""

    async def compute(name: str, prompt: PolicyPrompt, key: TicketKey | None) -> list[int]:
        return await generate(engine, name, prompt.token_ids, prompt.pictures, prompt.n_tokens, key, prompt.stop)

    return compute


async def _rendered(engine: Any, token_ids: Sequence[int], pictures: Sequence[Picture], **options: Any) -> Any:
    prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    if pictures:
        images = await asyncio.to_thread(lambda: [Image.fromarray(p) for p in pictures])  # copies
        prompt["multi_modal_data"] = {"image": images}
    (ready,) = await engine.renderer.render_cmpl_async([prompt], **options)
    return ready


async def _last(
    engine: Any, ready: Any, n: int, request_id: str, key: TicketKey | None, stop: Sequence[int] = ()
) -> Any:
    """The last output of a greedy request for ``n`` tokens; None when there is none."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=n,
        ignore_eos=True,
        stop_token_ids=list(stop) or None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if key is None else {FIELD: key},
    )
    last = None
    async for output in engine.generate(ready, params, request_id):
        last = output
    return last


def _untaken(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"the model cannot take this prompt: {str(error)[:500]}")


def _refused(error: Exception, param: str) -> InvalidRequest:
    """vLLM's own error names its parameter when it is one of the prompt's text, such as its length."""
    about = "instruction" if getattr(error, "parameter", None) else param
    return InvalidRequest(f"the model cannot take this observation: {str(error)[:500]}", about)
