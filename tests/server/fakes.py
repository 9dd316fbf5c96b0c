"""The HTTP side without an engine: a frontend whose workers are a list of calls, and an application around it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from steersman.server.endpoints import SteeringEndpoints, answer
from steersman.server.engine.frontend import Frontend, Ticket
from steersman.server.metrics import Metrics
from steersman.server.reports import Reports
from steersman.server.settings import Settings
from steersman.server.state import SteeringState
from steersman.steering.errors import SteeringError
from steersman.steering.plan import Plan
from tests.steering.library import MODEL
from tests.steering.stock import stock


class Workers:
    """What a frontend's RPCs reach. ``reports`` makes a ticket's raw reports; ``fail`` is raised and nothing done."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.pinned: dict[str, set[str]] = {}  # plan -> holders, as on a worker
        self.capacity = 1000
        self.fail: Exception | None = None
        self.reports: Callable[[str], list[dict[str, Any]]] = lambda key: []
        self.probed: Callable[[str, int, int], dict[str, Any]] = lambda sequence, start, end: {}

    def sent(self, method: str = "steersman_load_plan") -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name == method]

    async def __call__(self, method: str, *args: Any) -> list[Any]:
        self.calls.append((method, args))
        if self.fail is not None:
            raise self.fail
        methods = {"steersman_load_plan": self._load, "steersman_reports": self._reports}
        answer = {**methods, "steersman_probes": self._probes}[method](*args)
        return [answer] * self.ranks

    def _load(self, data: bytes, holder: str, release: list[str]) -> dict[str, Any]:
        for plan_id in release:
            self.pinned.pop(plan_id, None)
        plan = Plan.from_bytes(data)
        if plan.id not in self.pinned and len(self.pinned) >= self.capacity:
            return {"error": "every resident plan is in use", "code": "capacity_exceeded"}
        self.pinned.setdefault(plan.id, set()).add(holder)
        return {"plan": plan.id, "resident": len(self.pinned)}

    def _probes(self, asked: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
        return {key: {i: self.probed(i, *bounds) for i, bounds in each.items()} for key, each in asked.items()}

    def _reports(self, keys: list[str]) -> dict[str, Any]:
        return {key: self.reports(key) for key in keys}


def raw_report(plan: Plan, **changes: Any) -> dict[str, Any]:
    """What a worker says of one sequence, every intervention having edited three tokens."""
    steps, edited = range(len(plan.steps)), 3
    return {
        "request": "r-0",
        "error": None,
        "relative": [[i, layer, 0.5 * edited, edited] for i in steps for layer in plan.steps[i].layers],
        "cached": [0 for _ in steps],
        "edited": [edited for _ in steps],
        "gates": [None for _ in plan.gates],
        "probes": [],
        "over": [],
        "tokens": [],
        "signals": {},
        **changes,
    }


@cache
def _stocked() -> tempfile.TemporaryDirectory[str]:
    """A store made once, to be copied: writing one waits for the disk."""
    folder = tempfile.TemporaryDirectory()
    stock(Path(folder.name))
    return folder


def frontend(folder: Path, workers: Workers | None = None, tokenizer: Any = None, **settings: Any) -> Frontend:
    chosen = Settings(store=str(folder), **settings)
    if not any(folder.iterdir()):
        shutil.copytree(_stocked().name, folder, dirs_exist_ok=True)
    made = Frontend(chosen, MODEL, tokenizer, workers or Workers())
    made.behind_routes = True
    return made


def state_of(made: Frontend) -> SteeringState:
    return SteeringState(made.settings, made, Reports(made), Metrics(CollectorRegistry()))


def client(made: Frontend, **env: str) -> TestClient:
    """An application with Steersman's routes; those of OpenAI call whatever stands in vLLM's modules."""
    app = FastAPI()
    SteeringEndpoints().attach_router(app)
    app.add_exception_handler(SteeringError, answer)
    app.state.steersman = state_of(made)
    return TestClient(app, raise_server_exceptions=False)


def reporting(workers: Workers, made: Frontend, **changes: Any) -> None:
    """From now on the workers report on every ticket that there is."""

    def reports(key: str) -> list[dict[str, Any]]:
        ticket: Ticket = made.tickets[key]  # type: ignore[index]
        return [raw_report(ticket.plan, **changes)]

    workers.reports = reports
