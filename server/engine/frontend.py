"""The HTTP process's side of steering: resolving requests to plans, and keeping the workers' plans in step.

A plan is sent to the workers once and stays pinned there while this process may name it again. Pins of
plans that no request here uses are given up after a while, or at once when the workers run out of room.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from steersman.server.engine.prompts import RoleFinder, TextFinder
from steersman.server.settings import Settings
from steersman.steering import errors, spec
from steersman.steering.assets import Asset, ModelRef, ProfileMeta
from steersman.steering.directions import Library
from steersman.steering.plan import Plan
from steersman.steering.resolve import Resolver
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.store import Store
from steersman.steering.tokens import Selection

IDLE_SECONDS = 60.0
Rpc = Callable[..., Awaitable[list[Any]]]
"""(method, *arguments) -> every rank's answer."""


@dataclass
class Ticket:
    """One HTTP request's steering, from its preparation until its response."""

    PREFIX: ClassVar[str] = "steersman-ticket:"

    key: str
    plan: Plan
    messages: Sequence[Any] | None = None  # of a chat request
    selections: list[Selection] = field(default_factory=list)  # one per prompt, in the order of arrival
    tokenizer: Any = None
    render: Callable[[Sequence[Any]], str] | None = None

    def text_finder(self, ids: Sequence[int]) -> Callable[[str], list[int]] | None:
        return TextFinder(self.tokenizer, ids) if self.tokenizer is not None else None

    def role_finder(self, ids: Sequence[int]) -> Callable[[str], list[int]] | None:
        if self.tokenizer is None or self.messages is None or self.render is None:
            return None
        return RoleFinder(TextFinder(self.tokenizer, ids), self.messages, self.render)


@dataclass
class _Pin:
    users: int = 0
    last_used: float = 0.0


