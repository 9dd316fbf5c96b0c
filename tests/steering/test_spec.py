import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.steering import spec
from steersman.steering.errors import (
    InvalidRequest,
    NonFinite,
    OutOfRange,
    SteeringError,
    TooManyInterventions,
    UnknownField,
)
from steersman.steering.sites import Site

INLINE = {"inline": {"dtype": "float32", "shape": [1, 2], "layers": [0], "data": "AACAPwAAgD8="}}
GATE = {"vector": "v", "layer": 1, "above": 0.5}
OPS: dict[str, dict[str, Any]] = {
    "add": {"vector": "v"},
    "ablate": {"vector": "v"},
    "clamp": {"vector": "v", "value": 1},
    "multiply": {"vector": "v", "factor": 2},
    "rotate": {"vector": "v", "toward": "w", "degrees": 30},
    "feature": {"dictionary": "d", "index": 3, "value": 4},
    "neurons": {"neurons": "n", "value": 4},
    "heads": {"heads": [[0, 1]], "factor": 0},
    "affine": {"affine": "a"},
    "patch": {"capture": "0" * 64},
    "inject": {"recipe": "r"},
}
PLACED = sorted(OPS.keys() - {"inject"})  # those that a site can be named for


def one(op: str = "add", **fields: Any) -> spec.Intervention:
    return spec.parse({"interventions": [{"op": op, **OPS[op], **fields}]}).interventions[0]


def refused(data: object) -> SteeringError:
    with pytest.raises(SteeringError) as raised:
        spec.parse(data)
    return raised.value


def refused_one(op: str = "add", **fields: Any) -> SteeringError:
    """The error of a request whose second intervention has these fields, its path from there on."""
    body = {k: v for k, v in {"op": op, **OPS[op], **fields}.items() if v is not ...}
    error = refused({"interventions": [{"op": "add", "vector": "v"}, body]})
    assert error.param is not None
    assert error.param.startswith("steering.interventions[1]")
    error.param = error.param.removeprefix("steering.interventions[1]").removeprefix(".")
    return error


def test_an_empty_object_asks_for_nothing() -> None:
    nothing = spec.parse({})
    assert (nothing.interventions, nothing.probes, nothing.profile) == ([], [], None)
    assert (nothing.default, nothing.report) == (True, "summary")
    assert spec.parse(nothing) is nothing


def test_every_op_is_tried_here_and_parses() -> None:
    assert set(OPS) == set(spec.OPS)
    for op in PLACED:
        parsed = one(op)
        assert parsed.op == op
        assert (parsed.layers, parsed.site, parsed.when, parsed.preserve_norm) == (None, None, None, False)
        assert parsed.tokens == "all"


def test_an_injection_has_its_own_sites_and_tokens() -> None:
    parsed = one("inject")
    assert (parsed.layers, parsed.when, parsed.tokens) == (None, None, spec.TokenSet(generated=True, last=1))
    for field in ({"site": "attn_out"}, {"preserve_norm": True}):
        error = refused_one("inject", **field)
        assert (type(error), error.param) == (UnknownField, next(iter(field)))


@pytest.mark.parametrize("op", PLACED)
def test_the_common_fields_go_with_every_op(op: str) -> None:
    parsed = one(op, layers=[1, 2], site="attn_z", tokens={"last": 2}, when=GATE, preserve_norm=True)
    assert (parsed.layers, parsed.site, parsed.preserve_norm) == ([1, 2], Site.ATTN_Z, True)
    assert parsed.tokens == spec.TokenSet(last=2)
    assert parsed.when == spec.Gate(vector="v", layer=1, above=0.5)


@pytest.mark.parametrize("name", ["scale", "strength", "coefficient"])
def test_a_scale_has_aliases_on_add(name: str) -> None:
    parsed = one(**{name: 2})
    assert isinstance(parsed, spec.Add)
    assert parsed.scale == 2.0


def test_two_names_of_the_scale_at_once_are_refused() -> None:
    error = refused_one(scale=1, strength=2)
    assert (type(error), error.param) == (UnknownField, "strength")


