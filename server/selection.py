"""The selection job: ``clients/selection.py`` inside the server, talking to the server's own routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Request
from pydantic import Field

from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.selection import SelectionSpec, save, select
from steersman.server.calibration import own_client
from steersman.server.jobs import Progress, Work
from steersman.server.state import state_of
from steersman.steering.errors import InvalidRequest, located


class SelectSpec(SelectionSpec):
    """Chooses, of stored vectors' layers, the one whose direction carries a behaviour."""

    kind: Literal["select"]
    store: bool = Field(True, description="store what is selected as a new version of its vector")

    @property
    def name(self) -> str:
        return self.vectors[0].partition("@")[0]


def selection(spec: SelectSpec, raw: Request) -> Work:
    """The job's work; raises now for a vector that is not there."""
    for i, ref in enumerate(spec.vectors):
        with located(f"vectors[{i}]"):
            state_of(raw.app).frontend.store.info(ref)

    async def work(progress: Progress) -> Mapping[str, Any]:
        async with own_client(raw) as http:
            try:
                found = await select(http, spec, progress)
            except CalibrationError as error:
                raise InvalidRequest(str(error), error.param) from None
            stored = [await save(http, found)] if spec.store and found.best is not None else []
            return {"assets": stored, "selection": found.to_json()}

    return work
