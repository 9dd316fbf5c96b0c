"""A tracing job's questions as prompts of the served model, corrupted ones, and the groups of their tokens."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from steersman.server import prompting
from steersman.server.captures import capture
from steersman.server.engine.generate import chat, expanded
from steersman.server.engine.prompts import TextFinder
from steersman.server.policies import pictures
from steersman.server.policies.policy import Picture, PolicyPrompt
from steersman.server.prompting import Given
from steersman.server.state import SteeringState
from steersman.server.tracing_spec import EMBEDDING_SIGMA, PIXEL_SIGMA, Question, TraceSpec
from steersman.steering.errors import InvalidRequest, located
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from steersman.steering.spec import TokenSet
from steersman.steering.tokens import Prompt, select
from steersman.steering.tracing import Group, embedding_noise, groups_of, noised

MAX_NOISED: Final = 60  # tokens of an object's name, each of which takes an intervention


@dataclass(frozen=True)
class Posed:
    """A question as the model is asked it."""

    token_ids: list[int]  # before pictures have their places filled in
    pictures: list[Picture]
    prompt: Prompt  # what the model is fed of it
    answer: int  # the id of the answer's first token
    edits: tuple[Mapping[str, Any], ...] = ()  # interventions that go with it

    @property
    def given(self) -> Given:
        """For captures."""
        return PolicyPrompt(self.token_ids, self.pictures, 1) if self.pictures else self.token_ids


async def pose(state: SteeringState, question: Question) -> Posed:
    """Raises SteeringError that names the question's field."""
    tokenizer = state.frontend.tokenizer
    if tokenizer is None and not (isinstance(question.prompt, list) and isinstance(question.answer, int)):
        raise InvalidRequest("this server has no tokenizer; give token ids, also of the answer", "prompt")
    limits = pictures.Limits(state.settings.max_image_mb << 20, state.settings.max_image_megapixels * 1_000_000)
    seen: list[Picture] = []
    if question.image is not None:
        seen = [await asyncio.to_thread(pictures.picture, question.image, limits, "image")]
    with located("prompt" if question.text is None else "text"):
        ids = await _ids(state, question.given, question.text is not None, seen)
        return await _posed(state, ids, seen, _answer(question.answer, tokenizer))


async def corrupted(state: SteeringState, spec: TraceSpec, question: Question, clean: Posed) -> Posed:
    """The same question with noise, or with what it swaps in."""
    if clean.pictures:
        sigma = PIXEL_SIGMA if spec.sigma is None else spec.sigma
        noisy = [await asyncio.to_thread(noised, each, sigma, spec.seed) for each in clean.pictures]
        return Posed(clean.token_ids, noisy, clean.prompt, clean.answer)
    if question.swap is not None:
        with located("swap"):
            ids = await _ids(state, question.swap, question.text is not None, [])
            found = await _posed(state, ids, [], clean.answer)
            if found.prompt.length != clean.prompt.length:
                raise InvalidRequest(f"has {found.prompt.length} tokens, the question {clean.prompt.length}")
            return found
    positions = _named(question, clean)
    if not positions or len(positions) > MAX_NOISED:
        raise InvalidRequest(f"is {len(positions)} tokens of the prompt; 1 to {MAX_NOISED} can be noised", "object")
    place = Place(0, Site.RESID_PRE)
    read = await capture(state, [clean.given], [place.site], [place.layer], "prompt")
    rows = read.prompts[0].rows[place]
    sigma = EMBEDDING_SIGMA if spec.sigma is None else spec.sigma
    noise = embedding_noise(len(positions), rows.shape[1], sigma * float(rows.std()), spec.seed)
    edits = tuple(_add(place, position, row) for position, row in zip(positions, noise, strict=True))
    return Posed(clean.token_ids, [], clean.prompt, clean.answer, edits)


def groups(question: Question, clean: Posed, wanted: Sequence[Group]) -> dict[Group, list[int]]:
    """The positions of the groups that the question has, of those that are asked for."""
    prompt = clean.prompt
    picture = [position for image in prompt.images for position in image.positions]
    boxed = None
    if question.box is not None:
        mask, _ = select(TokenSet(image=0, box=question.box), prompt, "")
        boxed = mask.nonzero()[0].tolist()
    named = _named(question, clean) if question.object is not None else None
    after = picture[-1] if picture else -1
    if named is not None and not any(position > after for position in named):
        raise InvalidRequest(
            "does not occur in the text after the image" if picture else "is not in the text", "object"
        )
    found = groups_of(prompt.length, picture, boxed, named)
    return {name: positions for name, positions in found.items() if name in wanted}


def _named(question: Question, clean: Posed) -> list[int]:
    if question.object is None or clean.prompt.find_text is None:
        raise InvalidRequest("cannot be found: this server has no tokenizer", "object")
    return clean.prompt.find_text(question.object)


async def _ids(state: SteeringState, given: str | list[int], user: bool, seen: list[Picture]) -> list[int]:
    tokenizer, options = state.frontend.tokenizer, prompting.template_options(state.serving)
    if not user:
        return prompting.read(given, tokenizer, options).token_ids
    assert isinstance(given, str), "the spec takes nothing else"
    if seen:
        return await chat(state.engine, given, seen, options)
    asked = await asyncio.to_thread(prompting.read, [{"role": "user", "content": given}], tokenizer, options)
    return asked.token_ids


async def _posed(state: SteeringState, ids: list[int], seen: list[Picture], answer: int) -> Posed:
    tokenizer = state.frontend.tokenizer
    prompt = await expanded(state.engine, ids, seen) if seen else Prompt(ids)
    if seen and len(prompt.images) != len(seen):
        raise InvalidRequest(f"makes room for {len(prompt.images)} images and comes with {len(seen)}")
    room = state.engine.model_config.max_model_len - 1
    if prompt.length > room:
        raise InvalidRequest(f"has {prompt.length} tokens; there is room for {room}, as one more is generated")
    fed = list(prompt.token_ids)
    finder = None if tokenizer is None else TextFinder(tokenizer, fed)
    return Posed(ids, seen, Prompt(fed, finder, images=prompt.images), answer)


def _answer(answer: str | int, tokenizer: Any) -> int:
    if isinstance(answer, int):
        return answer
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if not ids:
        raise InvalidRequest("has no tokens", "answer")
    return int(ids[0])


def _add(place: Place, position: int, row: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(row, "<f4").tobytes()).decode()
    return {
        "op": "add", "vector": {"inline": {"dtype": "float32", "shape": [len(row)], "data": data}}, "scale": 1.0,
        "site": place.site.value, "layers": [place.layer], "tokens": {"positions": [position]},
    }  # fmt: skip
