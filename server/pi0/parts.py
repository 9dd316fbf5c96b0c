"""What a plan may ask of a model in two parts: the backbone, which sees prompts, and the expert, which sees actions.

Layers 0 to ``n`` − 1 are the backbone's. An intervention edits a token where that passes one of its layers: prompt
tokens in the backbone, the state's and the actions' tokens (``generated``) in the expert. What can never happen is
refused: a selector that leaves an intervention no token of its layers, and what is read in one part to be used in a
pass of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from steersman.steering.errors import InvalidRequest, SiteUnsupported
from steersman.steering.plan import Plan, Step
from steersman.steering.tokens import Selection


def check(plan: Plan, n: int) -> None:
    """Raises SiteUnsupported for gates and injections that would read what their pass does not compute.

    A request's probes are of one part, too: a report has the same positions for all of them.
    """
    if len({probe.place.layer < n for probe in plan.probes}) > 1:
        text = f"the probes of a request are of layers 0 to {n - 1}, or of those from {n} on"
        raise SiteUnsupported(text, "steering.probes")
    for step in plan.steps:
        if step.gate < 0:
            continue
        gate = plan.gates[step.gate]
        if gate.per_request and gate.place.layer >= n:
            text = f"layer {gate.place.layer} is the action expert's, which no prompt passes; decide at 0 to {n - 1}"
            raise SiteUnsupported(text, f"{step.path}.when.layer")
        if not gate.per_request and {gate.place.layer < n} != _parts(step, n):
            text = f"a gate over each token decides for layers of its own part: 0 to {n - 1}, or those from {n} on"
            raise SiteUnsupported(text, f"{step.path}.when.layer")
    for injection in plan.injections:
        layers = {layer for layer, _ in injection.sources} | set(injection.targets)
        if len({layer < n for layer in layers}) > 1:
            text = f"layers 0 to {n - 1} and those from {n} on are in no pass together; inject within one part"
            raise SiteUnsupported(text, plan.steps[injection.intervention].path)


def restricted(plan: Plan, selection: Selection, n: int) -> Selection:
    """The selection without the tokens that never pass an intervention's layers.

    Raises InvalidRequest where nothing is left of one that selects something.
    """
    backbone = expert = 0  # bit masks of the interventions that work there
    for i, step in enumerate(plan.steps):
        parts = _parts(step, n)
        backbone |= (True in parts) << i
        expert |= (False in parts) << i
    found = replace(
        selection,
        runs=tuple(_merged((a, b, mask & backbone) for a, b, mask in selection.runs)),
        generated=selection.generated & expert,
        rules={i: rule for i, rule in selection.rules.items() if expert >> i & 1},
    )
    for i, step in enumerate(plan.steps):
        if _chosen(selection, i) and not _chosen(found, i):
            where = f"layers 0 to {n - 1} see the prompt alone, those from {n} on the generated tokens alone"
            text = f"selects no token that passes the intervention's layers: {where}"
            raise InvalidRequest(text, f"{step.path}.tokens")
    return found


def _parts(step: Step, n: int) -> set[bool]:
    """Whether it works in the backbone (True), in the expert (False), or both."""
    return {layer < n for layer in step.layers}


def _chosen(selection: Selection, i: int) -> bool:
    return bool(selection.generated >> i & 1 or i in selection.rules or any(m >> i & 1 for *_, m in selection.runs))


def _merged(runs: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Neighbours with the same mask as one, those of none left out."""
    last: tuple[int, int, int] | None = None
    for start, end, mask in runs:
        if not mask:
            continue
        if last is not None and last[1] == start and last[2] == mask:
            last = last[0], end, mask
            continue
        if last is not None:
            yield last
        last = start, end, mask
    if last is not None:
        yield last
