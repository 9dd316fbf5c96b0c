"""What the HTTP process keeps for steering, on the application's state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fastapi import FastAPI

from steersman.server.engine.frontend import Frontend
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


def state_of(app: FastAPI) -> SteeringState:
    state = app.state.steersman
    assert isinstance(state, SteeringState)
    return state
