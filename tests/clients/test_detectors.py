"""Collecting, fitting and scoring answers; fitting where scikit-learn is installed."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from steersman.clients.detectors import collect, fit, read_answers, score
from steersman.clients.sdk import Steersman
from steersman.steering.asset_fields import ModelRef
from steersman.steering.detectors import DetectorMeta
from steersman.steering.errors import InvalidRequest
from steersman.steering.signals import summary

MODEL = ModelRef(id="tiny", n_layers=4, d_model=8)
FEATURES = ["answer_entropy.mean", "norm:3.max"]


def answers(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two kinds of good answers, whose features go together."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 2, n)
    entropy = random.normal(1.0 + 2.0 * kind, 0.1)
    norm = random.normal(20.0 + 10.0 * entropy, 1.0)
    return [
        {"answer_entropy": {"mean": float(a), "max": 9.0}, "norm:3": {"max": float(b), "mean": 0.0}}
        for a, b in zip(entropy, norm, strict=True)
    ]


def fitted(**options: Any) -> DetectorMeta:
    asset = fit("odd", MODEL, FEATURES, answers(200), components=2, **options)
    assert isinstance(asset.meta, DetectorMeta)
    return asset.meta


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_fit_scores_as_scikit_learn_does(covariance: Any) -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.mixture import GaussianMixture
    from sklearn.preprocessing import StandardScaler

    assert sklearn.__version__
    x = np.array([[a["answer_entropy"]["mean"], a["norm:3"]["max"]] for a in answers(200)])
    scaler = StandardScaler().fit(x)
    model = GaussianMixture(2, covariance_type=covariance, n_init=10, reg_covar=1e-4, random_state=0)
    model.fit(scaler.transform(x))
    new = answers(50, seed=1)
    y = np.array([[a["answer_entropy"]["mean"], a["norm:3"]["max"]] for a in new])
    found = score(fitted(covariance=covariance), new)
    assert found == pytest.approx((-model.score_samples(scaler.transform(y))).tolist(), rel=1e-6, abs=1e-6)


def test_what_is_unlike_the_good_answers_is_beyond_the_threshold() -> None:
    pytest.importorskip("sklearn")
    meta = fitted(quantile=0.95)
    own = np.array(score(meta, answers(200)))
    assert (own > meta.threshold).mean() == pytest.approx(0.05, abs=0.006)
    assert (np.array(score(meta, answers(500, seed=2))) > meta.threshold).mean() < 0.12
    apart = {"answer_entropy": {"mean": 1.0}, "norm:3": {"max": 50.0}}  # each usual, not together
    between = {"answer_entropy": {"mean": 2.0}, "norm:3": {"max": 40.0}}
    assert min(score(meta, [apart, between])) > meta.threshold
    assert fitted(quantile=0.95) == meta  # the seed decides


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (answers(19), {"components": 2}, "19 answers for 2 components; wanted: at least 20"),
        ([*answers(50), {"norm:3": {"max": 1.0}}], {}, "answer 50 has no answer_entropy.mean"),
        ([*answers(50), {"norm:3": {"max": None}, "answer_entropy": {"mean": 1.0}}], {}, "answer 50 has no norm:3.max"),
        ([{**a, "norm:3": {"max": 3.0}} for a in answers(50)], {}, "norm:3.max is the same in all answers"),
    ],
)
def test_answers_that_nothing_can_be_fitted_to(given: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        fit("odd", MODEL, FEATURES, given, **{"components": 1, **options})


def test_files_of_answers(tmp_path: Path) -> None:
    one, two, three = answers(3)
    file = tmp_path / "answers.jsonl"
    response = {"steering": {"signals": [{"choice": 0, "signals": two}, {"choice": 1, "signals": three}]}}
    file.write_text(f"{json.dumps({'text': 'x', 'signals': one})}\n\n{json.dumps(response)}\n")
    assert read_answers(file) == [one, two, three]
    for bad in ("{", "[]", "3", "{}", '{"steering": {}}'):
        file.write_text(f"{json.dumps(response)}\n{bad}\n")
        with pytest.raises(InvalidRequest, match="line 2"):
            read_answers(file)


def test_collecting_asks_for_the_signals_and_their_probes() -> None:
    asked: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        asked.append(json.loads(request.content))
        told = {"signals": [{"choice": 0, "signals": {"probe:v:2": summary([1.0, 3.0])}}]}
        return httpx.Response(200, json={"choices": [{"message": {"content": "Hi."}}], "steering": told})

    server = Steersman("http://server", transport=httpx.MockTransport(handle))
    messages = [{"role": "user", "content": "b"}]
    found = list(collect(server, ["a", messages], ["probe:v:2.mean", "probe:v:2.max", "norm:3.last"], max_tokens=7))
    assert [a["messages"] for a in asked] == [[{"role": "user", "content": "a"}], messages]
    for body in asked:
        assert body["steering"] == {"signals": ["probe:v:2", "norm:3"], "probes": [{"vector": "v", "layers": [2]}]}
        assert (body["model"], body["max_tokens"]) == ("tiny", 7)
    mean = {"tokens": 2, "first": 1.0, "last": 3.0, "mean": 2.0, "max": 3.0}
    assert [(a["text"], a["signals"]) for a in found] == [("Hi.", {"probe:v:2": mean})] * 2
