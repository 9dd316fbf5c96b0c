"""The server's detector, and what the engine is told of the signals that are asked for."""

import math
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from steersman.server.asked_signals import hedge_ids
from steersman.server.detection import Detection
from steersman.server.engine.frontend import Frontend
from steersman.server.metrics import Metrics
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import InvalidRequest, SteeringError, UnknownAsset
from steersman.steering.signals import HEDGES, summary
from tests.server.fakes import client, frontend
from tests.steering.library import REF, D, noise, vector


def detector(*features: str, **fields: Any) -> Asset:
    n = len(features)
    numbers = {"center": [1.0] * n, "spread": [2.0] * n, "weights": [1.0], "means": [[0.0] * n]}
    about = {"covariance": "diag", "covariances": [[1.0] * n], "threshold": 4.0}
    return Asset(parse_metadata(
        {"name": "odd", "kind": "detector", "model": REF, "features": list(features), **numbers, **about, **fields}
    ))  # fmt: skip


class Tokenizer:
    unk_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        words = {"may": [5], " may": [6], "perhaps": [7, 8], " perhaps": [9]}
        return words.get(text, [0])


@pytest.fixture
def made(tmp_path: Path) -> Frontend:
    out = frontend(tmp_path, tokenizer=Tokenizer())
    out.store.add(vector("mood", noise(2, D), [1, 2]))
    return out


def use(made: Frontend, asset: Asset) -> Detection:
    made.use_detector(made.store.add(asset))
    assert made.detector is not None
    return made.detector


def test_scores_and_what_is_said_of_them(made: Frontend) -> None:
    found = use(made, detector("answer_entropy.mean", "norm:3.last"))
    near = {"answer_entropy": summary([1.0]), "norm:3": summary([1.0])}
    far = {"answer_entropy": summary([1.0, 13.0]), "norm:3": summary([9.0, 5.0])}
    scores = found.scores([near, far, {"norm:3": summary([1.0])}])
    least = math.log(2 * math.pi)
    assert [s.value for s in scores] == [pytest.approx(least), pytest.approx(least + (3.0**2 + 2.0**2) / 2), None]
    assert found.block(scores) == {
        "asset": found.ref,
        "threshold": 4.0,
        "answers": [
            {"choice": 0, "score": scores[0].value, "unusual": False},
            {"choice": 1, "score": scores[1].value, "unusual": True},
            {"choice": 2, "score": None, "unusual": None, "missing": ["answer_entropy.mean"]},
        ],
    }
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.detects(found.name)

    def counted() -> dict[str, float | None]:
        name = "steersman_detector_answers_total"
        return {o: registry.get_sample_value(name, {"detector": "odd", "outcome": o}) for o in OUTCOMES}

    OUTCOMES = ("usual", "unusual", "unscored")
    assert set(counted().values()) == {0.0}
    metrics.scored(found.name, scores, found.threshold)
    assert set(counted().values()) == {1.0}
    assert registry.get_sample_value("steersman_detector_score_count", {"detector": "odd"}) == 2
    assert registry.get_sample_value("steersman_detector_score_bucket", {"detector": "odd", "le": "2.0"}) == 1


def test_its_signals_and_probes_are_those_of_every_request(made: Frontend) -> None:
    use(made, detector("probe:mood:2.mean", "evidence_entropy.max", "norm:0.mean"))
    for asked, probes in (({}, 1), ({"probes": [{"vector": "mood"}]}, 2), ({"signals": ["norm:1", "norm:0"]}, 1)):
        plan, _, told = made._build(asked)
        assert len(plan.probes) == probes  # of one layer, or the request's own of both
        signals = told["signals"]
        assert plan.probes[signals["probe:mood:2"]].place.layer == 2
        assert signals["evidence_entropy"] == hedge_ids(HEDGES, Tokenizer()) == [5, 6, 7, 8, 9]
        assert signals["norm:0"] == 0
        assert set(signals) == {"probe:mood:2", "evidence_entropy", "norm:0", *asked.get("signals", [])}


def test_without_a_detector_only_what_is_asked_for(made: Frontend) -> None:
    assert made._build({})[2] == {"whole": False, "signals": {}, "conflict": False}
    asked = {"signals": ["answer_entropy", "probe:mood:1"], "probes": [{"vector": "mood"}], "report": "tokens"}
    signals = {"answer_entropy": None, "probe:mood:1": 0}
    assert made._build(asked)[2] == {"whole": True, "signals": signals, "conflict": False}


@pytest.mark.parametrize(
    ("signals", "param"),
    [
        (["norm:3", "norm:4"], "steering.signals[1]"),
        (["probe:mood:1"], "steering.signals[0]"),
        (["probe:mood:"], "steering.signals"),
    ],
)
def test_signals_that_are_not_there(made: Frontend, signals: list[str], param: str) -> None:
    with pytest.raises(SteeringError) as caught:
        made._build({"signals": signals})
    assert caught.value.param == param
    assert caught.value.status == 400


def test_a_dry_run_looks_for_them_too(made: Frontend) -> None:
    http = client(made)
    answer = http.post("/v1/steering/resolve", json={"steering": {"signals": ["norm:3", "norm:4"]}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering.signals[1]")
    use(made, detector("probe:mood:2.mean"))
    found = http.post("/v1/steering/resolve", json={"steering": {"signals": ["norm:3"]}}).json()
    assert [name.partition("@")[0] for name in found["probes"]] == ["mood"]


def test_a_detector_that_does_not_fit_is_refused_at_the_start(made: Frontend) -> None:
    for asset, message in (
        (detector("norm:4.mean"), "layer 4 does not exist"),
        (detector("probe:nobody:1.mean"), "no asset 'nobody'"),
        (detector("probe:mood:3.mean"), "nothing for layer 3"),
        (detector("norm:1.mean", model={**REF, "d_model": D + 1}), "was made for org/tiny"),
        (vector("mood2", noise(2, D), [1, 2]), "wanted: detector"),
        (detector("evidence_entropy.mean", hedges=["nowhere"]), "no token for any hedging word"),
    ):
        with pytest.raises(SteeringError, match=message):
            made.use_detector(made.store.add(asset))
        assert made.detector is None
    with pytest.raises(UnknownAsset):
        made.use_detector("nobody")
    with pytest.raises(InvalidRequest, match="has no tokenizer"):
        hedge_ids(HEDGES, None)
