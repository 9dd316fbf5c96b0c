"""Replaying an answer after another prompt than it was generated for: how likely each of its tokens is there.

The contract with vLLM: a prompt that its renderer has made ready is a mapping with ``prompt_token_ids``, which may grow
at the end. ``engine.generate`` takes it with ``SamplingParams``, ``lora_request`` and ``priority``, a number that only
the scheduler's policy ``priority`` reads, lower ones first; it aborts the request when its iteration is cancelled.
``prompt_logprobs=0`` gives, for every token of the prompt but the first, ln p of that token, before temperature and
penalties, by its id; such a request reads nothing from the prefix cache, whose blocks hold no logits.
``SamplingParams.extra_args["steering"]`` carries a ticket's key (see ``intake``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from steersman.server.engine.frontend import TicketKey
from steersman.server.engine.intake import FIELD
from steersman.steering.errors import EngineUnsteered


async def replay(
    engine: Any,
    request_id: str,
    prompt: Mapping[str, Any],
    answer: Sequence[int],
    key: TicketKey,
    *,
    lora: Any = None,
    priority: int = 0,
) -> list[float]:
    """ln p of each token of ``answer`` after ``prompt`` and those before it, under the steering of the ticket ``key``.

    ``priority``: of the request that generated the answer; this one goes behind its like.
    """
    before = len(prompt["prompt_token_ids"])
    whole = {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *answer]}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={FIELD: key},
    )
    ranked = engine.vllm_config.scheduler_config.policy == "priority"
    options = {"lora_request": lora, "priority": priority + 1 if ranked else 0}
    last = None
    async for output in engine.generate(whole, params, request_id, **options):
        last = output
    rows = getattr(last, "prompt_logprobs", None)
    if rows is None or len(rows) != before + len(answer):
        raise EngineUnsteered("the engine ended the replay before it was computed")
    return [float(row[token].logprob) for row, token in zip(rows[before:], answer, strict=True)]
