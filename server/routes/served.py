"""One steered request that vLLM has taken, until its report has been added to the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steersman.server.engine.frontend import Ticket
from steersman.server.reports import block
from steersman.server.state import SteeringState


@dataclass
class Served:
    state: SteeringState
    ticket: Ticket
    detail: str  # none, summary or layers
    streaming: bool = False  # the stream counts the outcome and finishes the ticket

    async def report(self) -> dict[str, Any]:
        """What the answer says. Raises EngineUnsteered when the edits were not made as asked."""
        raw = await self.state.reports.fetch(self.ticket)
        report = block(self.ticket, raw, self.detail)
        self.state.metrics.observe(self.ticket.plan, report)
        return {"plan": report["plan"]} if self.detail == "none" else report


def spliced(body: bytes, report: Mapping[str, Any]) -> bytes:
    """A JSON object's bytes with one more member."""
    return body.rstrip()[:-1] + b',"steering":' + json.dumps(report, allow_nan=False).encode() + b"}"
