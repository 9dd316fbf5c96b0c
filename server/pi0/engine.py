"""Requests to a π0 in this process: the steered ones' tickets, batches of those that wait, and what the HTTP side asks.

While one batch is computed, in a thread of its own, those that come wait for the next, up to ``limit`` of them
together. A batch that has begun is not joined. A request whose robot has gone leaves the queue; from a running batch
nothing is taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from steersman.server.engine.encoders import Encoders
from steersman.server.engine.frontend import Answer, Frontend, Generated, TicketKey
from steersman.server.engine.wire import make_args
from steersman.server.pi0 import parts
from steersman.server.pi0.model import Pi0Model
from steersman.server.policies.pi0 import Pi0Prompt
from steersman.server.policies.policy import Floats
from steersman.server.settings import Settings
from steersman.steering import spec
from steersman.steering.errors import EngineUnsteered, InvalidRequest, SteeringError
from steersman.steering.plan import Plan
from steersman.steering.store import Store
from steersman.steering.tokens import Prompt, Selection

logger = logging.getLogger(__name__)


class Pi0Frontend(Frontend):
    """Refuses what a model in two parts cannot do."""

    def __init__(self, settings: Settings, model: Pi0Model, tokenizer: Any, rpc: Any, aliases: tuple[str, ...]) -> None:
        super().__init__(settings, model.info, tokenizer, rpc, aliases)
        self.behind_routes = True
        self.told = {"parts": model.parts()}
        self._n_backbone = model.n_backbone

    def resolve(self, data: object) -> Plan:
        plan = super().resolve(data)
        parts.check(plan, self._n_backbone)
        return plan

    def with_signals(self, asked: spec.Steering) -> tuple[Plan, dict[str, Any]]:
        if asked.signals:
            raise InvalidRequest("are of generated tokens; this policy's actions are numbers", "steering.signals")
        return super().with_signals(asked)

    def selection(self, plan: Plan, prompt: Prompt) -> Selection:
        return parts.restricted(plan, super().selection(plan, prompt), self._n_backbone)


@dataclass
class _Waiting:
    prompt: Pi0Prompt
    done: asyncio.Future[Floats]


class Pi0Engine:
    """One model. Its coroutines are of one event loop."""

    def __init__(self, model: Pi0Model, settings: Settings, limit: int) -> None:
        """``limit``: observations in one batch."""
        self.model = model
        self.limit = limit
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._running: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "pi0")
        encoders = Encoders(lambda ref: Store(settings.store).get(ref), model.device)
        model.runtime.plans.on_load = encoders.load
        self._methods: Mapping[str, Callable[..., Any]] = {
            "steersman_load_plan": self._load_plan,
            "steersman_reports": model.runtime.reports,
            "steersman_probes": model.runtime.probe_rows,
        }

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """What a :class:`Frontend` asks its workers; there is one. Waits for a pass at most."""

        def call() -> Any:
            with self.model.lock:
                return self._methods[method](*args)

        return [await asyncio.to_thread(call)]

    def compute(self, frontend: Frontend) -> Callable[[str, Pi0Prompt, TicketKey | None], Any]:
        """How observations become the model's actions, [chunk, max_action_dim]."""

        async def compute(name: str, prompt: Pi0Prompt, key: TicketKey | None) -> Floats:
            if key is None:
                return await self._computed(name, prompt)
            await asyncio.to_thread(self.steer, frontend, name, prompt, key)
            try:
                return await self._computed(name, prompt)
            finally:
                await asyncio.to_thread(self.forget, name)

        return compute

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    # -- steering ---------------------------------------------------------------------------------

    def _load_plan(self, data: bytes, holder: str, release: list[str]) -> dict[str, Any]:
        n = self.model.n_backbone
        return self.model.runtime.plans.load(data, holder, release, lambda plan: parts.check(plan, n))

    def steer(self, frontend: Frontend, name: str, prompt: Pi0Prompt, key: TicketKey) -> None:
        """A steered request is going to be computed. Raises InvalidRequest for what its prompt does not have."""
        ticket = frontend.tickets[key]
        ids = list(prompt.token_ids)
        try:
            selection = frontend.selection(ticket.plan, Prompt(ids, ticket.text_finder(ids), None, prompt.images))
        except SteeringError as error:
            error.param = error.param or "steering"
            raise
        ticket.selections.append(selection)
        total = len(ids) + self.model.steps * self.model.tokens
        ticket.sequences[name] = Generated(name, 0, lambda: total, lambda: Answer([], []))
        args = make_args(ticket.plan, selection, str(key), ticket.whole)
        with self.model.lock:
            self.model.runtime.add_request(name, args)

    def forget(self, name: str) -> None:
        """It has been; its report is kept until it is asked for."""
        with self.model.lock:
            self.model.runtime.remove_request(name)

    # -- batches ----------------------------------------------------------------------------------

    async def _computed(self, name: str, prompt: Pi0Prompt) -> Floats:
        entry = _Waiting(prompt, asyncio.get_running_loop().create_future())
        self._waiting[name] = entry
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            return await entry.done
        finally:
            self._waiting.pop(name, None)

    async def _run(self) -> None:
        """Computes batches until nobody waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = {name: self._waiting.pop(name) for name in list(self._waiting)[: self.limit]}
                try:
                    prompts = {name: entry.prompt for name, entry in batch.items()}
                    found = await loop.run_in_executor(self._thread, self.model.sample, prompts)
                except Exception:
                    logger.exception("a batch of %d observations failed", len(batch))
                    for entry in batch.values():
                        if not entry.done.done():
                            entry.done.set_exception(EngineUnsteered("the model failed to compute this observation"))
                    continue
                for entry, actions in zip(batch.values(), found, strict=True):
                    if not entry.done.done():  # its robot has gone
                        entry.done.set_result(actions)
        finally:
            self._running = None
