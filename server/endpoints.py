"""The ``vllm.endpoint_plugins`` entry point: Steersman's routes in vLLM's own server.

The contract with vLLM: ``attach_router(app)`` runs once, after vLLM's routers and before its middleware; a
route of the same path and method replaces vLLM's; ``init_state(engine_client, state, args)`` runs once
the engine is up, with the application's state.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from steersman.server import answers, guard, inventory
from steersman.server.engine.frontend import Frontend
from steersman.server.engine.generate import computing
from steersman.server.live.feed import Feed
from steersman.server.metrics import Metrics
from steersman.server.monitoring import LayerMetrics, Monitoring
from steersman.server.policies import catalogue
from steersman.server.policies.policy import Policy
from steersman.server.policies.robots import Robots
from steersman.server.reports import Reports
from steersman.server.routes import actions, assets, captures, jobs, live, norms, openai, openpi, steering
from steersman.server.settings import Settings
from steersman.server.state import SteeringState, state_of
from steersman.steering.errors import SteeringError, StoreError


class SteeringEndpoints:
    """What ``vllm.endpoint_plugins`` makes one of, in the process that serves HTTP."""

    name = "steersman"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        settings = Settings.from_env()
        app.add_middleware(guard.Guard, limit=settings.max_body_mb * 2**20)
        app.add_exception_handler(SteeringError, answer)
        for module in (openai, steering, assets, actions, openpi, live, jobs, captures, norms):
            module.attach(app)
        app.openapi = lambda: openapi(app)  # type: ignore[method-assign]

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None:
            return
        frontend = await Frontend.of_async(engine_client)
        frontend.behind_routes = True
        state.steersman = SteeringState(
            frontend.settings, frontend, Reports(frontend), Metrics(), engine=engine_client, serving=state
        )
        state.steersman_robots = Robots(state.steersman, _policy(frontend, engine_client), computing(engine_client))
        state.steersman.counting = asyncio.create_task(inventory.watch(state.steersman))
        if frontend.settings.detector is not None:
            with _option("detector"):
                frontend.use_detector(frontend.settings.detector)
        if frontend.detector is not None:
            state.steersman.metrics.detects(frontend.detector.name)
        if frontend.settings.monitor == "on":
            settings, model = frontend.settings, frontend.model
            about = {"model": model.name, "layers": model.n_layers, "every": settings.monitor_every}
            state.steersman.live = Feed(about, settings.monitor_interval)
            counted = LayerMetrics(layers=model.n_layers)
            busy = engine_client.output_processor.has_unfinished_requests
            monitoring = Monitoring(frontend, counted, settings.monitor_interval, state.steersman.live, busy)
            if settings.norm_baseline is not None:
                with _option("norm-baseline"):
                    monitoring.baseline = frontend.resolver.library.baseline(settings.norm_baseline)
                await monitoring.tell_baseline()
            state.steersman.watching = asyncio.create_task(monitoring.watch())


@contextmanager
def _option(name: str) -> Iterator[None]:
    """What an option names cannot be used: the server does not start."""
    try:
        yield
    except SteeringError as error:
        raise ValueError(f"--steering-{name}: {error.message}") from error


def _policy(frontend: Frontend, engine_client: Any) -> Policy | None:
    """Raises ValueError, and the server does not start, where the model is not the policy that it says it is."""
    config = engine_client.vllm_config.model_config.hf_config.to_dict()
    return catalogue.load(frontend.settings.policy, config, frontend.tokenizer)


async def answer(request: Request, error: Exception) -> Response:
    """What a client gets for an error of ours."""
    assert isinstance(error, SteeringError)
    if isinstance(error, StoreError):
        state_of(request.app).metrics.store_failed(error)
    return answers.failure(error)


def openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema with the steering object's own."""
    if app.openapi_schema is None:
        built = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = built.setdefault("components", {}).setdefault("schemas", {})
        openai.describe(schemas)
        jobs.describe(schemas)
        captures.describe(schemas)
        app.openapi_schema = built
    return app.openapi_schema