def test_strength_is_not_an_alias_elsewhere() -> None:
    assert refused_one("ablate", scale=1).param == "scale"
    assert refused_one("multiply", strength=1).param == "strength"


# -- unknown fields -----------------------------------------------------------------------------------


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"vector": "v", "foo": 1}, "foo"),
    ({"vector": "v", "when": {**GATE, "foo": 1}}, "when.foo"),
    ({"vector": "v", "when": {**GATE, "vector": {**INLINE, "foo": 1}}}, "when.vector.foo"),
    ({"vector": {**INLINE, "foo": 1}}, "vector.foo"),
    ({"vector": {"inline": {**INLINE["inline"], "foo": 1}}}, "vector.inline.foo"),
    ({"vector": "v", "tokens": {"foo": 1}}, "tokens.foo"),
    ({"vector": "v", "tokens": {"exclude": {"exclude": {"foo": 1}}}}, "tokens.exclude.exclude.foo"),
    ({"op": "neurons", "neurons": {"inline": [[0, 1]], "foo": 1}, "value": 1}, "neurons.foo"),
    ({"op": "heads", "heads": [[0, 1]], "factor": 1, "foo": 1}, "foo"),
]


@pytest.mark.parametrize(("fields", "param"), UNKNOWN)
def test_an_unknown_field_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = refused({"interventions": [{"op": "add", "vector": "v"}, {"op": "add", **fields}]})
    assert (type(error), error.param) == (UnknownField, f"steering.interventions[1].{param}")
    assert "'foo'" in error.message


def test_unknown_fields_outside_of_interventions() -> None:
    for data, param in (
        ({"foo": 1}, "steering.foo"),
        ({"probes": [{"vector": "v"}, {"vector": "v", "scale": 1}]}, "steering.probes[1].scale"),
    ):
        error = refused(data)
        assert (type(error), error.param) == (UnknownField, param)


@pytest.mark.parametrize("op", OPS)
def test_every_op_refuses_fields_of_other_ops(op: str) -> None:
    error = refused_one(op, foo=1)
    assert (type(error), error.param) == (UnknownField, "foo")


# -- wrong values ---------------------------------------------------------------------------------------


