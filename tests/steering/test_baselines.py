"""Baselines from workers' readings, against numpy over what came in between; and assets that are none."""

from typing import Any

import numpy as np
import pytest

from steersman.kernels.moments import Moments
from steersman.steering.asset_fields import ModelRef
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.baselines import MIN_TOKENS, make_baseline, seen_between
from steersman.steering.detectors import BaselineMeta, DetectorMeta
from steersman.steering.errors import InvalidRequest, SteeringError
from steersman.steering.formats import native
from tests.steering.test_assets import metadata

L = 3
MODEL = ModelRef(id="tiny", n_layers=L, d_model=8)


def logs(n: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal([[1.0], [2.0], [4.0]], [[0.1], [0.2], [0.4]], size=(L, n))


def reading(worker: str, values: np.ndarray) -> dict[str, Any]:
    return {"worker": worker, **Moments.of(values).to_json()}


def test_what_came_between_two_readings_of_several_workers() -> None:
    old, new, fresh = logs(700, 1), logs(800, 2), logs(900, 3)
    stage = np.array([1.0, 0.0, 0.0])  # a pipeline stage that has layer 0 alone
    part = Moments.of(logs(500, 4))
    partial = {"worker": "c", **Moments(part.count * stage, part.mean * stage, part.square * stage).to_json()}
    before = [reading("a", old), reading("gone", old)]
    after = [reading("a", np.concatenate([old, new], 1)), reading("b", fresh), partial]
    asset = make_baseline("usual", MODEL, seen_between(before, after, L), "of two readings")
    meta = asset.meta
    assert isinstance(meta, BaselineMeta)
    assert meta.counts == (2200, 1700, 1700)
    values = np.concatenate([new, fresh], 1)
    first = np.concatenate([values[0], logs(500, 4)[0]])
    assert meta.mean == pytest.approx([first.mean(), values[1].mean(), values[2].mean()], rel=1e-9)
    assert meta.deviation == pytest.approx([first.std(), values[1].std(), values[2].std()], rel=1e-9)
    assert native.from_json(native.to_json(asset)).version == asset.version


def test_too_little_is_no_baseline() -> None:
    seen = Moments.of(logs(MIN_TOKENS, 1))
    make_baseline("usual", MODEL, seen)
    seen.count[2] -= 1
    with pytest.raises(InvalidRequest, match="layer 2 was seen in 999 tokens, wanted: at least 1000"):
        make_baseline("usual", MODEL, seen)
    with pytest.raises(InvalidRequest, match="all norms at layer 0 are the same"):
        make_baseline("usual", MODEL, Moments.of(np.ones((L, MIN_TOKENS))))


@pytest.mark.parametrize(
    ("kind", "changes", "param"),
    [
        ("baseline", {"mean": [1.0]}, None),
        ("baseline", {"deviation": [0.1, 0.1, 0.0, 0.1]}, "deviation[2]"),
        ("baseline", {"mean": [1.0, 2.0, float("inf"), 1.0]}, "mean[2]"),
        ("detector", {"features": []}, "features"),
        ("detector", {"features": ["answer_entropy.mean", "norm:3"]}, None),
        ("detector", {"features": ["answer_entropy.mean", "attention.mean"]}, None),
        ("detector", {"features": ["answer_entropy.mean"] * 2}, None),
        ("detector", {"features": ["answer_entropy.mean"]}, None),
        ("detector", {"covariance": "tied"}, "covariance"),
        ("detector", {"covariances": [[[1.0, 2.0], [2.0, 1.0]]] * 2}, None),
        ("detector", {"threshold": float("nan")}, "threshold"),
    ],
)
def test_bad_metadata(kind: str, changes: dict[str, Any], param: str | None) -> None:
    assert isinstance(Asset(parse_metadata(metadata(kind))).meta, BaselineMeta | DetectorMeta)
    with pytest.raises(SteeringError) as caught:
        parse_metadata(metadata(kind, **changes))
    assert caught.value.param == param, caught.value.message
