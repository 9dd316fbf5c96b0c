"""Detectors of unusual answers, from the client's side: collecting features, fitting, scoring.

Answers are JSON lines of ``{"signals": {NAME: {"first", "last", "mean", "max", ..}}}``, which :func:`collect` makes,
or whole responses of the server that have such signals. Fitting takes those that are known to be good, which you
choose. It needs scikit-learn (the extra ``detect``); scoring does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from steersman.clients.sdk import Steersman
from steersman.steering.asset_fields import ModelRef
from steersman.steering.assets import Asset
from steersman.steering.detectors import DetectorMeta
from steersman.steering.errors import InvalidRequest
from steersman.steering.mixture import Covariances
from steersman.steering.signals import HEDGES, features_of, parse_signal, signals_of

PER_COMPONENT: Final = 10
"""Answers for each component: fewer do not tell what its covariance is."""


def collect(
    server: Steersman, prompts: Iterable[str | Sequence[Mapping[str, Any]]], features: Sequence[str], **body: Any
) -> Iterator[dict[str, Any]]:
    """Asks for an answer to each prompt, a text or messages: what it was and its signals. ``body``: of the requests."""
    names = signals_of(features)
    parsed = [parse_signal(name) for name in names]
    probes = [{"vector": s.vector, "layers": [s.layer]} for s in parsed if s.kind == "probe"]
    model = server.served_model()
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        response = server.chat(messages, {"signals": names, "probes": probes}, model=model, **body)
        (signals,) = _signals(response)
        yield {"messages": messages, "text": response["choices"][0]["message"]["content"], "signals": signals}


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The signals of every answer in a file of JSON lines."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            found += _signals(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidRequest(f"{file}, line {number}: no answer with signals, and no response with any") from None
    return found


def fit(
    name: str,
    model: ModelRef,
    features: Sequence[str],
    answers: Sequence[Mapping[str, Any]],
    *,
    components: int = 5,
    covariance: Covariances = "full",
    quantile: float = 0.99,
    seed: int = 0,
    description: str = "",
) -> Asset:
    """A detector of the signals of known-good ``answers``; its threshold is this quantile of their own scores.

    As the paper fits it: standardised features, K = 5 full Gaussians, ten starts, 10⁻⁴ added to the variances.
    """
    values = [_complete(features, answer, i) for i, answer in enumerate(answers)]
    if len(values) < PER_COMPONENT * components:
        wanted = PER_COMPONENT * components
        raise InvalidRequest(f"{len(values)} answers for {components} components; wanted: at least {wanted}")
    x = np.array(values)
    center, spread = x.mean(0), x.std(0)
    same = [name for name, s, c in zip(features, spread, center, strict=True) if s <= 1e-12 * max(abs(c), 1e-12)]
    if same:
        raise InvalidRequest(f"{same[0]} is the same in all answers: nothing can be told by it", "features")
    mixture = _gaussian_mixture(components, covariance, seed).fit((x - center) / spread)
    meta = DetectorMeta(
        name=name,
        kind="detector",
        model=model,
        description=description,
        provenance={"method": "gaussian mixture", "answers": len(x), "components": components, "quantile": quantile},
        features=tuple(features),
        hedges=HEDGES,  # whose tokens servers look at unless a detector of theirs names others
        threshold=0.0,
        center=tuple(center.tolist()),
        spread=tuple(spread.tolist()),
        weights=tuple((mixture.weights_ / mixture.weights_.sum()).tolist()),
        means=mixture.means_.tolist(),
        covariance=covariance,
        covariances=mixture.covariances_.tolist(),
    )
    threshold = float(np.quantile(meta.mixture().score(x), quantile))
    return Asset(meta.model_copy(update={"threshold": threshold}))


def score(detector: DetectorMeta, answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """−ln p of each answer. Raises InvalidRequest for one that lacks a feature."""
    if not answers:
        return []
    values = [_complete(detector.features, answer, i) for i, answer in enumerate(answers)]
    return [float(s) for s in detector.mixture().score(values)]


def _complete(features: Sequence[str], answer: Mapping[str, Any], number: int) -> list[float]:
    values, missing = features_of(features, answer)
    if missing:
        raise InvalidRequest(f"answer {number} has no {missing[0]}", "features")
    return values


def _signals(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of one answer, or of each choice of a response."""
    if "signals" in given:
        return [dict(given["signals"])]
    return [dict(choice["signals"]) for choice in given["steering"]["signals"]]


def _gaussian_mixture(components: int, covariance: str, seed: int) -> Any:
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError:
        raise InvalidRequest("fitting needs scikit-learn: pip install 'steersman[detect]'") from None
    return GaussianMixture(components, covariance_type=covariance, n_init=10, reg_covar=1e-4, random_state=seed)