WRONG: list[tuple[str, dict[str, Any], type[SteeringError], str]] = [
    ("add", {"scale": "2"}, InvalidRequest, "scale"),
    ("add", {"scale": True}, InvalidRequest, "scale"),
    ("add", {"coefficient": True}, InvalidRequest, "coefficient"),
    ("add", {"scale": float("nan")}, NonFinite, "scale"),
    ("add", {"scale": float("-inf")}, NonFinite, "scale"),
    ("add", {"scale": 10**400}, NonFinite, "scale"),
    ("add", {"scale": 1e30}, OutOfRange, "scale"),
    ("add", {"scale": -1e30}, OutOfRange, "scale"),
    ("add", {"relative": "length"}, InvalidRequest, "relative"),
    ("add", {"vector": ...}, InvalidRequest, "vector"),
    ("add", {"vector": ""}, InvalidRequest, "vector"),
    ("add", {"vector": 5}, InvalidRequest, "vector"),
    ("add", {"vector": None}, InvalidRequest, "vector"),
    ("add", {"vector": {}}, InvalidRequest, "vector.inline"),
    ("add", {"vector": {"inline": 5}}, InvalidRequest, "vector.inline"),
    ("add", {"vector": {"inline": {"shape": [2], "data": 5}}}, InvalidRequest, "vector.inline.data"),
    ("add", {"vector": {"inline": {"shape": [2]}}}, InvalidRequest, "vector.inline.data"),
    ("add", {"vector": {"inline": {"shape": [], "data": ""}}}, InvalidRequest, "vector.inline.shape"),
    ("add", {"vector": {"inline": {"shape": [1] * 4, "data": ""}}}, InvalidRequest, "vector.inline.shape"),
    ("add", {"vector": {"inline": {"shape": [2, -1], "data": ""}}}, OutOfRange, "vector.inline.shape[1]"),
    ("add", {"vector": {"inline": {"shape": [2**31], "data": ""}}}, OutOfRange, "vector.inline.shape[0]"),
    ("add", {"vector": {"inline": {"shape": [2.0], "data": ""}}}, InvalidRequest, "vector.inline.shape[0]"),
    ("add", {"vector": {"inline": {"dtype": "int8", "shape": [2], "data": ""}}},InvalidRequest,"vector.inline.dtype"),
    ("add", {"from_layer": -1}, OutOfRange, "from_layer"),
    ("add", {"site": "resid"}, InvalidRequest, "site"),
    ("add", {"preserve_norm": 1}, InvalidRequest, "preserve_norm"),
    ("add", {"preserve_norm": "true"}, InvalidRequest, "preserve_norm"),
    ("ablate", {"strength": None}, InvalidRequest, "strength"),
    ("multiply", {"factor": ...}, InvalidRequest, "factor"),
    ("multiply", {"factor": float("inf")}, NonFinite, "factor"),
    ("rotate", {"toward": ...}, InvalidRequest, "toward"),
    ("rotate", {"degrees": "30"}, InvalidRequest, "degrees"),
    ("neurons", {"neurons": {"inline": []}}, InvalidRequest, "neurons.inline"),
    ("neurons", {"neurons": {"inline": [[0]]}}, InvalidRequest, "neurons.inline[0]"),
    ("neurons", {"neurons": {"inline": [[0, 1], [0, -1]]}}, OutOfRange, "neurons.inline[1][1]"),
    ("neurons", {"neurons": {"inline": [[0, True]]}}, InvalidRequest, "neurons.inline[0][1]"),
    ("neurons", {"neurons": {"inline": [[0, 1]]}, "value": "x"}, InvalidRequest, "value"),
    ("neurons", {"mode": "multiply"}, InvalidRequest, "mode"),
    ("neurons", {"value": ...}, InvalidRequest, "value"),
    ("heads", {"heads": []}, InvalidRequest, "heads"),
    ("heads", {"heads": [[0, 1, 2]]}, InvalidRequest, "heads[0]"),
    ("heads", {"heads": [[0, 1.5]]}, InvalidRequest, "heads[0][1]"),
    ("heads", {"factor": "x"}, InvalidRequest, "factor"),
    ("affine", {"affine": 5}, InvalidRequest, "affine"),
    ("affine", {"strength": "1"}, InvalidRequest, "strength"),
    ("add", {"when": 5}, InvalidRequest, "when"),
    ("add", {"when": {"vector": "v", "layer": 1}}, InvalidRequest, "when"),
    ("add", {"when": {**GATE, "above": float("nan")}}, NonFinite, "when.above"),
    ("add", {"when": {**GATE, "below": True}}, InvalidRequest, "when.below"),
    ("add", {"when": {**GATE, "over": "prompt"}}, InvalidRequest, "when.over"),
    ("add", {"when": {**GATE, "measure": "dot"}}, InvalidRequest, "when.measure"),
    ("add", {"when": {**GATE, "layer": "1"}}, InvalidRequest, "when.layer"),
    ("add", {"when": {**GATE, "hold": 1}}, InvalidRequest, "when.hold"),
    ("add", {"when": {"vector": "v", "above": 1}}, InvalidRequest, "when.layer"),
    ("add", {"tokens": "last"}, InvalidRequest, "tokens"),
    ("add", {"tokens": 5}, InvalidRequest, "tokens"),
    ("add", {"tokens": None}, InvalidRequest, "tokens"),
    ("add", {"tokens": {"last": -1}}, OutOfRange, "tokens.last"),
    ("add", {"tokens": {"positions": 5}}, InvalidRequest, "tokens.positions"),
    ("add", {"tokens": {"positions": [0, "1"]}}, InvalidRequest, "tokens.positions[1]"),
    ("add", {"tokens": {"positions": [10**30]}}, OutOfRange, "tokens.positions[0]"),
    ("add", {"tokens": {"ranges": [[0, 1], [1]]}}, InvalidRequest, "tokens.ranges[1]"),
    ("add", {"tokens": {"ranges": [[-(10**30), 1]]}}, OutOfRange, "tokens.ranges[0][0]"),
    ("add", {"tokens": {"token_ids": [-1]}}, OutOfRange, "tokens.token_ids[0]"),
    ("add", {"tokens": {"text": 5}}, InvalidRequest, "tokens.text"),
    ("add", {"tokens": {"text": ["a", 5]}}, InvalidRequest, "tokens.text[1]"),
    ("add", {"tokens": {"roles": "user"}}, InvalidRequest, "tokens.roles"),
    ("add", {"tokens": {"prompt": 1}}, InvalidRequest, "tokens.prompt"),
    ("add", {"tokens": {"exclude": "last"}}, InvalidRequest, "tokens.exclude"),
    ("add", {"tokens": {"exclude": {"last": "1"}}}, InvalidRequest, "tokens.exclude.last"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "fields", "kind", "param"), WRONG)
