"""The HTTP process's side of steering: resolving requests to plans, and keeping the workers' plans in step.

A plan is sent to the workers once and stays pinned there while this process may name it again. Pins of
plans that no request here uses are given up after a while, or at once when the workers run out of room.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, NamedTuple

from steersman.server.asked_signals import probe_column, wanted
from steersman.server.detection import Detection
from steersman.server.engine.captures import Wanted
from steersman.server.engine.prompts import RoleFinder, TextFinder
from steersman.server.kept import KeptCaptures
from steersman.server.settings import Settings
from steersman.steering import conflict, errors, spec
from steersman.steering.assets import Asset, ModelRef, ProfileMeta
from steersman.steering.directions import Library
from steersman.steering.plan import Plan
from steersman.steering.resolve import Resolver
from steersman.steering.signals import HEDGES
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.store import Store
from steersman.steering.tokens import Prompt, Selection

IDLE_SECONDS = 60.0  # after which the pin of a plan that nothing uses is given up with the next plan sent
MAX_TRACED = 1024  # numbers for each token that a report may tell of
DEFAULT_SECONDS = 1.0  # for so long a default profile that another process has changed may go unseen
DEFAULT_NAME = "server-default."  # how the names of default profiles begin in the store, one for each model
Rpc = Callable[..., Awaitable[list[Any]]]
"""(method, *arguments) -> every rank's answer."""


class TicketKey(str):
    """Names a ticket. A type of its own: what a client writes is a plain string, whatever it spells."""


@dataclass
class _Pin:
    """A plan that the workers keep for this process."""

    loaded: asyncio.Task[None] | None = None  # None: it has been loaded
    users: int = 0
    last_used: float = 0.0


class Answer(NamedTuple):
    """What was generated, and ln p of each token where the ticket asks for conflict."""

    token_ids: list[int]
    logprobs: list[float]


class Generated(NamedTuple):
    """One sequence that is generated for a request."""

    prompt: str  # names the prompt among those of the request
    number: int  # among the sequences of that prompt
    positions: Callable[[], int]  # how many tokens have been fed in for what the response says of it
    answer: Callable[[], Answer]
    lora: Any = None  # vLLM's, as the request names it
    priority: int = 0  # of its scheduling


