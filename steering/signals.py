"""Signals: numbers that a request makes at each token that it generates, and features made of them.

| signal | at the position whose output is the generated token |
|---|---|
| `answer_entropy` | H = −Σ p ln p of the next token's distribution, in nats |
| `evidence_entropy` | −(p ln p + (1 − p) ln(1 − p)), p = Σ_{v ∈ U} p(v), U the tokens of hedging words; in nats |
| `logprob:ID` | ln p of the token with this id, however unlikely it is |
| `norm:LAYER` | ‖x‖ of the stream leaving the layer, after its edits |
| `probe:VECTOR:LAYER` | what the request's probe of that vector reads there |
| `conflict` | ln p(y|image, text) − ln p(y|text), by a replay of the answer (`steering/conflict.py`) |

A feature is `SIGNAL.STATISTIC`, the statistic over the generated tokens of one answer. Entropies and conflict are those
of "Anatomy of a Lie", which has them in bits; a detector standardises its features, so that the unit does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

STATISTICS: Final = ("first", "last", "mean", "max")
MAX_SIGNALS: Final = 64
HEDGES: Final = (
    "probably", "likely", "unlikely", "possibly", "perhaps", "maybe", "might", "may", "could", "seems", "seemingly",
    "appears", "apparently", "suggests", "presumably", "believe", "guess", "assume", "unsure", "uncertain", "unclear",
    "doubtful", "supposedly",
)  # fmt: skip
"""The words of U where a detector does not name its own."""
_SIGNAL: Final = re.compile(
    r"(?P<kind>answer_entropy|evidence_entropy|conflict)|norm:(?P<norm>\d{1,6})|logprob:(?P<token>\d{1,9})|"
    r"probe:(?P<vector>[A-Za-z0-9][A-Za-z0-9._-]{0,127}):(?P<layer>\d{1,6})"
)
_WANTED: Final = "answer_entropy, evidence_entropy, conflict, logprob:ID, norm:LAYER or probe:VECTOR:LAYER"


class Signal(NamedTuple):
    kind: str  # answer_entropy, evidence_entropy, conflict, logprob, norm or probe
    layer: int = -1  # of norm and probe
    vector: str = ""  # of probe, without a version
    token: int = -1  # of logprob, its id


def parse_signal(name: str) -> Signal:
    """Raises ValueError for what is no signal's name."""
    match = _SIGNAL.fullmatch(name)
    if match is None:
        raise ValueError(f"'{name}' is no signal; wanted: {_WANTED}")
    if match["kind"]:
        return Signal(match["kind"])
    if match["norm"]:
        return Signal("norm", int(match["norm"]))
    if match["token"]:
        return Signal("logprob", token=int(match["token"]))
    return Signal("probe", int(match["layer"]), match["vector"])


def check_signals(names: list[str]) -> list[str]:
    """Each once. Raises ValueError for what is none."""
    for name in names:
        parse_signal(name)
    if len(set(names)) != len(names):
        raise ValueError("a signal is named twice")
    return names


def parse_feature(name: str) -> tuple[str, str]:
    """(signal, statistic). Raises ValueError."""
    signal, dot, statistic = name.rpartition(".")
    if not dot or statistic not in STATISTICS:
        raise ValueError(f"'{name}' is no feature; wanted: a signal and one of .{', .'.join(STATISTICS)}")
    parse_signal(signal)
    return signal, statistic


def signals_of(features: Iterable[str]) -> list[str]:
    """The signals that these features are made of, each once."""
    return list(dict.fromkeys(parse_feature(name)[0] for name in features))


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """How many there are, and each statistic of them; at least one."""
    return {
        "tokens": len(values), "first": values[0], "last": values[-1],
        "mean": sum(values) / len(values), "max": max(values),
    }  # fmt: skip


def features_of(names: Sequence[str], signals: Mapping[str, Mapping[str, Any]]) -> tuple[list[float], list[str]]:
    """The features' values of one answer, whose signals are told as :func:`summary` has them; and those it lacks."""
    values, missing = [], []
    for name in names:
        signal, statistic = parse_feature(name)
        value = signals.get(signal, {}).get(statistic)
        if isinstance(value, int | float):
            values.append(float(value))
        else:
            missing.append(name)
    return values, missing