def test_a_wrong_value_is_refused_by_name(
    op: str, fields: dict[str, Any], kind: type[SteeringError], param: str
) -> None:
    error = refused_one(op, **fields)
    assert (type(error), error.param) == (kind, param), error.message
    assert error.status == 400


@pytest.mark.parametrize("data", [None, 5, "x", [], True])
def test_what_is_no_object_is_refused(data: object) -> None:
    error = refused(data)
    assert (type(error), error.param) == (InvalidRequest, "steering")


@pytest.mark.parametrize("value", [{1, 2}, b"x", "\ud800"])
def test_what_is_no_json_is_refused(value: object) -> None:
    assert refused({"profile": value}).param == "steering"


def test_what_is_nested_too_deeply_is_refused() -> None:
    for depth in (300, 100_000):
        tokens: dict[str, Any] = {"prompt": True}
        for _ in range(depth):
            tokens = {"exclude": tokens}
        assert isinstance(refused({"interventions": [{"op": "add", "vector": "v", "tokens": tokens}]}), InvalidRequest)


@pytest.mark.parametrize("op", [{"op": "steer"}, {"op": 5}, {"op": None}, {"op": ["add"]}, {}])
def test_an_unknown_op_is_answered_with_those_there_are(op: dict[str, Any]) -> None:
    error = refused({"interventions": [{**op, "vector": "v"}]})
    assert (type(error), error.param) == (InvalidRequest, "steering.interventions[0].op")
    assert all(name in error.message for name in spec.OPS)


def test_an_intervention_that_is_no_object() -> None:
    assert refused({"interventions": [5]}).param == "steering.interventions[0]"
    assert refused({"interventions": {"op": "add"}}).param == "steering.interventions"


def test_too_many_interventions_and_probes() -> None:
    add = {"op": "add", "vector": "v"}
    assert len(spec.parse({"interventions": [add] * 64, "probes": [{"vector": "v"}] * 64}).probes) == 64
    for name, item in (("interventions", add), ("probes", {"vector": "v"})):
        error = refused({name: [item] * 2000})
        assert (type(error), error.param) == (TooManyInterventions, f"steering.{name}")
    many_bad = refused({"interventions": [{"op": "add"}] * 2000})
    assert isinstance(many_bad, InvalidRequest)


def test_the_first_of_several_mistakes_is_named() -> None:
    error = refused({"interventions": [{"op": "add", "vector": "v", "scale": "1"}, {"op": "steer"}], "foo": 1})
    assert error.param == "steering.interventions[0].scale"


def test_messages_of_unions_say_what_may_stand_there() -> None:
    assert "string or an object" in refused_one(vector=5).message
    assert "integer or a valid array or a valid string" in refused_one(layers=1.5).message
    assert "last_prompt" in refused_one(tokens="last").message


def test_a_path_prefix_is_the_callers() -> None:
    for prefix, param in (("default", "default.interventions[0].scale"), ("", "interventions[0].scale")):
        with pytest.raises(SteeringError) as raised:
            spec.parse({"interventions": [{"op": "add", "vector": "v", "scale": "1"}]}, prefix)
        assert raised.value.param == param


