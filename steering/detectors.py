"""Assets that say what is usual: a baseline of norms, and a detector of unusual answers. Numbers only, no tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from steersman.steering.asset_fields import CommonMeta, Count, Number, Text
from steersman.steering.mixture import Covariances, Mixture
from steersman.steering.signals import HEDGES, MAX_SIGNALS, parse_feature


class BaselineMeta(CommonMeta):
    """What norms are usual: of ln‖x‖ leaving each layer, over tokens of known-good traffic."""

    kind: Literal["baseline"]
    counts: tuple[Count, ...]  # [n_layers] tokens
    mean: tuple[Number, ...]  # [n_layers]
    deviation: tuple[Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)], ...]  # [n_layers] standard

    @model_validator(mode="after")
    def _complete(self) -> BaselineMeta:
        if {len(self.counts), len(self.mean), len(self.deviation)} != {self.model.n_layers}:
            raise ValueError("counts, mean and deviation need one number for each of the model's layers")
        return self


class DetectorMeta(CommonMeta):
    """A mixture over features of an answer (`steering/signals.py`), fitted to answers that are known to be good."""

    kind: Literal["detector"]
    features: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_SIGNALS)]
    hedges: Annotated[tuple[Text, ...], Field(min_length=1, max_length=256)] = HEDGES  # words of evidence_entropy
    threshold: Number  # a score above it is unusual
    center: tuple[Number, ...]
    spread: tuple[Number, ...]
    weights: tuple[Number, ...]
    means: tuple[tuple[Number, ...], ...]
    covariance: Covariances
    covariances: tuple[tuple[Number, ...], ...] | tuple[tuple[tuple[Number, ...], ...], ...]

    def mixture(self) -> Mixture:
        return Mixture(self.center, self.spread, self.weights, self.means, self.covariances, self.covariance)

    @model_validator(mode="after")
    def _sound(self) -> DetectorMeta:
        for name in self.features:
            parse_feature(name)
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature is named twice")
        if len(self.center) != len(self.features):
            raise ValueError(f"center has {len(self.center)} numbers, one for each of {len(self.features)} features")
        self.mixture()
        return self
