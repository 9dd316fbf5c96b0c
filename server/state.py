"""What the HTTP process keeps for steering, on the application's state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from steersman.server.budget import Budget
from steersman.server.engine.frontend import Frontend
from steersman.server.jobs import Runner
from steersman.server.live.feed import Feed
from steersman.server.metrics import Metrics
from steersman.server.reports import Reports
from steersman.server.settings import Settings


@dataclass
class SteeringState:
    settings: Settings
    frontend: Frontend
    reports: Reports
    metrics: Metrics
    live: Feed | None = None  # what the live page shows; None with monitoring off
    counting: asyncio.Task[None] | None = None  # keeps the number of stored assets up to date
    watching: asyncio.Task[None] | None = None  # reads the workers' statistics
    engine: Any = None  # vLLM's client of its engine
    serving: Any = None  # vLLM's application state
    capturing: Budget = field(init=False)  # what captures may hold on the workers
    jobs: Runner = field(init=False)
    replaying: asyncio.Semaphore = field(init=False)  # answers without their images

    def __post_init__(self) -> None:
        self.capturing = Budget(self.settings.max_capture_mb << 20)
        self.jobs = Runner(self.settings.max_jobs)
        self.replaying = asyncio.Semaphore(self.settings.max_replays)


def state_of(app: FastAPI) -> SteeringState:
    state = app.state.steersman
    assert isinstance(state, SteeringState)
    return state