# -- constraints between fields -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": None}, "needs either"),
        ({"value": 1, "min": 0}, "needs either"),
        ({"value": None, "min": 2, "max": 1}, "min must not exceed max"),
    ],
)
def test_clamp_wants_a_value_or_bounds_in_order(fields: dict[str, Any], message: str) -> None:
    error = refused_one("clamp", **fields)
    assert error.param == ""
    assert message in error.message


def test_clamp_takes_either_bound_or_both() -> None:
    for bounds in ({"min": -1}, {"max": 1}, {"min": 1, "max": 1}, {"value": 0}):
        assert one("clamp", **{"value": None, **bounds}).op == "clamp"


def test_heads_wants_a_factor_or_a_vector() -> None:
    assert "either factor or vector" in refused_one("heads", factor=None).message
    assert "either factor or vector" in refused_one("heads", vector="v").message
    assert "scale goes with vector" in refused_one("heads", scale=2).message
    parsed = one("heads", factor=None, vector="v", strength=2)
    assert isinstance(parsed, spec.Heads)
    assert (parsed.heads, parsed.scale) == ([(0, 1)], 2.0)


# -- layers, tokens, probes -----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 5, [0], [3, 1], "all", "2-4", "0-0", None])
def test_layers_that_can_be_named(layers: object) -> None:
    assert one(layers=layers).layers == layers


@pytest.mark.parametrize(
    ("layers", "kind", "param"),
    [
        (-1, OutOfRange, "layers"),
        (2**31, OutOfRange, "layers"),
        (1.0, InvalidRequest, "layers"),
        (True, InvalidRequest, "layers"),
        (float("nan"), InvalidRequest, "layers"),
        ([], InvalidRequest, "layers"),
        ([0, -1], OutOfRange, "layers[1]"),
        ([0, "1"], InvalidRequest, "layers[1]"),
        ([[0]], InvalidRequest, "layers[0]"),
        ({}, InvalidRequest, "layers"),
        ("5", InvalidRequest, "layers"),
        ("", InvalidRequest, "layers"),
        ("1-", InvalidRequest, "layers"),
        ("1-2-3", InvalidRequest, "layers"),
        ("-1-2", InvalidRequest, "layers"),
        ("ALL", InvalidRequest, "layers"),
        ("1-9999999", InvalidRequest, "layers"),
    ],
)
def test_layers_that_cannot(layers: object, kind: type[SteeringError], param: str) -> None:
    error = refused_one(layers=layers)
    assert (type(error), error.param) == (kind, param)


@pytest.mark.parametrize("word", ["all", "prompt", "generated", "last_prompt"])
def test_tokens_may_be_a_word_also_in_exclude(word: str) -> None:
    assert one(tokens=word).tokens == word
    assert one(tokens={"exclude": word}).tokens == spec.TokenSet(exclude=word)


