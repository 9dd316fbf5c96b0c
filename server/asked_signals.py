"""What the engine is told of the signals that a request, or the server's detector, asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from steersman.steering.errors import InvalidRequest, located
from steersman.steering.plan import Plan
from steersman.steering.signals import parse_signal
from steersman.steering.sites import ModelInfo, Site


def wanted(names: Iterable[str], plan: Plan, model: ModelInfo, tokenizer: Any, hedges: Sequence[str]) -> dict[str, Any]:
    """By signal, what :mod:`steersman.server.engine.signals` takes; conflict is none of the engine's.

    Errors name the signal, ``[0]`` the first one.
    """
    found: dict[str, Any] = {}
    for i, name in enumerate(names):
        with located(f"[{i}]"):
            signal = parse_signal(name)
            if signal.kind == "norm":
                model.width(Site.RESID_POST, signal.layer)  # raises where there is none
                found[name] = signal.layer
            elif signal.kind == "probe":
                column = probe_column(signal.vector, signal.layer, plan)
                if column is None:
                    raise InvalidRequest(f"no probe of this request reads {signal.vector} at layer {signal.layer}")
                found[name] = column
            elif signal.kind == "evidence_entropy":
                found[name] = hedge_ids(hedges, tokenizer)
            elif signal.kind == "logprob":
                found[name] = signal.token
            elif signal.kind == "answer_entropy":
                found[name] = None
    return found


def hedge_ids(words: Sequence[str], tokenizer: Any) -> list[int]:
    """U of the evidence entropy: the tokens that the words are made of, each with and without a space before it."""
    if tokenizer is None:
        raise InvalidRequest("this server has no tokenizer, so it does not know the tokens of hedging words")
    unknown = getattr(tokenizer, "unk_token_id", None)
    ids = {i for word in words for text in (word, f" {word}") for i in tokenizer.encode(text, add_special_tokens=False)}
    if not ids - {unknown}:
        raise InvalidRequest("the model's tokenizer has no token for any hedging word")
    return sorted(ids - {unknown})


def probe_column(vector: str, layer: int, plan: Plan) -> int | None:
    """The plan's first read of a stored vector, whichever its version, at a layer."""
    for column, read in enumerate(plan.probes):
        if read.place.layer == layer and plan.probe_names[read.probe].partition("@")[0] == vector:
            return column
    return None
