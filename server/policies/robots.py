"""The served policy: from a checked observation to actions, steered or not, through the engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from prometheus_client import REGISTRY, CollectorRegistry

from steersman.server.engine.frontend import TicketKey
from steersman.server.policies.metrics import ActionMetrics
from steersman.server.policies.pictures import Limits
from steersman.server.policies.policy import Floats, FlowPolicy, Observation, Policy
from steersman.server.routes.served import Served
from steersman.server.state import SteeringState
from steersman.steering.errors import InvalidRequest, PolicyUnavailable, TooManySessions

Compute = Callable[[str, Any, TicketKey | None], Awaitable[Any]]
"""(request id, what ``policy.prompt`` has made, ticket) -> what ``policy.decode`` takes."""


@dataclass(frozen=True)
class Acted:
    """The answer to one observation."""

    actions: Floats  # [chunk, dims], in the robot's units, within the limit
    token_ids: list[int] | None  # None: this policy's actions are no tokens
    strays: int  # tokens that stand for no action
    saturated: int  # numbers that were cut to the limit
    ignored: tuple[str, ...]  # what the observation had and the policy does not read
    timing: dict[str, float]  # milliseconds
    report: dict[str, Any] | None  # what the engine did for the steering; None of an unsteered request

    def about(self) -> dict[str, Any]:
        """What every route tells beside the actions and times."""
        out: dict[str, Any] = {"strays": self.strays, "saturated": self.saturated}
        if self.token_ids is not None:
            out = {"token_ids": self.token_ids, **out}
        out["ignored"] = list(self.ignored)
        return out if self.report is None else {**out, "steering": self.report}


class Robots:
    """One for each process that serves HTTP."""

    def __init__(
        self,
        state: SteeringState,
        policy: Policy | FlowPolicy | None,
        compute: Compute,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.state = state
        self._policy = policy
        self._compute = compute
        self.metrics = ActionMetrics("none" if policy is None else policy.name, registry)
        self._sessions = 0
        settings = state.settings
        self.limits = Limits(settings.max_image_mb << 20, settings.max_image_megapixels * 1_000_000)

    @property
    def policy(self) -> Policy | FlowPolicy:
        """Raises PolicyUnavailable where the served model is none."""
        if self._policy is None:
            raise PolicyUnavailable("the served model is no robot policy (--steering-policy)")
        return self._policy

    def metadata(self) -> dict[str, Any]:
        """What a robot is told when it connects."""
        policy, limit = self.policy, self.state.settings.max_action_delta
        about = {"policy": policy.name, "cameras": policy.cameras, "reads_state": policy.reads_state}
        return {**about, **policy.metadata(), "max_action_delta": limit, "model": self.state.frontend.model.name}

    @contextmanager
    def session(self) -> Iterator[None]:
        """One robot's connection. Raises TooManySessions."""
        limit = self.state.settings.max_robots
        if self._sessions >= limit:
            raise TooManySessions(f"{limit} robots are connected, as many as may be (--steering-max-robots)")
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1

    async def check(self, steering: Any, unnorm_key: str | None) -> None:
        """Raises SteeringError for defaults that no observation could be answered with."""
        known = self.policy.metadata()["unnorm_keys"]
        if unnorm_key is not None and unnorm_key not in known:
            names = ", ".join(sorted(known))
            raise InvalidRequest(f"this policy has no statistics of {unnorm_key[:200]!r}; it has {names}", "unnorm_key")
        if steering is not None:
            _refuse_stream(steering)
            await asyncio.to_thread(self.state.frontend.resolve, steering)

    async def act(self, observation: Observation, steering: Any, ignored: tuple[str, ...]) -> Acted:
        """Raises SteeringError for what cannot be done as asked; ``steering`` None: as the server's default says."""
        started = perf_counter()
        prompt = await asyncio.to_thread(self.policy.prompt, observation)
        if steering is None and await self.state.frontend.default() is None:
            prepared = perf_counter()
            output, report = await self._computed(prompt, None), None
        else:
            output, report, prepared = await self._steered(prompt, steering)
        generated = perf_counter()
        decoded = self.policy.decode(output, observation)
        actions, saturated = self._limited(decoded.actions, decoded.moves)
        timing = {"prepare_ms": 1e3 * (prepared - started), "engine_ms": 1e3 * (generated - prepared)}
        timing["total_ms"] = 1e3 * (perf_counter() - started)
        if observation.state is not None and not self.policy.reads_state:
            ignored = (*ignored, "state")
        if observation.seed is not None and not self.policy.reads_seed:
            ignored = (*ignored, "seed")
        token_ids = output if isinstance(output, list) else None
        return Acted(actions, token_ids, decoded.strays, saturated, ignored, timing, report)

    async def _steered(self, prompt: Any, steering: Any) -> tuple[Any, dict[str, Any], float]:
        state = self.state
        with state.metrics.watching() as outcome:
            _refuse_stream(steering)
            asked = steering if isinstance(steering, dict) else {}
            with state.metrics.building.time():
                ticket = await state.frontend.prepare({} if steering is None else steering)
            try:
                state.metrics.plans.set(state.frontend.resident)
                prepared = perf_counter()
                try:
                    output = await self._computed(prompt, ticket.key)
                except Exception:
                    if ticket.refused is not None:
                        raise ticket.refused from None
                    raise
                report = await Served(state, ticket, asked.get("report", "summary")).report()
                outcome("steered")
            finally:
                state.frontend.finish(ticket)
        return output, report, prepared

    async def _computed(self, prompt: Any, key: TicketKey | None) -> Any:
        return await self._compute(f"act-{uuid.uuid4().hex}", prompt, key)

    def _limited(self, actions: Floats, moves: NDArray[np.bool_]) -> tuple[Floats, int]:
        """Motions cut to ``max_action_delta``, and how many were."""
        limit = self.state.settings.max_action_delta
        if limit is None:
            return actions, 0
        over = (np.abs(actions) > limit) & moves
        count = int(over.sum())
        if count:
            self.metrics.saturated(count)
        return np.where(over, np.clip(actions, -limit, limit), actions), count


def _refuse_stream(steering: Any) -> None:
    if isinstance(steering, dict) and steering.get("stream_probes"):
        raise InvalidRequest("actions are no stream; report tokens tells the same", "steering.stream_probes")


def robots_of(app: FastAPI) -> Robots:
    robots = app.state.steersman_robots
    assert isinstance(robots, Robots)
    return robots
