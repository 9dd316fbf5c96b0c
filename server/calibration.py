"""The calibration job: ``clients/calibration.py`` inside the server, talking to the server's own routes.

Its requests are ordinary ones, without a socket between: they pass the same checks, and share the batch with
everybody's. They carry the keys that the job was asked for with, which are kept while it waits and runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import httpx
from fastapi import Request
from pydantic import Field, field_validator

from steersman.clients.calibration import calibrate, save
from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.calibration_spec import CalibrationSpec
from steersman.clients.scorers import Classifier, Regex, Scorer
from steersman.server.jobs import Progress, Work
from steersman.server.state import state_of
from steersman.steering.errors import InvalidRequest, located

KEYS = ("authorization", "x-admin-key")


class CalibrateSpec(CalibrationSpec):
    """Finds the layer and scale at which a stored vector does what is wanted, and little else."""

    kind: Literal["calibrate"]
    store: bool = Field(True, description="store what is recommended as a new version of the vector")

    @field_validator("scorer")
    @classmethod
    def _quick(cls, scorer: Scorer) -> Scorer:
        if isinstance(scorer, Regex):  # matching holds up the whole process, for as long as the pattern likes
            raise ValueError("a job takes no regex; steersman calibrate --regex matches on its own side")
        if isinstance(scorer, Classifier):  # whose folder the server would read, and which runs beside the model
            raise ValueError("a job takes no classifier; steersman calibrate --classifier runs it on its own side")
        return scorer

    @property
    def name(self) -> str:
        return self.vector.partition("@")[0]


def calibration(spec: CalibrateSpec, raw: Request) -> Work:
    """The job's work; raises now for a vector that is not there."""
    with located("vector"):
        state_of(raw.app).frontend.store.info(spec.vector)

    async def work(progress: Progress) -> Mapping[str, Any]:
        async with own_client(raw) as http:
            try:
                found = await calibrate(http, spec, progress)
            except CalibrationError as error:
                raise InvalidRequest(str(error), error.param) from None
            stored = [await save(http, found)] if spec.store and found.best is not None else []
            return {"assets": stored, "calibration": found.to_json()}

    return work


def own_client(raw: Request) -> httpx.AsyncClient:
    """Of this server's own routes, with the keys of a request."""
    headers = {name: raw.headers[name] for name in KEYS if name in raw.headers}
    transport = httpx.ASGITransport(raw.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers, timeout=None)