def test_every_token_selector_parses() -> None:
    everything: dict[str, Any] = {
        "prompt": True, "generated": False, "positions": [0, -1], "ranges": [[0, 2], [-3, -1]], "last": 4,
        "image": True, "patches": [[0, 3], [5, 6]], "box": [0.5, 1.0, 20.0, 30.0], "text": ["a", "b"],
        "token_ids": [7], "roles": ["user"], "exclude": {"text": "c"},
    }  # fmt: skip
    parsed = one(tokens=everything).tokens
    assert isinstance(parsed, spec.TokenSet)
    assert set(everything) == set(spec.TokenSet.model_fields)
    assert json.loads(parsed.model_dump_json(exclude_unset=True)) == everything
    for several in ({"image": 0}, {"image": [0, 2]}, {"image": 0, "box": [[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.5, 4.0]]}):
        assert json.loads(one(tokens=several).tokens.model_dump_json(exclude_unset=True)) == several  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tokens", "kind", "param"),
    [
        ({"image": -1}, OutOfRange, "image"),
        ({"image": 1.0}, InvalidRequest, "image"),
        ({"image": []}, InvalidRequest, "image"),
        ({"image": [0, -1]}, OutOfRange, "image[1]"),
        ({"image": [True]}, InvalidRequest, "image[0]"),
        ({"image": "0"}, InvalidRequest, "image"),
        ({"patches": [[0, 1]]}, InvalidRequest, "patches"),
        ({"box": [0, 0, 1, 1]}, InvalidRequest, "box"),
        ({"image": False, "box": [0, 0, 1, 1]}, InvalidRequest, "box"),
        ({"exclude": {"box": [0, 0, 1, 1]}}, InvalidRequest, "exclude.box"),
        ({"image": 0, "patches": []}, InvalidRequest, "patches"),
        ({"image": 0, "patches": [0, 1]}, InvalidRequest, "patches[0]"),
        ({"image": 0, "patches": [[0, 1], [2, 2]]}, InvalidRequest, "patches[1]"),
        ({"image": 0, "patches": [[-2, -1]]}, OutOfRange, "patches[0][0]"),
        ({"image": 0, "box": []}, InvalidRequest, "box"),
        ({"image": 0, "box": {}}, InvalidRequest, "box"),
        ({"image": 0, "box": [0, 0, 1]}, InvalidRequest, "box"),
        ({"image": 0, "box": [0, 0, 0, 1]}, InvalidRequest, "box"),
        ({"image": 0, "box": [0, 2, 1, 1]}, InvalidRequest, "box"),
        ({"image": 0, "box": [-1, 0, 1, 1]}, OutOfRange, "box[0]"),
        ({"image": 0, "box": [0, 0, 1, float("inf")]}, NonFinite, "box[3]"),
        ({"image": 0, "box": [0, 0, True, 1]}, InvalidRequest, "box[2]"),
        ({"image": 0, "box": [[0, 0, 1, 1], [0, 0, 1]]}, InvalidRequest, "box[1]"),
        ({"image": 0, "box": [[0, 0, 1, 1], [1, 1, 1, 2]]}, InvalidRequest, "box[1]"),
        ({"image": 0, "box": [[0, 0, 1, 1], [0, -1, 1, 1]]}, OutOfRange, "box[1][1]"),
    ],
)
def test_parts_of_images_that_cannot(tokens: object, kind: type[SteeringError], param: str) -> None:
    error = refused_one(tokens=tokens)
    assert (type(error), error.param) == (kind, f"tokens.{param}")


def test_a_vector_may_be_inline_in_every_place() -> None:
    one(vector=INLINE)
    one("rotate", toward=INLINE)
    one(when={**GATE, "vector": INLINE})
    one("heads", factor=None, vector=INLINE)
    assert isinstance(spec.parse({"probes": [{"vector": INLINE, "layers": 0}]}).probes[0].vector, spec.Inline)


def test_reports_and_switches() -> None:
    assert spec.parse({"report": "layers", "default": False, "profile": "calm"}).report == "layers"
    assert refused({"report": "everything"}).param == "steering.report"
    assert refused({"default": 0}).param == "steering.default"
    assert refused({"profile": 5}).param == "steering.profile"


def test_the_json_schema_names_every_op_and_is_closed() -> None:
    schema = spec.Steering.model_json_schema()
    text = json.dumps(schema)
    for op in spec.OPS:
        assert f'"const": "{op}"' in text
    assert schema["additionalProperties"] is False
    assert all(d.get("additionalProperties") is False for d in schema["$defs"].values() if d["type"] == "object")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(spec.OPS)
NAMES = st.sampled_from([*spec.Steering.model_fields, "op", "vector", "tokens", "layers", "inline", "when", "x"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)


@given(JSON)
def test_whatever_is_sent_it_parses_or_is_refused_by_a_field_that_exists(data: object) -> None:
    error = None
    try:
        spec.parse(data)
    except SteeringError as refusal:
        error = refusal
    assert error is None or (error.status == 400 and error.message and str(error.param).startswith("steering"))
