"""Generating a fixed number of tokens greedily from token ids and pictures, beside vLLM's own routes.

The contract with vLLM: ``engine.renderer.render_cmpl_async`` runs the model's image processor in threads of its own and
makes what ``engine.generate`` takes, of prompts with ``prompt_token_ids`` and ``multi_modal_data``; a ValueError or
TypeError of it means that the processor does not take the prompt. ``generate`` aborts the request when its iteration is
cancelled or closed.
``SamplingParams.extra_args["steering"]`` carries a ticket's key (see ``intake``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from PIL import Image
from vllm import SamplingParams, exceptions
from vllm.sampling_params import RequestOutputKind

from steersman.server.engine.frontend import TicketKey
from steersman.server.engine.intake import FIELD
from steersman.server.policies.policy import Picture
from steersman.steering.errors import EngineUnsteered, InvalidRequest

_Client: Any = getattr(exceptions, "VLLMClientError", ValueError)  # older versions raise a ValueError


async def generate(
    engine: Any, request_id: str, token_ids: Sequence[int], pictures: Sequence[Picture], n: int, key: TicketKey | None
) -> list[int]:
    """Exactly ``n`` token ids. Raises InvalidRequest for what the model cannot take."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    if pictures:
        images = await asyncio.to_thread(lambda: [Image.fromarray(p) for p in pictures])  # copies
        prompt["multi_modal_data"] = {"image": images}
    try:
        (ready,) = await engine.renderer.render_cmpl_async([prompt])
    except (_Client, ValueError, TypeError) as error:
        raise _refused(error, "images") from None
    params = SamplingParams(
        temperature=0.0,
        max_tokens=n,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if key is None else {FIELD: key},
    )
    last = None
    try:
        async for output in engine.generate(ready, params, request_id):
            last = output
    except _Client as error:
        raise _refused(error, "instruction") from None
    found = list(last.outputs[0].token_ids) if last is not None else []
    if len(found) != n:
        length, limit = len(getattr(last, "prompt_token_ids", None) or ()), engine.model_config.max_model_len
        if length + n > limit:
            room = f"the prompt's {length} tokens leave no room for {n} of actions: --max-model-len is {limit}"
            raise InvalidRequest(room, "instruction")
        raise EngineUnsteered(f"the engine generated {len(found)} of {n} tokens")
    return found


def _refused(error: Exception, param: str) -> InvalidRequest:
    """vLLM's own error names its parameter when it is one of the prompt's text, such as its length."""
    about = "instruction" if getattr(error, "parameter", None) else param
    return InvalidRequest(f"the model cannot take this observation: {str(error)[:500]}", about)
