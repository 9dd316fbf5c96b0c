"""The served model as calibration sees it: answers, first tokens and likelihoods under a steering object, over HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx

from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.divergence import Logprobs, mean_kl, read_prompt_logprobs
from steersman.clients.scorers import TOP
from steersman.clients.sdk import error_of

CONCURRENT: Final = 32  # requests under way at once
Edit = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""One intervention, or several in order; None: unsteered."""


class Subject:
    """One served model. ``http`` has the server's address and keys; it stays its owner's to close."""

    def __init__(self, http: httpx.AsyncClient, model: str, **sampling: Any) -> None:
        self.model = model
        self._http = http
        self._sampling = {"temperature": 0.0, **sampling}
        self._free = asyncio.Semaphore(CONCURRENT)

    async def answer(self, prompt: str, edit: Edit, **body: Any) -> dict[str, Any]:
        """The whole chat completion of a user's message."""
        asked = {"messages": [{"role": "user", "content": prompt}], **self._sampling, **body}
        return await self._steered("/v1/chat/completions", asked, edit)

    async def kl(self, texts: Sequence[str], plain: Sequence[Sequence[Logprobs | None]], edit: Edit) -> float:
        """The mean over the texts of their mean divergence from ``plain``, in nats per token; see ``divergence``."""
        steered = await asyncio.gather(*(self.predictions(text, edit, TOP) for text in texts))
        return math.fsum(mean_kl(p, q, TOP) for p, q in zip(plain, steered, strict=True)) / len(texts)

    async def predictions(self, prompt: str | Sequence[int], edit: Edit, k: int) -> list[Logprobs | None]:
        """For every token of a text or of token ids, what was predicted in its place."""
        text = prompt if isinstance(prompt, str) else list(prompt)
        asked = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        return read_prompt_logprobs((await self._steered("/v1/completions", asked, edit))["choices"][0])

    async def loss(self, ids: Sequence[int], start: int, edit: Edit) -> float:
        """−ln p of the tokens from ``start`` on, nats per token."""
        told = await self.predictions(ids, edit, 1)
        lost = [-each[str(token)] for token, each in zip(ids[start:], told[start:], strict=True) if each is not None]
        return math.fsum(lost) / len(lost)

    async def _steered(self, path: str, body: dict[str, Any], edit: Edit) -> dict[str, Any]:
        """The answer, checked to be of the edit that was asked for. A default profile of the server is left out."""
        edits = [] if edit is None else [edit] if isinstance(edit, Mapping) else list(edit)
        steering = {"default": False, "interventions": edits}
        async with self._free:
            found = await post(self._http, path, {"model": self.model, **body, "steering": steering})
        if not all(told["tokens"] for told in found["steering"]["interventions"]):
            raise CalibrationError(f"the server edited no token: {found['steering']}", "vector")
        return found


async def get(http: httpx.AsyncClient, path: str, **params: str) -> dict[str, Any]:
    """The JSON of an answer; raises SteersmanError for a refusal."""
    return _json(await http.get(path, params=params))


async def post(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return _json(await http.post(path, json=dict(body)))


def _json(response: httpx.Response) -> dict[str, Any]:
    if response.status_code >= 400:
        raise error_of(response)
    found: dict[str, Any] = response.json()
    return found
