import pytest

from steersman.steering import spec
from steersman.steering.errors import SteeringError
from steersman.steering.signals import Signal, features_of, parse_feature, parse_signal, signals_of, summary


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("answer_entropy", Signal("answer_entropy")),
        ("norm:12", Signal("norm", 12)),
        ("probe:v1.2-x:0", Signal("probe", 0, "v1.2-x")),
        ("logprob:31999", Signal("logprob", token=31999)),
        ("conflict", Signal("conflict")),
    ],
)
def test_names(name: str, signal: Signal) -> None:
    assert parse_signal(name) == signal
    assert parse_feature(f"{name}.max") == (name, "max")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "entropy",
        "norm",
        "norm:",
        "norm:-1",
        "norm:x",
        "probe:v",
        "probe:v@1:3",
        "norm:1 ",
        "logprob:-1",
        "logprob:yes",
    ],
)
def test_what_is_no_signal(name: str) -> None:
    with pytest.raises(ValueError, match="is no signal"):
        parse_signal(name)
    with pytest.raises(SteeringError) as caught:
        spec.parse({"signals": [name]})
    assert caught.value.param == "steering.signals"


@pytest.mark.parametrize("signals", [["conflict", "conflict"], ["norm:1", "norm:1"], ["norm:1"] * 65, "norm:1", [1]])
def test_what_a_request_may_not_ask_for(signals: object) -> None:
    with pytest.raises(SteeringError):
        spec.parse({"signals": signals})


def test_features() -> None:
    with pytest.raises(ValueError, match="is no feature"):
        parse_feature("norm:1.median")
    with pytest.raises(ValueError, match="is no feature"):
        parse_feature("answer_entropy")
    names = ["norm:1.max", "answer_entropy.last", "norm:1.first", "conflict.mean"]
    assert signals_of(names) == ["norm:1", "answer_entropy", "conflict"]
    told = {"norm:1": summary([2.0, 5.0, 3.0]), "answer_entropy": {"last": None}}
    assert told["norm:1"] == {"tokens": 3, "first": 2.0, "last": 3.0, "mean": 10 / 3, "max": 5.0}
    assert features_of(names, told) == ([5.0, 2.0], ["answer_entropy.last", "conflict.mean"])
