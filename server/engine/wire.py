"""What travels with a request from the HTTP process to the engine: ``sampling_params.extra_args["steersman"]``.

``{"plan": id, "edits": id, "key": report key, "selection": Selection.to_json(), "decides": bool, "whole": bool}``:
``decides``, whether a gate decides once for the whole request, or a restoration counts from the prompt's end;
``whole``, whether its report tells of every token.
``capture``, where it is there, says what of the prompt is captured (:class:`~steersman.server.engine.captures.Wanted`).
``signals``, where they are there, are asked for as :mod:`~steersman.server.engine.signals` says.
The plan itself goes to the workers once, by RPC, before
the first request that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steersman.server.engine.captures import Wanted
from steersman.steering.plan import Plan
from steersman.steering.tokens import Selection

KEY = "steersman"


def args_of(sampling_params: Any) -> Mapping[str, Any] | None:
    """The steering part of a request's sampling parameters; None when it is not steered."""
    extra = getattr(sampling_params, "extra_args", None)
    return extra.get(KEY) if extra else None


def make_args(
    plan: Plan,
    selection: Selection,
    key: str,
    whole: bool = False,
    capture: Wanted | None = None,
    signals: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    args = {
        "plan": plan.id,
        "edits": plan.edits_id,
        "key": key,
        "selection": selection.to_json(),
        "decides": plan.from_end or any(g.per_request for g in plan.gates),
        "whole": whole,
    }
    if signals:
        args["signals"] = dict(signals)
    return args if capture is None else {**args, "capture": capture.to_json()}
