"""What a served response says about its steering, put together from the workers' sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from steersman.server.calls import Calls
from steersman.server.engine.frontend import Frontend, Ticket
from steersman.steering.errors import DosageExceeded, EngineUnsteered
from steersman.steering.plan import Plan


class Reports:
    """What the workers say of requests, by ticket."""

    def __init__(self, frontend: Frontend) -> None:
        self._reports = Calls(frontend, "steersman_reports")
        self._probes = Calls(frontend, "steersman_probes")

    async def fetch(self, ticket: Ticket) -> list[dict[str, Any]]:
        """The raw report of every sequence of the request, in the order of the response's choices."""
        asked = {i: s.positions() for i, s in ticket.sequences.items()}
        answers = await self._reports.ask(str(ticket.key), asked)  # the transport takes no other type of key
        try:
            return _join(answers, ticket.order())
        except Exception as error:
            raise EngineUnsteered(f"the engine's reports could not be read: {error!r}", "steering") from error

    async def probed(self, ticket: Ticket, seen: dict[str, int]) -> list[dict[str, Any]]:
        """What probes have read since the last call, of each sequence with news; ``seen`` remembers up to where.

        Only of the tokens that the response has come to; a draft's value may still change.
        """
        order = ticket.order()
        asked = {i: [seen.get(i, 0), ticket.sequences[i].positions()] for i in order}
        asked = {i: bounds for i, bounds in asked.items() if bounds[0] < bounds[1]}
        if not asked:
            return []
        answers = await self._probes.ask(str(ticket.key), asked)
        parts = []
        for choice, i in enumerate(order):
            told = [answer[i] for answer in answers if i in answer and answer[i]["positions"]]
            if told:
                seen[i] = told[0]["positions"][-1] + 1
                parts.append({"choice": choice, **_probe_series(ticket.plan, told)})
        return parts


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
                known["over"] += report["over"]
                known["tokens"] += report["tokens"]
                known["signals"] |= report["signals"]
                known["gates"] = [
                    a if a is not None else b for a, b in zip_longest(known["gates"], report["gates"])
                ]  # a stage that lacks the plan knows of no gates, and says so in its error
    ranks = {request: i for i, request in enumerate(order)}
    return sorted(joined.values(), key=lambda report: ranks.get(report["request"], len(ranks)))


def check(raw: Sequence[Mapping[str, Any]]) -> None:
    """Raises EngineUnsteered when the engine did not do as asked."""
    failed = next((r["error"] for r in raw if r["error"]), None)
    if failed or not raw:
        raise EngineUnsteered(failed or "the engine has no record of having steered this request", "steering")


def block(ticket: Ticket, raw: Sequence[dict[str, Any]], detail: str, missing: Sequence[str] = ()) -> dict[str, Any]:
    """The response's ``steering`` object, if the engine did as asked. ``missing``: of what it cannot tell, in words."""
    check(raw)
    plan = ticket.plan
    out: dict[str, Any] = {
        "plan": plan.id,
        "interventions": [_intervention(plan, i, raw, detail) for i in range(len(plan.steps))],
    }
    if plan.probe_names:
        out["probes"] = [_probe(plan, i, raw) for i in range(len(plan.probe_names))]
    if any(r["signals"] for r in raw):
        out["signals"] = [{"choice": i, "signals": _finite_all(r["signals"])} for i, r in enumerate(raw)]
    if detail == "tokens":
        out["sequences"] = [{"choice": i, **_series(plan, r)} for i, r in enumerate(raw)]
    said = [*_unmatched(ticket), *_untold(ticket, raw), *missing, *(over.warning(plan) for over in overdoses(raw))]
    if warnings := [*plan.warnings, *said]:
        out["warnings"] = warnings
    return out


@dataclass
class Overdose:
    """An intervention that was larger beside the stream than the server's limit."""

    index: int
    tokens: int  # tokens and layers of it, of all sequences
    layer: int  # where it was largest
    worst: float  # ‖Δx‖/‖x‖ there

    def said(self) -> str:
        return f"changed the stream by {self.worst:.3g} of its norm at layer {self.layer}"

    def warning(self, plan: Plan) -> str:
        return f"{plan.steps[self.index].path} {self.said()}, more than the server's limit, {self.tokens} times in all"


def overdoses(raw: Sequence[dict[str, Any]]) -> list[Overdose]:
    """By intervention."""
    found: dict[int, Overdose] = {}
    for r in raw:
        for i, layer, count, worst in r["over"]:
            one = found.setdefault(i, Overdose(i, 0, layer, worst))
            one.tokens += count
            if worst > one.worst:
                one.layer, one.worst = layer, worst
    return [found[i] for i in sorted(found)]


def refuse_overdose(plan: Plan, raw: Sequence[dict[str, Any]], limit: float) -> None:
    """Raises DosageExceeded for the largest edit beyond the limit, if there is one."""
    if found := overdoses(raw):
        one = max(found, key=lambda o: o.worst)
        raise DosageExceeded(f"{one.said()}; this server allows {limit:g}", plan.steps[one.index].path)


def _series(plan: Plan, raw: Mapping[str, Any]) -> dict[str, Any]:
    """One sequence token by token, from what each pipeline stage has of it."""
    stages = raw["tokens"]
    edits = {}
    for stage in stages:
        rows = stage["edits"]["values"]
        for column, (i, layer, site) in enumerate(stage["edits"]["columns"]):
            sizes = [row[column] for row in rows]
            if (i, layer, site) not in edits or any(size is not None for size in sizes):
                edits[i, layer, site] = sizes
    return {
        **_probe_series(plan, [stage["probes"] for stage in stages]),
        "positions": stages[0]["edits"]["positions"],
        "interventions": [
            {"index": i, "layer": layer, "site": site, "relative_norms": sizes}
            for (i, layer, site), sizes in sorted(edits.items())
        ],
    }


def _probe_series(plan: Plan, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Positions, and a list of values for each probe and layer."""
    probes = []
    for stage in stages:
        for column, (probe, layer) in enumerate(stage["columns"]):
            values = [row[column] for row in stage["values"]]
            probes.append({"index": probe, "asset": plan.probe_names[probe], "layer": layer, "values": values})
    return {
        "positions": max((stage["positions"] for stage in stages), key=len),
        "probes": sorted(probes, key=lambda p: (p["index"], p["layer"])),
    }


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
        **step.about(),
        "tokens": sum(r["edited"][index] for r in raw) + cached,
        "cached_tokens": cached,
        "mean_relative_norm": _mean(sum(s for s, _ in by_layer.values()), sum(n for _, n in by_layer.values())),
        "gate": None,
    }
    if step.gate >= 0:
        read = plan.gates[step.gate]
        decisions = [r["gates"][step.gate] for r in raw]
        out["gate"] = {"over": read.over, "open": decisions if read.per_request else None}
    if detail in ("layers", "tokens"):
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


def _untold(ticket: Ticket, raw: Sequence[dict[str, Any]]) -> list[str]:
    """Signals that the engine does not know of every generated token."""
    untold = [name for name in ticket.signals or () if not all(name in r["signals"] for r in raw)]
    return [f"signal {name} is not known of every token: an engine that speculates has no entropies" for name in untold]


def _mean(total: float, count: float) -> float | None:
    return _finite(total / count) if count else None


def _finite_all(signals: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {n: {k: _finite(v) if isinstance(v, float) else v for k, v in s.items()} for n, s in signals.items()}


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity, which an edit beyond all bounds can make of a stream."""
    return value if math.isfinite(value) else None
