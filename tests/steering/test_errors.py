import pickle
import re

import pytest

from steersman.steering import errors
from steersman.steering.errors import SteeringError, StoreUnavailable, UnknownAsset, join_path, located

LEAVES = list(errors.codes().values())


def test_codes_are_unique_snake_case_and_every_class_is_in_the_table() -> None:
    classes = {
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, SteeringError) and cls not in errors.ABSTRACT
    }
    assert set(LEAVES) == classes
    assert len({cls.code for cls in classes}) == len(classes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code) for cls in classes)


def test_the_docstring_draws_every_leaf_and_nothing_else() -> None:
    drawn = re.findall(r"── (\w+) +(\d+)  (\w+) ", errors.__doc__ or "")
    assert {(name, int(status), code) for name, status, code in drawn} == {
        (cls.__name__, cls.status, cls.code) for cls in LEAVES
    }
    assert len(drawn) == len(LEAVES)


@pytest.mark.parametrize("cls", LEAVES)
def test_every_leaf_makes_an_openai_body_and_crosses_processes(cls: type[SteeringError]) -> None:
    error = cls("no", "vector").at("steering.interventions[0]")
    assert error.body() == {
        "error": {
            "message": "no",
            "type": "invalid_request_error" if cls.status < 500 else "internal_error",
            "param": "steering.interventions[0].vector",
            "code": cls.code,
        }
    }
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.body()) == (cls, error.body())


@pytest.mark.parametrize(
    ("prefix", "path", "joined"),
    [("a", "b", "a.b"), ("a", "[0].b", "a[0].b"), ("a", None, "a"), ("", "b", "b"), ("a", "", "a")],
)
def test_join_path(prefix: str, path: str | None, joined: str) -> None:
    assert join_path(prefix, path) == joined


def test_located_prepends_outwards() -> None:
    with pytest.raises(UnknownAsset) as raised, located("steering"), located("interventions[2]"):
        raise UnknownAsset("no asset 'x'", "vector")
    assert raised.value.param == "steering.interventions[2].vector"
    with pytest.raises(StoreUnavailable) as bare, located("steering"):
        raise StoreUnavailable("gone")
    assert bare.value.param == "steering"