class Frontend:
    """One per process; made when the first steered request, or the server's start, needs it."""

    _instance: ClassVar[Frontend | None] = None
    _making: ClassVar[asyncio.Lock | None] = None

    def __init__(
        self,
        settings: Settings,
        model: ModelInfo,
        tokenizer: Any = None,
        rpc: Rpc | None = None,
        aliases: tuple[str, ...] = (),
        store: Store | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self._rpc = rpc
        self.store = store or Store(settings.store)
        self.resolver = Resolver(Library(self.store, model, aliases=aliases, any_model=settings.any_model))
        slug = re.sub(r"[^a-z0-9]+", "-", model.name.rsplit("/", 1)[-1].lower()).strip("-")
        self._default_name = f"server-default.{slug}"
        self.holder = uuid.uuid4().hex
        self.tickets: dict[str, Ticket] = {}
        self._pins: dict[str, _Pin] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    # -- making ------------------------------------------------------------------------------------

    @classmethod
    def current(cls) -> Frontend:
        assert cls._instance is not None, "made before any steered request"
        return cls._instance

    @classmethod
    def install(cls, frontend: Frontend) -> Frontend:
        cls._instance = frontend
        return frontend

    @classmethod
    async def of_async(cls, engine: Any) -> Frontend:
        """This process's frontend, made for an ``AsyncLLM`` if there is none yet."""
        if cls._instance is None:
            cls._making = cls._making or asyncio.Lock()
            async with cls._making:
                if cls._instance is None:
                    rpc = rpc_of(engine)
                    cls.install(_make(engine, await rpc("steersman_model"), rpc))
        return cls.current()

    @classmethod
    def of_sync(cls, engine: Any) -> Frontend:
        """The same for an ``LLMEngine``."""
        if cls._instance is None:
            cls.install(_make(engine, engine.collective_rpc("steersman_model"), None))
        return cls.current()

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """Calls a worker method on every rank of every engine that this process feeds."""
        assert self._rpc is not None, "only in a process with an AsyncLLM"
        return await self._rpc(method, *args)

    # -- preparing ---------------------------------------------------------------------------------

    async def prepare(self, data: object, **about: Any) -> Ticket:
        """The ticket of a steering object; its plan is resident on every worker. Raises SteeringError."""
        plan = await asyncio.to_thread(self.resolve, data)
        lock = self._loading.setdefault(plan.id, asyncio.Lock())
        async with lock:
            if plan.id not in self._pins:
                data_bytes = plan.to_bytes()
                for release in (self._idle(IDLE_SECONDS), self._idle(0.0)):
                    answers = await self.rpc("steersman_load_plan", data_bytes, self.holder, release)
                    self._forget(release)
                    if not _full(answers):
                        break
                _check(answers, plan)
                self._pins[plan.id] = _Pin()
        self._loading.pop(plan.id, None)
        return self._issue(plan, **about)

    def prepare_now(self, data: object, rpc: Any, **about: Any) -> Ticket:
        """The same without an event loop."""
        plan = self.resolve(data)
        if plan.id not in self._pins:
            release = self._idle(0.0)
            answers = rpc("steersman_load_plan", args=(plan.to_bytes(), self.holder, release))
            self._forget(release)
            _check(answers, plan)
            self._pins[plan.id] = _Pin()
        return self._issue(plan, **about)

    def resolve(self, data: object) -> Plan:
        return self.resolver.resolve(spec.parse(data), self.server_default())

    def server_default(self) -> spec.Steering | None:
        """The default profile. It is kept in the store, so that replicas and restarts agree on it."""
        try:
            stored = self.store.get(self._default_name)
        except errors.UnknownAsset:
            name = self.settings.default_profile
            return spec.Steering(profile=name) if name else None
        assert isinstance(stored.meta, ProfileMeta)
        return spec.parse(stored.meta.steering, "default")

    def set_default(self, data: object) -> None:
        """Replaces the default profile by a steering object that can be resolved, or by none."""
        if data is None:
            with suppress(errors.UnknownAsset):
                self.store.remove(self._default_name)
            return
        steering = spec.parse(data)
        self.resolver.resolve(steering)
        model = ModelRef(id=self.model.name, n_layers=self.model.n_layers, d_model=self.model.d_model)
        meta = ProfileMeta(
            name=self._default_name,
            kind="profile",
            model=model,
            steering=steering.model_dump(exclude_unset=True, mode="json"),
        )
        ref = self.store.add(Asset(meta))
        for info in self.store.list(kind="profile"):
            if info.name == self._default_name and info.ref != ref:
                self.store.remove(info.ref)

    def finish(self, ticket: Ticket) -> None:
        """The request that ``ticket`` was made for has ended, however it did."""
        if self.tickets.pop(ticket.key, None) is not None:
            pin = self._pins[ticket.plan.id]
            pin.users -= 1
            pin.last_used = time.monotonic()

    def _issue(self, plan: Plan, **about: Any) -> Ticket:
        ticket = Ticket(Ticket.PREFIX + uuid.uuid4().hex, plan, tokenizer=self.tokenizer, **about)
        self._pins[plan.id].users += 1
        self.tickets[ticket.key] = ticket
        return ticket

    def _idle(self, seconds: float) -> list[str]:
        """Plans that no request here has used for so long."""
        now = time.monotonic()
        return [i for i, pin in self._pins.items() if pin.users == 0 and now - pin.last_used >= seconds]

    def _forget(self, plan_ids: Sequence[str]) -> None:
        for plan_id in plan_ids:
            self._pins.pop(plan_id, None)


def rpc_of(engine: Any) -> Rpc:
    """``AsyncLLM.collective_rpc`` answers for the first data-parallel engine only; this asks all of them.

    The contract with vLLM: ``engine.engine_core`` is an async core client whose ``core_engines`` are the engines
    that it feeds, each reached by ``_call_utility_async(method, *args, engine=...)``, as ``collective_rpc`` is.
    """
    core = engine.engine_core

    async def rpc(method: str, *args: Any) -> list[Any]:
        calls = (
            core._call_utility_async("collective_rpc", method, None, args, None, engine=one)
            for one in core.core_engines
        )
        return [answer for answers in await asyncio.gather(*calls) for answer in answers]

    return rpc


def _make(engine: Any, answers: Sequence[Any], rpc: Rpc | None) -> Frontend:
    config = engine.vllm_config.model_config
    served = config.served_model_name
    aliases = tuple([served] if isinstance(served, str) else served or ())
    tokenizer = None if config.skip_tokenizer_init else engine.get_tokenizer()
    return Frontend(Settings.from_env(), merge_models(answers), tokenizer, rpc, aliases)


def merge_models(answers: Sequence[Any]) -> ModelInfo:
    """One model from what each rank has of it."""
    parts = [ModelInfo.from_json(a) for a in answers if a is not None]
    sites: dict[Site, dict[int, int]] = {}
    for part in parts:
        for site, widths in part.sites.items():
            sites.setdefault(site, {}).update(widths)
    first = parts[0]
    d_head = max(p.d_head for p in parts)
    return ModelInfo(
        first.name, first.architecture, first.n_layers, first.d_model, first.n_heads, d_head, sites, first.fingerprint
    )


def _full(answers: Sequence[Any]) -> bool:
    return any(a.get("code") == errors.CapacityExceeded.code for a in answers)


def _check(answers: Sequence[Any], plan: Plan) -> None:
    for answer in answers:
        if "error" in answer:
            failed = errors.CapacityExceeded if _full([answer]) else errors.EngineUnsteered
            raise failed(answer["error"])
        if answer["plan"] != plan.id:
            raise errors.EngineUnsteered("a worker read another plan than was sent")
