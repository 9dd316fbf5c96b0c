"""Capturing the served model's activations while it goes on serving.

Each prompt is one engine request of its own, which computes all of the prompt and one token, through vLLM's scheduler
and beside everybody else's. The workers copy the wanted rows as their layers run (``engine/captures.py``); when the
request has ended, they are fetched by RPC, a piece at a time, so that no step waits long for it.

What all captures of this process hold on the workers together is bounded by ``--steering-max-capture-mb``, which is
also the most that one may take: it is refused before anything runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steersman.server import prompting
from steersman.server.engine.captures import Wanted
from steersman.server.engine.frontend import Ticket
from steersman.server.engine.generate import expanded, prefill
from steersman.server.policies.policy import Picture, PolicyPrompt
from steersman.server.prompting import Asked, Given
from steersman.server.routes.served import Served
from steersman.server.state import SteeringState
from steersman.steering.activations import Captured, CapturedPrompt, Floats, Reduction, cut, nbytes, places_of
from steersman.steering.errors import EngineUnsteered, InvalidRequest, PayloadTooLarge, located
from steersman.steering.plan import Place
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.spec import Tokens
from steersman.steering.tokens import select

logger = logging.getLogger(__name__)

__all__ = ["Captured", "CapturedPrompt", "capture"]

AT_ONCE = 8  # engine requests of one capture
PIECE = 8 << 20  # bytes that are fetched between two steps of the engine
BARE = {"default": False}  # the model as it is


async def capture(
    state: SteeringState,
    prompts: Sequence[Given],
    sites: Sequence[Site],
    layers: Sequence[int] | None = None,
    tokens: Tokens = "prompt",
    reduce: Reduction = "none",
    steering: Any = None,
    refuse: Callable[[int], None] | None = None,
) -> Captured:
    """Activations in float32 at ``sites``, after the edits that are made there, of the selected tokens of each prompt.

    prompts: text, token ids, chat messages (of text), which get the server's chat template, or a policy's prompts.
    layers: None for all that a site has.
    tokens: selects among a prompt's tokens; of what would be generated nothing is computed.
    reduce: one row for each prompt, the ``mean`` of its selected tokens or the ``last`` of them.
    steering: a steering object, and the activations are those under it; None: the bare model, also where the server
        has a default profile.
    refuse: is told how many bytes it will be before anything runs, and may raise.
    Raises SteeringError, whose param is ``prompts[i]``, ``sites``, ``layers``, ``tokens`` or within ``steering``;
    PayloadTooLarge before anything runs. Cancelled, it ends the requests that it has begun.
    """
    if isinstance(steering, dict) and steering.get("stream_probes"):
        raise InvalidRequest("a capture is no stream", "steering.stream_probes")
    model = state.frontend.model
    places = _places(model, sites, layers)
    plan = None if steering is None else await asyncio.to_thread(state.frontend.resolve, steering)
    asked = await _read(state, prompts)
    positions = await asyncio.to_thread(_positions, asked, tokens, reduce)
    widths = [model.width(place.site, place.layer) for place in places]
    size = nbytes([len(chosen) for chosen in positions], widths, reduce)
    _refuse_large(size, state.settings.max_capture_mb)
    if refuse is not None:
        await asyncio.to_thread(refuse, size)
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(i: int) -> CapturedPrompt:
        wanted = Wanted(tuple(places), tuple(positions[i]), reduce == "mean")
        async with slots:
            rows = await _run(state, f"prompts[{i}]", asked[i], wanted, steering)
        if reduce == "last":
            rows = {place: row[0] for place, row in rows.items()}
        return CapturedPrompt(asked[i].token_ids, positions[i], rows)

    async with state.capturing.take(size):
        found = await _all([one(i) for i in range(len(asked))])
    return Captured(model.name, places, found, reduce, None if plan is None else plan.id)


def _places(model: ModelInfo, sites: Sequence[Site], layers: Sequence[int] | None) -> list[Place]:
    if not sites:
        raise InvalidRequest("name at least one site", "sites")
    if layers is not None and not layers:
        raise InvalidRequest("name at least one layer", "layers")
    found: dict[str, Sequence[int]] = {}
    for site in sites:
        if layers is None and not model.sites.get(site):
            with located("sites"):
                model.width(site, 0)
        with located("layers"):
            for layer in layers or ():
                model.width(site, layer)
        found[site.value] = sorted(set(model.sites[site] if layers is None else layers))
    return places_of(found)


async def _read(state: SteeringState, prompts: Sequence[Given]) -> list[Asked]:
    if not prompts:
        raise InvalidRequest("give at least one prompt", "prompts")
    options, room = prompting.template_options(state.serving), state.engine.model_config.max_model_len - 1
    out = []
    for i, given in enumerate(prompts):
        with located(f"prompts[{i}]"):
            if isinstance(given, PolicyPrompt):
                out.append(Asked(await expanded(state.engine, given.token_ids, given.pictures), pictured=given))
            else:
                _refuse_pictures(given)
                out.append(await asyncio.to_thread(prompting.read, given, state.frontend.tokenizer, options))
            length = out[-1].prompt.length
            if length > room:
                raise InvalidRequest(f"has {length} tokens; there is room for {room}, as one more is generated")
    return out


def _refuse_pictures(given: str | Sequence[int] | Sequence[Mapping[str, Any]]) -> None:
    for message in given if not isinstance(given, str) else ():
        parts = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(parts, list) and not all(isinstance(p, dict) and p.get("type", "text") == "text" for p in parts):
            raise InvalidRequest("only messages of text can be captured")


def _positions(asked: Sequence[Asked], tokens: Tokens, reduce: Reduction) -> list[list[int]]:
    out = []
    for i, one in enumerate(asked):
        mask, _ = select(tokens, one.prompt)
        chosen = mask.nonzero()[0].tolist()
        if not chosen:
            raise InvalidRequest(f"selects no token of prompts[{i}], which has {one.prompt.length}", "tokens")
        out.append(chosen[-1:] if reduce == "last" else chosen)
    return out


def _refuse_large(size: int, limit: int) -> None:
    if size > limit << 20:
        raise PayloadTooLarge(
            f"the capture would take {size} bytes; at most {limit << 20} (--steering-max-capture-mb): ask for fewer "
            "prompts, tokens, layers or sites, or reduce the tokens",
            "prompts",
        )


async def _all(tasks: Sequence[Any]) -> list[CapturedPrompt]:
    """Every result, in order; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in running]


