"""An engine around the toy model: what our own requests meet between the HTTP process and the layers, without vLLM's.

Requests enter as vLLM takes them in, run in chunks, and what workers answer goes through msgpack as it does there.
"""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from fastapi.testclient import TestClient

from steersman.server.engine import intake
from steersman.server.engine.frontend import Answer, Frontend, Generated
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import args_of
from steersman.server.engine.worker import WorkerSteering
from tests.server.engine.toy import Piece, Toy
from tests.server.fakes import client, frontend
from tests.steering.library import LAYERS, D, noise

VOCABULARY = 64  # of the toy model
IMAGE, PATCHES = 63, 4
HEAD = noise(VOCABULARY, D, seed=11) / 2  # from the stream to logits
HEAD[:, 0] = 0  # a token's id is no direction


class Tokenizer:
    """A token for each character, behind one of its own; a chat's turns are written ``role:content;``."""

    ALPHABET = f"^ {string.ascii_letters}.,:;!?'-()"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [self.ALPHABET.index(c) for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.ALPHABET[i] for i in ids)

    def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
        return "".join(f"{m['role']}:{m['content']};" for m in messages)


class ToyEngine:
    """``chunk``: rows of a request in one pass. ``most``: the requests that ran at once at most."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int = 5, **settings: Any) -> None:
        self.runtime = Runtime()
        self.toy = Toy(self.runtime)
        self.chunk = chunk
        self.worker = object.__new__(WorkerSteering)  # without vLLM's worker, whose model it hooks
        self.worker.runtime, self.worker.leads, self.worker.layers = self.runtime, True, frozenset(range(LAYERS))
        self.renderer = self
        self.model_config = SimpleNamespace(max_model_len=64)
        self.running, self.most, self.begun = 0, 0, 0
        self.rendered: set[bytes] = set()  # pictures, as the renderer remembers them
        self.pictures: set[bytes | None] = set()  # those that the engine has got
        self.calls: list[str] = []
        self.wait: asyncio.Event | None = None  # requests that are under way go on when it is set
        kept = str(folder / "captures")
        (folder / "store").mkdir()
        self.frontend = frontend(folder / "store", self, Tokenizer(), captures=kept, **settings)  # type: ignore[arg-type]
        monkeypatch.setattr(Frontend, "_instance", self.frontend)
        self.http: TestClient = client(self.frontend)
        self.state = self.http.app.state.steersman  # type: ignore[attr-defined]
        self.state.engine = self

    # -- workers ---------------------------------------------------------------------------------------

    async def __call__(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        call = getattr(self.worker, method.removeprefix("steersman_"))
        answer = call(*msgspec.msgpack.decode(msgspec.msgpack.encode(args)))
        other = {"steersman_captured": None, "steersman_captured_bytes": b""}.get(method, answer)  # an idle engine's
        return [msgspec.msgpack.decode(msgspec.msgpack.encode(told)) for told in (answer, other)]

    # -- the engine ------------------------------------------------------------------------------------

    async def render_cmpl_async(self, prompts: list[Any], skip_mm_cache: bool = False) -> list[Any]:
        """The token ``IMAGE`` makes room for a picture, between two marks of its own.

        As in vLLM, a picture that has been rendered is taken to be known to the engine, which generates nothing where
        it is not.
        """
        (prompt,) = prompts
        if "multi_modal_data" not in prompt:
            return prompts
        picture = prompt["multi_modal_data"]["image"][0].tobytes()
        sent = None if picture in self.rendered else picture
        if not skip_mm_cache:
            self.rendered.add(picture)
        ids = prompt["prompt_token_ids"]
        at = ids.index(IMAGE)
        ids = [*ids[:at], *[IMAGE] * (PATCHES + 2), *ids[at + 1 :]]
        inside = torch.tensor([False, *[True] * PATCHES, False])
        place = SimpleNamespace(offset=at, length=PATCHES + 2, is_embed=inside)
        about = {"mm_placeholders": {"image": [place]}, "mm_hashes": {"image": ["h"]}}
        return [{"prompt_token_ids": ids, **about, "picture": picture, "sent": sent}]

    async def generate(self, prompt: Mapping[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        ids = prompt["prompt_token_ids"]
        if "picture" in prompt and prompt["picture"] not in self.pictures | {prompt["sent"]}:
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[])], prompt_token_ids=ids)
            return
        self.pictures.add(prompt.get("picture"))
        if max(ids) >= VOCABULARY:
            raise ValueError(f"Token id {max(ids)} is out of vocabulary")

        def original(*_: Any) -> Any:
            return SimpleNamespace(prompt_token_ids=ids, mm_features=None, sampling_params=params.clone())

        request = intake._wrap_process_inputs(original)(None)
        args = args_of(request.sampling_params)
        assert args is not None
        ticket = self.frontend.tickets[args["key"]]
        assert request.sampling_params.skip_reading_prefix_cache or ticket.capture is None
        ticket.sequences[request_id] = Generated(request_id, 0, lambda: len(ids), lambda: Answer([], []))
        self.running += 1
        self.begun += 1
        self.most = max(self.most, self.running)
        try:
            self.runtime.add_request(request_id, args)
            for at in range(0, len(ids), self.chunk):
                await asyncio.sleep(0)
                if self.wait is not None:
                    await self.wait.wait()
                out = self.toy.run(Piece("somebody else", 0, [7, 8]), Piece(request_id, at, ids[at : at + self.chunk]))
                logits = torch.stack([rows[-1] for rows in out.values()]) @ HEAD.T
                self.runtime.see_logits(logits)
        finally:
            self.runtime.remove_request(request_id)
            self.running -= 1
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[int(logits[1].argmax())])], prompt_token_ids=ids)

    def idle(self) -> bool:
        """Nothing is left of any request: no ticket, no rows on the workers, no room taken."""
        held = [s for states in self.runtime.finished.values() for s in states if s.capture is not None]
        pins = all(pin.users == 0 for pin in self.frontend._pins.values())
        return not (self.frontend.tickets or self.runtime.requests or held or self.state.capturing.used) and pins
