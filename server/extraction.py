"""The extraction job: contrast examples through the served model, and a direction from what they did there.

Every example is one request of the engine's own batch, a few at a time, so other requests go on beside them. What is
read of an example is reduced to one row per layer on the way: a job holds examples × layers × width numbers.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from steersman.server import inventory
from steersman.server.captures import Captured
from steersman.server.extraction_spec import Example, ExtractSpec, Heads
from steersman.server.jobs import Progress
from steersman.server.state import SteeringState
from steersman.steering.assets import Asset, ModelRef, parse_metadata
from steersman.steering.directions import chosen_layers
from steersman.steering.errors import InvalidRequest, PayloadTooLarge, SteeringError, located
from steersman.steering.extraction_directions import mean_shifts
from steersman.steering.extraction_heads import find_heads, head_assets
from steersman.steering.extraction_methods import HeldOut, extract, held_out
from steersman.steering.plan import Place
from steersman.steering.sites import ModelInfo
from steersman.steering.spec import TokenSet

CONCURRENT: Final = 8  # examples in the engine at once
Capture = Callable[..., Awaitable[Captured]]
"""``captures.capture``."""


def checked_layers(spec: ExtractSpec, state: SteeringState) -> tuple[int, ...]:
    """The layers that are read, ascending; raises for what the served model or the settings do not allow."""
    model = state.frontend.model
    if state.frontend.tokenizer is None:
        raise InvalidRequest("this server has no tokenizer, so it takes no texts", "kind")
    with located("layers"):
        if spec.layers == "all":
            layers = tuple(sorted(model.sites.get(spec.at, ()))) or (0,)
        else:
            layers = tuple(sorted(chosen_layers(spec.layers, (), model.n_layers)))
        widths = {model.width(spec.at, layer) for layer in layers}
    if len(widths) > 1:
        raise InvalidRequest(f"{spec.at.value} is not as wide at every one of these layers", "layers")
    if spec.method == "heads":
        heads, known = spec.heads or Heads(), len(layers) * model.n_heads
        if heads.k > known:
            raise InvalidRequest(f"k is {heads.k}; there are {known} heads in these layers", "heads.k")
    count = sum(map(len, spec.sides()))
    size, limit = count * len(layers) * widths.pop() * 4, state.settings.max_job_mb
    if size > limit << 20:
        needed = f"{count} examples at {len(layers)} layers take {math.ceil(size / 2**20)} MiB"
        raise PayloadTooLarge(f"{needed}; at most {limit} (--steering-max-job-mb): name fewer layers", "layers")
    return layers


async def run(spec: ExtractSpec, state: SteeringState, capture: Capture, progress: Progress) -> dict[str, Any]:
    """Stores what the job makes; its result is what `steersman.clients.extraction_picture` draws.

    `assets`: refs of what was stored. With a number for each of `layers`: `held_out`, see `HeldOut`, or None; `norms`,
    of the directions by their asset's ref, none of heads; `read_norms`, the mean norm of what was read of an example.
    """
    layers = checked_layers(spec, state)
    sides = spec.sides()
    progress.expect(sum(map(len, sides)), "examples")
    positive, negative = [
        await _states(examples, layers, spec, state, capture, progress, part)
        for examples, part in zip(sides, ("positive", "negative"), strict=True)
    ]
    try:
        assets, told = await asyncio.to_thread(_assets, spec, state.frontend.model, layers, positive, negative)
    except ValueError as error:  # what the methods say of states that hold no direction
        raise InvalidRequest(str(error), "method") from None
    refs = [await asyncio.to_thread(state.frontend.store.add, asset) for asset in assets]
    await inventory.count(state)
    norms = {
        ref: asset.tensors["vectors"].norm(dim=-1).tolist()
        for ref, asset in zip(refs, assets, strict=True)
        if spec.method != "heads"
    }
    return {
        "assets": refs,
        "model": state.frontend.model.name,
        "method": spec.method,
        "site": spec.at.value,
        "token": spec.token,
        "examples": {"positive": len(positive), "negative": len(negative)},
        "layers": list(layers),
        "held_out": told and told.to_json(),
        "norms": norms,
        "read_norms": torch.cat([positive, negative]).norm(dim=-1).mean(0).tolist(),
    }


def token_ids(tokenizer: Any, prompt: Example | None, example: Example) -> tuple[list[int], int]:
    """An example's tokens, and how many of them are its prompt's."""
    before = [] if prompt is None else _encoded(tokenizer, prompt)
    if isinstance(example, str):
        text = list(tokenizer.encode(example, add_special_tokens=not before))
    else:
        text = _encoded(tokenizer, example)
    if not text:
        raise InvalidRequest("has no tokens")
    return before + text, len(before)


def positions(token: str | int, length: int, prompt_length: int) -> TokenSet:
    """The positions that are read.

    A mean leaves out the prompt, and a sequence's first token unless it is the only one: in most models it is an
    attention sink, whose huge state would enter with weight 1/length and so leak the texts' lengths into the direction.
    """
    if token == "mean":
        return TokenSet(ranges=[(min(max(prompt_length, 1), length - 1), length)])
    at = length - 1 if token == "last" else int(token)
    if not -length <= at < length:
        raise InvalidRequest(f"position {at} is not one of {length} tokens")
    return TokenSet(positions=[at])


async def _states(
    examples: Sequence[tuple[Example | None, Example]],
    layers: tuple[int, ...],
    spec: ExtractSpec,
    state: SteeringState,
    capture: Capture,
    progress: Progress,
    part: str,
) -> Tensor:
    """[n, L, d] float32."""
    places = [Place(layer, spec.at) for layer in layers]
    out = np.empty((len(examples), len(layers), state.frontend.model.width(spec.at, layers[0])), np.float32)
    tokenizer, left = state.frontend.tokenizer, iter(enumerate(examples))

    async def work() -> None:
        for i, (prompt, example) in left:
            try:
                ids, before = await asyncio.to_thread(token_ids, tokenizer, prompt, example)
                tokens = positions(spec.token, len(ids), before)
                found = await capture(state, [ids], [spec.at], layers, tokens, "mean")
            except SteeringError as error:  # where a capture was wrong is no field of this job
                error.param = f"pairs[{i}].{part}" if spec.pairs is not None else f"{part}[{i}]"
                raise
            out[i] = [found.prompts[0].rows[place] for place in places]
            progress.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the others were cancelled, or failed beside it
    return torch.from_numpy(out)


def _encoded(tokenizer: Any, example: Example) -> list[int]:
    """A text with the special tokens that begin one; messages by the chat template, ready for an answer.

    Messages that end with the assistant's are left open after its text.
    """
    if isinstance(example, str):
        return list(tokenizer.encode(example))
    messages = [message.model_dump() for message in example]
    answered = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered, continue_final_message=answered
        )
    except Exception as error:  # a template may raise anything
        raise InvalidRequest(f"the chat template does not take these messages: {error}") from None
    return list(tokenizer.encode(text, add_special_tokens=False))


def _assets(
    spec: ExtractSpec, model: ModelInfo, layers: tuple[int, ...], positive: Tensor, negative: Tensor
) -> tuple[list[Asset], HeldOut | None]:
    reference = ModelRef(id=model.name, n_layers=model.n_layers, d_model=model.d_model, fingerprint=model.fingerprint)
    about = {
        "description": spec.description,
        "source": spec.source or f"{spec.method} of activations of {model.name}",
        "licence": spec.licence,
    }
    provenance: dict[str, Any] = {
        "tool": f"steersman {importlib.metadata.version('steersman')}, job extract",
        "method": spec.method,
        "token": spec.token,
        "data_sha256": spec.data_sha256(),
        "examples": {"positive": len(positive), "negative": len(negative)},
    }
    if spec.method == "heads":
        asked = spec.heads or Heads()
        shape = (model.n_heads, model.d_head)
        found = find_heads(
            positive.unflatten(-1, shape), negative.unflatten(-1, shape), layers, asked.k, direction=asked.direction
        )
        return head_assets(found, spec.name, reference, asked.alpha, provenance, **about), None
    told = None if spec.method == "shift" else held_out(spec.method, positive, negative)
    if told is not None:
        provenance["held_out"] = told.to_json()
    common = {"kind": "vector", "model": reference.model_dump(mode="json"), "site": spec.at.value, **about}

    def asset(name: str, vectors: Tensor, **more: Any) -> Asset:
        fields = {**common, "name": name, "layers": list(layers), "provenance": {**provenance, **more}}
        return Asset(parse_metadata(fields), {"vectors": vectors})

    if spec.method != "shift":
        made = extract(spec.method, positive, negative, spec.length)
        return [asset(spec.name, made, length=spec.length)], told
    names = [pair.group for pair in spec.pairs or ()]
    groups = sorted({name for name in names if name is not None})
    if not groups:
        return [asset(spec.name, mean_shifts(negative, positive))], None
    numbers = torch.tensor([groups.index(name) for name in names if name is not None])
    shifts = mean_shifts(negative, positive, numbers)
    return [asset(f"{spec.name}-{name}", shift, group=name) for name, shift in zip(groups, shifts, strict=True)], None
