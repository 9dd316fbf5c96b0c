"""The HTTP server of a π0: the robots' routes and those of steering, without vLLM's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import REGISTRY, CollectorRegistry, make_asgi_app
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from steersman.server import access, answers, guard
from steersman.server.endpoints import answer, openapi
from steersman.server.engine.dosage import Dosage
from steersman.server.engine.runtime import Runtime
from steersman.server.metrics import Metrics
from steersman.server.pi0.engine import Pi0Engine, Pi0Frontend
from steersman.server.pi0.model import Pi0Model
from steersman.server.policies.pi0 import Pi0
from steersman.server.policies.robots import Robots
from steersman.server.reports import Reports
from steersman.server.routes import actions, assets, openpi, steering
from steersman.server.settings import Settings
from steersman.server.state import SteeringState
from steersman.steering.errors import SteeringError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Keys:
    """ASGI middleware: with API keys set, every route under ``/v1`` needs one, as in vLLM's server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                access.robot(HTTPConnection(scope))
            except SteeringError as error:
                await answers.failure(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def build(
    folder: Path,
    settings: Settings,
    *,
    device: str,
    dtype: str,
    limit: int = 16,
    api_keys: Sequence[str] = (),
    aliases: tuple[str, ...] = (),
    registry: CollectorRegistry = REGISTRY,
) -> FastAPI:
    """The application around the checkpoint in ``folder``; ``limit``: observations in one batch.

    Raises ValueError, naming what is wrong, for a checkpoint or a setting that cannot be served.
    """
    from transformers import AutoTokenizer

    for name in ("detector", "norm_baseline", "monitor_probes"):
        if getattr(settings, name):
            raise ValueError(
                f"--steering-{name.replace('_', '-')} is not for this model: its layers have no statistics"
            )
    runtime = Runtime(capacity=settings.plan_memory_mb * 2**20, limit=settings.max_plans)
    if settings.max_relative_norm is not None:
        runtime.dosage = Dosage(settings.max_relative_norm, settings.dosage)
    described = json.loads((folder / "config.json").read_text())
    if (kind := described.get("model_type")) != "pi0":
        raise ValueError(f"{folder} is a {kind}, not a pi0; steersman serve serves what vLLM runs")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Pi0Model(folder, runtime, settings.hooked_sites, device, DTYPES[dtype])
    policy = Pi0(model.config, described.get("steersman_policy"), tokenizer)
    engine = Pi0Engine(model, settings, limit)
    frontend = Pi0Frontend(settings, model, tokenizer, engine.rpc, aliases)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="Steersman", lifespan=lifespan)
    app.add_middleware(guard.Guard, limit=settings.max_body_mb * 2**20)
    app.add_middleware(Keys)
    app.add_exception_handler(SteeringError, answer)
    for module in (steering, assets, actions, openpi):
        module.attach(app)
    app.add_api_route("/health", _health)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    app.mount("/metrics", make_asgi_app(registry))
    app.state.pi0 = engine
    app.state.args = SimpleNamespace(api_key=list(api_keys))
    app.state.steersman = SteeringState(settings, frontend, Reports(frontend), Metrics(registry), serving=app.state)
    app.state.steersman_robots = Robots(app.state.steersman, policy, engine.compute(frontend), registry)
    return app


async def _health(raw: Request) -> Response:
    return PlainTextResponse("")


def chosen_device(asked: str) -> str:
    """For "auto" the GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def chosen_dtype(asked: str, device: str) -> str:
    """For "auto" what the device computes fast."""
    return ("float32" if device == "cpu" else "bfloat16") if asked == "auto" else asked