async def _run(state: SteeringState, name: str, asked: Asked, wanted: Wanted, steering: Any) -> dict[Place, Floats]:
    frontend = state.frontend
    about = {"messages": asked.messages, "render": asked.render, "capture": wanted}
    ticket = await frontend.prepare(BARE if steering is None else steering, **about)
    try:
        try:
            ids, pictures = asked.token_ids, list[Picture]()
            if asked.pictured is not None:
                ids, pictures = asked.pictured.token_ids, asked.pictured.pictures
            with located(name):
                await prefill(state.engine, f"capture-{uuid.uuid4().hex}", ids, pictures, ticket.key)
        except Exception:
            if ticket.refused is not None:
                raise ticket.refused from None
            raise
        rows = await _fetch(state, ticket, wanted)
        if steering is not None:
            await Served(state, ticket, "none").report()
        return rows
    finally:
        frontend.finish(ticket)
        try:
            await frontend.rpc("steersman_drop_captured", str(ticket.key))
        except Exception:  # what went wrong before it is worth more to whoever waits
            logger.warning("the rows of a capture stay on the workers for a while", exc_info=True)


async def _fetch(state: SteeringState, ticket: Ticket, wanted: Wanted) -> dict[Place, Floats]:
    """Every rank has some of the places, or none of them."""
    rpc, key = state.frontend.rpc, str(ticket.key)
    answers = await rpc("steersman_captured", key)
    for answer in answers:
        if answer is not None and answer["error"]:
            raise EngineUnsteered(answer["error"])
    arrays = [[] if answer is None else answer["arrays"] for answer in answers]
    sizes = [sum(4 * math.prod(shape) for _, _, *shape in told) for told in arrays]
    parts: list[list[bytes]] = [[] for _ in answers]
    for at in range(0, max(sizes, default=0), PIECE):
        for part, more in zip(parts, await rpc("steersman_captured_bytes", key, at, at + PIECE), strict=True):
            part.append(more)
    found: dict[Place, Floats] = {}
    for told, size, part in zip(arrays, sizes, parts, strict=True):
        data = b"".join(part)
        if len(data) != size:
            raise EngineUnsteered(f"a worker gave {len(data)} of {size} bytes of captured activations")
        places = [Place(int(layer), Site(site)) for layer, site, *_ in told]
        found.update(zip(places, cut(data, [tuple(shape) for _, _, *shape in told]), strict=True))
    if missing := [place for place in wanted.places if place not in found]:
        raise EngineUnsteered(f"layer {missing[0].layer} {missing[0].site.value} was not captured")
    return found
