"""One forward pass of a question under interventions: how likely its answer is. Many at once, in the engine's batch."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from steersman.server.engine.generate import prefill
from steersman.server.reports import block
from steersman.server.state import SteeringState
from steersman.server.tracing_prompts import Posed
from steersman.steering.errors import EngineUnsteered, InvalidRequest

CONCURRENT: Final = 16  # runs in the engine at once
T = TypeVar("T")


class Outcome(NamedTuple):
    probability: float  # of the answer's first token
    token: int  # the likeliest


def refuse_dosage(state: SteeringState) -> None:
    """What tracing puts in place is as large as what it replaces: a limit would change it unseen."""
    if state.settings.max_relative_norm is not None and state.settings.dosage != "warn":
        raise InvalidRequest("tracing replaces activations, which --steering-max-relative-norm limits here", "kind")


async def run(state: SteeringState, posed: Posed, edits: Sequence[Mapping[str, Any]] = ()) -> Outcome:
    """Raises SteeringError, EngineUnsteered among them where one of ``edits`` has edited nothing."""
    frontend, signal = state.frontend, f"logprob:{posed.answer}"
    asked = {"default": False, "interventions": [*posed.edits, *edits], "signals": [signal]}
    ticket = await frontend.prepare(asked)
    try:
        try:
            name = f"trace-{uuid.uuid4().hex}"
            token = await prefill(state.engine, name, posed.token_ids, posed.pictures, ticket.key)
        except Exception:
            if ticket.refused is not None:
                raise ticket.refused from None
            raise
        report = block(ticket, await state.reports.fetch(ticket), "summary")
    finally:
        frontend.finish(ticket)
    if any(not done["tokens"] for done in report["interventions"]):
        raise EngineUnsteered("an intervention has edited no token")
    told = report.get("signals", [{"signals": {}}])[0]["signals"].get(signal)
    if told is None:
        raise EngineUnsteered("the answer's probability is not known: an engine that speculates does not tell it")
    value = told["first"]  # None: -inf, of a token that the model rules out
    return Outcome(0.0 if value is None else math.exp(value), token)


async def all_of(work: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Every result, in order, a few at a time; the first failure ends the others and is raised as it is."""
    calls = list(work)
    out: dict[int, T] = {}
    left = iter(enumerate(calls))

    async def some() -> None:
        for i, call in left:
            out[i] = await call()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(CONCURRENT, len(calls))):
                group.create_task(some())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [out[i] for i in range(len(calls))]