@dataclass
class Ticket:
    """One HTTP request's steering, from its preparation until its response."""

    key: TicketKey
    plan: Plan
    pin: _Pin
    messages: Sequence[Any] | None = None  # of a chat request
    selections: list[Selection] = field(default_factory=list)  # one per prompt, in the order of arrival
    tokenizer: Any = None
    render: Callable[[Sequence[Any]], str] | None = None
    whole: bool = False  # whether every token is told of
    capture: Wanted | None = None  # what of its prompt is captured
    signals: Mapping[str, Any] | None = None  # what is told of the generated tokens
    conflict: bool = False  # whether its answer is replayed without the images
    without_images: Callable[[], Awaitable[Any]] | None = None  # makes ready the prompt of the chat without them
    prompt_tokens: int | None = None  # of a replay, how many are the prompt; those after it were generated
    refused: errors.SteeringError | None = None  # why a prompt of the request cannot be steered
    sequences: dict[str, Generated] = field(default_factory=dict)  # by the engine's id

    def order(self) -> list[str]:
        """The sequences' ids in the order of the response's choices."""
        prompts = {name: i for i, name in enumerate(dict.fromkeys(s.prompt for s in self.sequences.values()))}
        return sorted(self.sequences, key=lambda i: (prompts[self.sequences[i].prompt], self.sequences[i].number))

    def text_finder(self, ids: Sequence[int]) -> Callable[[str], list[int]] | None:
        return TextFinder(self.tokenizer, ids) if self.tokenizer is not None else None

    def role_finder(self, ids: Sequence[int]) -> Callable[[str], list[int]] | None:
        if self.tokenizer is None or self.messages is None or self.render is None:
            return None
        return RoleFinder(TextFinder(self.tokenizer, ids), self.messages, self.render)


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
        self.told: Mapping[str, Any] = {}  # what GET /v1/steering/model says beside the model itself
        self.tokenizer = tokenizer
        self._rpc = rpc
        self.store = store or Store(settings.store)
        self.kept = KeptCaptures(Path(settings.captures), settings.max_kept_captures_mb << 20)
        library = Library(self.store, model, aliases=aliases, any_model=settings.any_model, captures=self.kept)
        self.resolver = Resolver(library)
        slug = re.sub(r"[^a-z0-9]+", "-", model.name.rsplit("/", 1)[-1].lower()).strip("-")
        self._default_name = f"{DEFAULT_NAME}{slug}"
        self.holder = uuid.uuid4().hex
        self.behind_routes = False  # whether HTTP routes prepare every steered request and report on it
        self.resident = 0  # plans on the workers, when the last one was loaded
        self.begun = 0  # sequences that this process has given to the engine, steered or not
        self.tickets: dict[str, Ticket] = {}
        self._pins: dict[str, _Pin] = {}
        self.detector: Detection | None = None  # scores the answer of every steered request
        self._abandoned: set[str] = set()  # plans that some worker may still have pinned for us
        self._default: tuple[float, spec.Steering | None] | None = None  # when it was read, and what
        self._reading_default = Lock()

    # -- making ------------------------------------------------------------------------------------

    @classmethod
    def current(cls) -> Frontend:
        assert cls._instance is not None, "made before any steered request"
        return cls._instance

    @classmethod
    def count(cls) -> None:
        """One more sequence goes to the engine."""
        if cls._instance is not None:
            cls._instance.begun += 1

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
        """The ticket of a steering object; its plan is resident on every worker. Raises SteeringError.

        Whoever gets it calls :meth:`finish` in the end.
        """
        plan, content, asked = await asyncio.to_thread(self._build, data, about.get("messages"))
        pin = self._pins.get(plan.id)
        if pin is None:
            pin = self._pins[plan.id] = _Pin()
            pin.loaded = asyncio.create_task(self._load(plan, content))
        ticket = self._issue(plan, pin, **asked, **about)
        if pin.loaded is not None:
            try:
                await asyncio.shield(pin.loaded)  # others may wait for it too
            except BaseException:
                self.finish(ticket)
                raise
        return ticket

    def prepare_now(self, data: object, rpc: Any, **about: Any) -> Ticket:
        """The same without an event loop."""
        plan, content, asked = self._build(data)
        pin = self._pins.get(plan.id)
        if pin is None:
            release = self._unpin(0.0)
            try:
                self._check(rpc("steersman_load_plan", args=(content, self.holder, release)), plan)
            except BaseException:
                self._abandoned |= {plan.id, *release}
                raise
            pin = self._pins[plan.id] = _Pin()
        return self._issue(plan, pin, **asked, **about)

    def resolve(self, data: object) -> Plan:
        asked = spec.parse(data)
        return self.resolver.resolve(asked, self._recent_default() if asked.default else None)

    def selection(self, plan: Plan, prompt: Prompt) -> Selection:
        """Which tokens of a request with this prompt the plan's interventions edit."""
        return Selection.build(plan.selectors, prompt, [f"{step.path}.tokens" for step in plan.steps])

    def _build(self, data: object, messages: Sequence[Any] | None = None) -> tuple[Plan, bytes, dict[str, Any]]:
        """The plan, its content if the workers may not have it, and what is to be told of, for the ticket.

        ``messages``: of a chat.
        """
        asked = spec.parse(data)
        conflict.check_images(asked.signals, messages)
        plan, signals = self.with_signals(asked)
        if asked.every_token:
            _refuse_wide(plan, "stream_probes" if asked.stream_probes else "report")
        if asked.stream_probes and not plan.probes:
            raise errors.InvalidRequest("needs probes", "steering.stream_probes")
        content = plan.to_bytes() if plan.id not in self._pins else b""
        names = (*asked.signals, *(self.detector.signals if self.detector is not None else ()))
        replays = conflict.SIGNAL in names and conflict.has_images(messages or ())
        return plan, content, {"whole": asked.every_token, "signals": signals, "conflict": replays}

    def with_signals(self, asked: spec.Steering) -> tuple[Plan, dict[str, Any]]:
        """The plan, with the probes that the detector needs, and the signals of the request and the detector."""
        plan, detector = self.resolve(asked), self.detector
        if detector is None and not asked.signals:
            return plan, {}
        if detector is not None:
            lacking = [p for p in detector.probes if probe_column(p.vector, p.layer, plan) is None]
            if lacking:
                probes = [*asked.probes, *(spec.Probe(vector=p.vector, layers=[p.layer]) for p in lacking)]
                plan = self.resolve(asked.model_copy(update={"probes": probes}))
        names = dict.fromkeys([*asked.signals, *(detector.signals if detector is not None else ())])
        hedges = detector.hedges if detector is not None else HEDGES
        with errors.located("steering.signals"):
            return plan, wanted(names, plan, self.model, self.tokenizer, hedges)

    async def _load(self, plan: Plan, content: bytes) -> None:
        """Sends a plan to the workers, making room for it as far as needed."""
        sent = {plan.id}
        try:
            for idle in (IDLE_SECONDS, 0.0):
                release = self._unpin(idle)
                sent |= {*release}
                answers = await self.rpc("steersman_load_plan", content or plan.to_bytes(), self.holder, release)
                if not _full(answers):
                    break
            self._check(answers, plan)
            self._pins[plan.id].loaded = None
        except BaseException:
            self._abandoned |= sent
            del self._pins[plan.id]
            raise

    def _check(self, answers: Sequence[Any], plan: Plan) -> None:
        for answer in answers:
            if "error" in answer:
                raise errors.codes().get(answer["code"], errors.EngineUnsteered)(answer["error"], "steering")
            if answer["plan"] != plan.id:
                raise errors.EngineUnsteered("a worker read another plan than was sent")
        self.resident = max((answer.get("resident", 0) for answer in answers), default=0)

    def _unpin(self, idle: float) -> list[str]:
        """Gives up the plans that no request here has used for so long: their ids, to be told to the workers.

        They are forgotten before the workers are told, so that a request that names one meanwhile sends it again.
        """
        now = time.monotonic()
        unused = [i for i, p in self._pins.items() if not p.users and p.loaded is None and now - p.last_used >= idle]
        for plan_id in unused:
            del self._pins[plan_id]
        release = [*unused, *(self._abandoned - self._pins.keys())]
        self._abandoned.clear()
        return release

    def _issue(self, plan: Plan, pin: _Pin, **about: Any) -> Ticket:
        ticket = Ticket(TicketKey(uuid.uuid4().hex), plan, pin, tokenizer=self.tokenizer, **about)
        pin.users += 1
        self.tickets[ticket.key] = ticket
        return ticket

    def again(self, ticket: Ticket, prompt_tokens: int) -> Ticket:
        """A ticket for the same plan, whose request is a prompt of so many tokens and an answer after it."""
        about = {"messages": ticket.messages, "render": ticket.render, "prompt_tokens": prompt_tokens}
        return self._issue(ticket.plan, ticket.pin, **about)

    def finish(self, ticket: Ticket) -> None:
        """The request that ``ticket`` was made for has ended, however it did. Again: nothing."""
        if self.tickets.pop(ticket.key, None) is not None:
            ticket.pin.users -= 1
            ticket.pin.last_used = time.monotonic()

    def use_detector(self, ref: str) -> None:
        """Scores answers by a stored detector from now on. Raises SteeringError for one that does not fit."""
        self.detector = Detection(*self.resolver.library.detector(ref))
        try:
            self.with_signals(spec.Steering(default=False))
        except errors.SteeringError:
            self.detector = None
            raise

    # -- the default profile -----------------------------------------------------------------------

    async def default(self) -> spec.Steering | None:
        """The default profile; costs nothing most of the time, as every request asks for it."""
        known = self._default
        if known is not None and time.monotonic() - known[0] < DEFAULT_SECONDS:
            return known[1]
        return await asyncio.to_thread(self._recent_default)

    def _recent_default(self) -> spec.Steering | None:
        with self._reading_default:
            if self._default is None or time.monotonic() - self._default[0] >= DEFAULT_SECONDS:
                self._default = time.monotonic(), self.server_default()
            return self._default[1]

    def server_default(self) -> spec.Steering | None:
        """The default profile. It is kept in the store, so that replicas and restarts agree on it.

        What was set there goes before the setting, also when that was none.
        """
        try:
            stored = self.store.get(self._default_name)
        except errors.UnknownAsset:
            name = self.settings.default_profile
            return spec.Steering(profile=name) if name else None
        if not isinstance(stored.meta, ProfileMeta):
            raise errors.AssetKindMismatch(f"{stored.ref} is not a profile", "default")
        found = spec.parse(stored.meta.steering, "default")
        return found if found.profile or found.interventions or found.probes else None

    def set_default(self, data: object) -> None:
        """Replaces the default profile by a steering object that can be resolved; None: by none."""
        steering = spec.Steering() if data is None else spec.parse(data)
        self.resolver.resolve(steering)
        if data is None and not self.settings.default_profile:
            with suppress(errors.UnknownAsset):
                self.store.remove(self._default_name)
        else:
            self._store_default(steering)
        with self._reading_default:
            self._default = None

    def _store_default(self, steering: spec.Steering) -> None:
        model = ModelRef(id=self.model.name, n_layers=self.model.n_layers, d_model=self.model.d_model)
        content = steering.model_dump(exclude_unset=True, mode="json")
        ref = self.store.add(Asset(ProfileMeta(name=self._default_name, kind="profile", model=model, steering=content)))
        for info in self.store.list(kind="profile"):
            if info.name == self._default_name and info.ref != ref:
                self.store.remove(info.ref)

    def used_by_default(self) -> set[str]:
        """The refs (name@version) of the assets that the default profile names, itself included."""
        default = self.server_default()
        if default is None:
            return set()
        found = set()
        with suppress(errors.SteeringError):  # what is broken already may be deleted
            for ref in self.resolver.names(default):
                found.add(self.store.info(ref).ref)
        return found


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


def _refuse_wide(plan: Plan, field: str) -> None:
    """A worker keeps every number of every token until the request has ended."""
    numbers = len(plan.probes) + sum(len(step.places) for step in plan.steps)
    if numbers > MAX_TRACED:
        raise errors.OutOfRange(
            f"{numbers} numbers for each token, one for each layer of a probe or an edit; at most {MAX_TRACED}",
            f"steering.{field}",
        )


def _full(answers: Sequence[Any]) -> bool:
    return any(a.get("code") == errors.CapacityExceeded.code for a in answers)
