"""One steered request that vLLM has taken, until its report has been added to the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steersman.server import conflict
from steersman.server.engine.frontend import Ticket
from steersman.server.reports import block, overdoses, refuse_overdose
from steersman.server.state import SteeringState


@dataclass
class Served:
    state: SteeringState
    ticket: Ticket
    detail: str  # none, summary, layers or tokens
    live: bool = False  # whether a stream's chunks tell what the probes read
    seen: dict[str, int] = field(default_factory=dict)  # by sequence, up to which position that has been told
    streaming: bool = False  # the stream counts the outcome and finishes the ticket

    async def report(self) -> dict[str, Any]:
        """What the answer says. Raises EngineUnsteered when the edits were not made as asked."""
        raw = await self.state.reports.fetch(self.ticket)
        settings, plan = self.state.settings, self.ticket.plan
        if settings.max_relative_norm is not None:
            self.state.metrics.overdosed(plan, overdoses(raw), settings.dosage)
            if settings.dosage == "refuse":
                refuse_overdose(plan, raw, settings.max_relative_norm)
        missing = await conflict.tell(self.state, self.ticket, raw, self.detail == "tokens")
        report = block(self.ticket, raw, self.detail, missing)
        self.state.metrics.observe(plan, report)
        detector = self.state.frontend.detector
        if detector is not None and self.ticket.capture is None:  # which takes activations, and answers nothing
            scores = detector.scores([r["signals"] for r in raw])
            self.state.metrics.scored(detector.name, scores, detector.threshold)
            report["detector"] = detector.block(scores)
        return {"plan": report["plan"]} if self.detail == "none" else report

    async def news(self) -> list[dict[str, Any]]:
        """What probes have read since the last call, of each sequence with anything new."""
        return await self.state.reports.probed(self.ticket, self.seen)


def spliced(body: bytes, report: Mapping[str, Any]) -> bytes:
    """A JSON object's bytes with one more member."""
    return body.rstrip()[:-1] + b',"steering":' + json.dumps(report, allow_nan=False).encode() + b"}"
