"""The server's detector (``--steering-detector``): how unlike known-good answers each steered request's answer is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steersman.steering.detectors import DetectorMeta
from steersman.steering.signals import features_of, parse_signal, signals_of


@dataclass(frozen=True)
class Score:
    """Of one answer. ``value`` is None where a feature is ``missing``."""

    choice: int
    value: float | None
    missing: tuple[str, ...]


class Detection:
    """A stored detector, ready to score."""

    def __init__(self, ref: str, meta: DetectorMeta) -> None:
        self.ref = ref  # name@version
        self.name = meta.name
        self.threshold = meta.threshold
        self.features = meta.features
        self.hedges = meta.hedges
        self.signals = signals_of(meta.features)
        self._mixture = meta.mixture()
        self.probes = [signal for signal in map(parse_signal, self.signals) if signal.kind == "probe"]

    def scores(self, answers: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Score]:
        """Of each answer, by what its signals are said to be."""
        out = []
        for choice, signals in enumerate(answers):
            values, missing = features_of(self.features, signals)
            value = None if missing else float(self._mixture.score([values])[0])
            out.append(Score(choice, value if value is not None and math.isfinite(value) else None, tuple(missing)))
        return out

    def block(self, scores: Sequence[Score]) -> dict[str, Any]:
        """What a response says of them."""
        told = []
        for s in scores:
            unusual = None if s.value is None else s.value > self.threshold
            about: dict[str, Any] = {"choice": s.choice, "score": s.value, "unusual": unusual}
            told.append({**about, "missing": list(s.missing)} if s.missing else about)
        return {"asset": self.ref, "threshold": self.threshold, "answers": told}
