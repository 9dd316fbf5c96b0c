"""A robot policy's routes around an engine that stands in for vLLM's, and a server for real sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client import CollectorRegistry, generate_latest

from steersman.server.engine.frontend import Frontend
from steersman.server.engine.generate import computing
from steersman.server.engine.intake import FIELD
from steersman.server.policies.catalogue import load
from steersman.server.policies.robots import Robots
from steersman.steering.tokens import Prompt, Selection
from tests.e2e.server import free_port
from tests.server.fakes import Workers, client, frontend, reporting

KEY = "bridge_orig"
STATS = {
    "q01": [-0.03, -0.04, -0.02, -0.1, -0.11, -0.12, 0.0],
    "q99": [0.03, 0.05, 0.02, 0.1, 0.13, 0.12, 1.0],
    "mask": [True, True, True, True, True, True, False],
}
OPENVLA = {
    "model_type": "openvla",
    "text_config": {"vocab_size": 32064},
    "pad_to_multiple_of": 64,
    "n_action_bins": 256,
    "norm_stats": {KEY: {"action": STATS}, "other": {"action": {"q01": [0.0, -2.0], "q99": [1.0, 2.0]}}},
}
IDS = [31999, 31744, 31900, 31872, 31871, 31800, 31999]
ADD = {"interventions": [{"op": "neurons", "neurons": {"inline": [[1, 3]]}, "mode": "set", "value": 4.0}]}
SPECIAL = ord("⏹")
SCENE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Tokenizer:
    """BOS and one id for each character, one of which is special."""

    bos_token_id = 1
    all_special_ids = (1, SPECIAL)

    def __len__(self) -> int:
        return 32001

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]


class Engine:
    """``ids`` makes the tokens of an answer; while ``hanging``, none comes."""

    def __init__(self, made: Frontend) -> None:
        self.frontend = made
        self.renderer = self
        self.model_config = SimpleNamespace(max_model_len=4096)
        self.ids: Callable[[Mapping[str, Any], int], Sequence[int]] = lambda prompt, n: (IDS * n)[:n]
        self.prompts: list[Mapping[str, Any]] = []
        self.params: list[Any] = []
        self.started, self.stopped = threading.Event(), threading.Event()
        self.hanging = False
        self.fail: Exception | None = None

    async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
        return prompts

    async def generate(self, prompt: Mapping[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        self.params.append(params)
        if self.fail is not None:
            raise self.fail
        if params.extra_args:
            ticket = self.frontend.tickets[params.extra_args[FIELD]]
            paths = [step.path for step in ticket.plan.steps]
            ticket.selections.append(Selection.build(ticket.plan.selectors, Prompt(prompt["prompt_token_ids"]), paths))
        self.started.set()
        try:
            while self.hanging:
                await asyncio.sleep(0.005)
        finally:
            self.stopped.set()
        given = prompt["prompt_token_ids"]
        room = min(params.max_tokens, self.model_config.max_model_len - len(given))
        output = SimpleNamespace(token_ids=self.ids(prompt, room))
        yield SimpleNamespace(outputs=[output], prompt_token_ids=given)


class Station:
    """The application, its engine and its metrics."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any] = OPENVLA, *, tokenizer: Any = None, **settings: Any
    ) -> None:
        self.workers = Workers()
        self.frontend = frontend(folder, self.workers, **settings)
        reporting(self.workers, self.frontend)
        self.engine = Engine(self.frontend)
        self.http: TestClient = client(self.frontend)
        self.registry = CollectorRegistry()
        policy = load("auto", config, tokenizer or Tokenizer())
        self.app: Any = self.http.app
        robots = Robots(self.app.state.steersman, policy, computing(self.engine), self.registry)
        self.app.state.steersman_robots = robots

    def metric(self, line: str) -> float:
        found = [text for text in generate_latest(self.registry).decode().splitlines() if text.startswith(f"{line} ")]
        return float(found[0].rsplit(" ", 1)[1]) if found else 0.0

    def outcome(self, name: str) -> float:
        return self.metric(f'steersman_actions_total{{outcome="{name}",policy="openvla"}}')

    def idle(self) -> bool:
        return not self.frontend.tickets and all(pin.users == 0 for pin in self.frontend._pins.values())


def file_of(picture: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


def text_of(picture: np.ndarray[Any, Any], kind: str = "PNG") -> str:
    return base64.b64encode(file_of(picture, kind)).decode()


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """The application on a real port, in a thread."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
