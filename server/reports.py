"""What a served response says about its steering, put together from the workers' sums."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from steersman.server.engine.frontend import Frontend, Ticket
from steersman.steering.errors import EngineUnsteered
from steersman.steering.plan import Plan


class Reports:
    """Fetches reports by RPC; those asked for while a call is under way go together in the next one."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self._waiting: dict[str, tuple[Ticket, asyncio.Future[list[dict[str, Any]]]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def fetch(self, ticket: Ticket) -> list[dict[str, Any]]:
        """The raw report of every sequence of the request, in the order of the response's choices."""
        future: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._waiting[str(ticket.key)] = ticket, future  # the transport takes no other type
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            try:
                asked = {key: {i: s.positions() for i, s in t.sequences.items()} for key, (t, _) in batch.items()}
                answers = await self.frontend.rpc("steersman_reports", asked)
                parts = [a for a in answers if a is not None]
                joined = {key: _join([part.get(key, []) for part in parts], t.order()) for key, (t, _) in batch.items()}
            except Exception as error:
                failed = f"the engine's reports could not be read: {error or type(error).__name__}"
                for _, future in batch.values():
                    if not future.done():
                        future.set_exception(EngineUnsteered(failed, "steering"))
                continue
            for key, (_, future) in batch.items():
                if not future.done():
                    future.set_result(joined[key])


def _join(parts: Sequence[list[dict[str, Any]]], order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Sequences of data-parallel engines side by side, in ``order``; pipeline stages of one sequence added up."""
    joined: dict[str, dict[str, Any]] = {}
    for part in parts:
        for report in part:
            known = joined.setdefault(report["request"], report)
            if known is not report:
                known["error"] = known["error"] or report["error"]
                known["relative"] += report["relative"]
                known["probes"] += report["probes"]
                known["gates"] = [
                    a if a is not None else b for a, b in zip_longest(known["gates"], report["gates"])
                ]  # a stage that lacks the plan knows of no gates, and says so in its error
    ranks = {request: i for i, request in enumerate(order)}
    return sorted(joined.values(), key=lambda report: ranks.get(report["request"], len(ranks)))


def block(ticket: Ticket, raw: Sequence[dict[str, Any]], detail: str) -> dict[str, Any]:
    """The response's ``steering`` object. Raises EngineUnsteered when the engine did not do as asked."""
    failed = next((r["error"] for r in raw if r["error"]), None)
    if failed or not raw:
        raise EngineUnsteered(failed or "the engine has no record of having steered this request", "steering")
    plan = ticket.plan
    out: dict[str, Any] = {
        "plan": plan.id,
        "interventions": [_intervention(plan, i, raw, detail) for i in range(len(plan.steps))],
    }
    if plan.probe_names:
        out["probes"] = [_probe(plan, i, raw) for i in range(len(plan.probe_names))]
    if warnings := [*plan.warnings, *_unmatched(ticket)]:
        out["warnings"] = warnings
    return out


def _intervention(plan: Plan, index: int, raw: Sequence[dict[str, Any]], detail: str) -> dict[str, Any]:
    step = plan.steps[index]
    cached = sum(r["cached"][index] for r in raw)
    by_layer: dict[int, list[float]] = {}
    for r in raw:
        for i, layer, total, count in r["relative"]:
            if i == index:
                sums = by_layer.setdefault(layer, [0.0, 0])
                sums[0] += total
                sums[1] += count
    out: dict[str, Any] = {
        "index": index,
        "op": step.op,
        "layers": list(step.layers),
        "site": step.site.value,
        "assets": list(step.assets),
        "tokens": sum(r["edited"][index] for r in raw) + cached,
        "cached_tokens": cached,
        "mean_relative_norm": _mean(sum(s for s, _ in by_layer.values()), sum(n for _, n in by_layer.values())),
        "gate": None,
    }
    if step.gate >= 0:
        read = plan.gates[step.gate]
        decisions = [r["gates"][step.gate] for r in raw]
        out["gate"] = {"over": read.over, "open": decisions if read.per_request else None}
    if detail == "layers":
        out["by_layer"] = {str(layer): _mean(*sums) for layer, sums in sorted(by_layer.items())}
    return out


def _probe(plan: Plan, index: int, raw: Sequence[dict[str, Any]]) -> dict[str, Any]:
    layers: dict[int, dict[str, float]] = {}
    for r in raw:
        for probe, layer, count, total, low, high, last in r["probes"]:
            if probe == index:
                seen = layers.get(layer)
                if seen is None:
                    mean = total / max(count, 1)
                    layers[layer] = {"tokens": count, "mean": mean, "min": low, "max": high, "last": last}
                else:
                    tokens = seen["tokens"] + count
                    seen.update(
                        mean=(seen["mean"] * seen["tokens"] + total) / max(tokens, 1),
                        min=min(seen["min"], low),
                        max=max(seen["max"], high),
                        last=last,
                        tokens=tokens,
                    )
    told = {str(k): {name: _finite(x) for name, x in v.items()} for k, v in sorted(layers.items())}
    return {"index": index, "asset": plan.probe_names[index], "layers": told}


def _unmatched(ticket: Ticket) -> list[str]:
    """Interventions whose selector matched no token of some prompt and can match none that is generated."""
    out = []
    for i, step in enumerate(ticket.plan.steps):
        bit = 1 << i
        for selection in ticket.selections:
            rule = selection.rules.get(i)
            if not selection.generated & bit and rule is None and not any(mask & bit for *_, mask in selection.runs):
                out.append(f"{step.path}.tokens matches no token of this request, so nothing was edited")
                break
    return out


def _mean(total: float, count: float) -> float | None:
    return _finite(total / count) if count else None


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity, which an edit beyond all bounds can make of a stream."""
    return value if math.isfinite(value) else None
