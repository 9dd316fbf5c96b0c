"""What a steering object names in the store, and the key under which its plan is remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from steersman.steering import spec
from steersman.steering.assets import Asset

_NAMING = ("vector", "toward", "dictionary", "neurons", "affine", "recipe", "basis")


def key_of(parts: Iterable[tuple[str, spec.Steering]], assets: Mapping[str, Asset]) -> str:
    """Everything that a plan depends on. A field that is stated may mean other than its default: ``tokens`` does."""
    asked = [
        (path, [g.model_dump(mode="json", exclude_unset=True) for g in (*part.interventions, *part.probes)])
        for path, part in parts
    ]
    meant = {ref: asset.ref for ref, asset in assets.items()}
    return hashlib.sha256(json.dumps([asked, meant], sort_keys=True).encode()).hexdigest()


def references(steering: spec.Steering) -> Iterable[tuple[str, str]]:
    """(field path, asset ref) of every stored asset that a steering object names, profiles aside."""
    for i, given in enumerate(steering.interventions):
        yield from _named(given, f"interventions[{i}]", _NAMING)
        if given.when is not None:
            yield from _named(given.when, f"interventions[{i}].when", ("vector", "dictionary"))
    for i, probe in enumerate(steering.probes):
        yield from _named(probe, f"probes[{i}]", ("vector", "dictionary"))


def _named(given: object, path: str, fields: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in fields:
        if isinstance(ref := getattr(given, name, None), str):
            yield f"{path}.{name}", ref
