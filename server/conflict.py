"""Inferential conflict of served answers: each is replayed without its images.

Both probabilities are those of the model as the request has it, under its own steering. In the replay the interventions
choose their tokens anew, in the prompt without images; the answer's tokens are generated ones there too.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from steersman.server.engine.frontend import Answer, Ticket
from steersman.server.engine.replay import replay
from steersman.server.reports import check
from steersman.server.state import SteeringState
from steersman.steering.conflict import SIGNAL, conflict
from steersman.steering.signals import summary

RAW = "raw_logprobs"


class Unreplayed(Exception):
    """Why an answer has no conflict."""


async def tell(state: SteeringState, ticket: Ticket, raw: Sequence[dict[str, Any]], whole: bool) -> list[str]:
    """Puts conflict among the signals of each sequence's ``raw`` report; what could not be done, in words.

    ``whole``: with the values of every token. Whatever goes wrong leaves the answer as it is.
    """
    if not ticket.conflict or any(report["error"] for report in raw):
        return []
    try:
        prompt = await _prompt(state, ticket)
    except Exception as error:
        results: list[list[float] | BaseException] = [error] * len(raw)
    else:
        parts = (_conflict(state, ticket, report["request"], prompt) for report in raw)
        results = await asyncio.gather(*parts, return_exceptions=True)
    missing = []
    first = ticket.selections[0].prompt_length - 1  # the position whose output is the first generated token
    for choice, (report, found) in enumerate(zip(raw, results, strict=True)):
        if isinstance(found, BaseException):
            missing.append(f"signal {SIGNAL} is not known of choice {choice}: {_said(found)}")
        else:
            positions = {"positions": [*range(first, first + len(found))], "values": found}
            report["signals"][SIGNAL] = {**summary(found), **(positions if whole else {})}
        state.metrics.replayed(None if isinstance(found, BaseException) else found)
    return missing


async def _prompt(state: SteeringState, ticket: Ticket) -> Mapping[str, Any]:
    mode = state.engine.model_config.logprobs_mode
    if mode != RAW:
        raise Unreplayed(f"this server's --logprobs-mode is {mode}, not {RAW}")
    if getattr(state.engine.vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        raise Unreplayed("with --kv-sharing-fast-prefill nobody knows how likely a prompt's tokens are")
    assert ticket.without_images is not None, "chats with images have it"
    found: Mapping[str, Any] = await ticket.without_images()
    return found


async def _conflict(state: SteeringState, ticket: Ticket, sequence: str, prompt: Mapping[str, Any]) -> list[float]:
    """Of each token of the answer that is this sequence of the engine's."""
    generated = ticket.sequences[sequence]
    answer: Answer = generated.answer()
    if not answer.token_ids:
        raise Unreplayed("nothing was generated")
    before = len(prompt["prompt_token_ids"])
    length, limit = before + len(answer.token_ids), state.settings.max_replay_tokens
    if length > limit:
        raise Unreplayed(f"its replay has {length} tokens; at most {limit} (--steering-max-replay-tokens)")
    async with state.replaying:
        again = state.frontend.again(ticket, before)
        try:
            name, about = f"replay-{uuid.uuid4().hex}", {"lora": generated.lora, "priority": generated.priority}
            without = await replay(state.engine, name, prompt, answer.token_ids, again.key, **about)
            check(await state.reports.fetch(again))
        finally:
            state.frontend.finish(again)
    return conflict(answer.logprobs, without)


def _said(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, Unreplayed) else f"the replay without images failed: {text[:500]}"
