import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from steersman.steering.errors import InvalidRequest
from steersman.steering.prompt_images import PromptImage
from steersman.steering.spec import Tokens
from steersman.steering.tokens import Ints, Prompt, Rule, Selection, expand, select

ADAPTER: TypeAdapter[Tokens] = TypeAdapter(Tokens)
TEXT = {"cat": [1, 2], "dog": [5], "": []}
ROLES = {"user": [2, 3, 4], "system": [0]}
IMAGES = [[3, 6], [8, 9, 11]]


def tokens(data: object) -> Tokens:
    return ADAPTER.validate_json(json.dumps(data))


def prompt(ids: Sequence[int]) -> Prompt:
    """Finders whose answers lie inside the prompt."""

    def finder(found: dict[str, list[int]]) -> Any:
        return lambda what: [p for p in found[what] if p < len(ids)]

    images = [PromptImage([p for p in image if p < len(ids)], lambda: pytest.fail("no box")) for image in IMAGES]
    return Prompt(ids, finder(TEXT), finder(ROLES), images)


def selected(data: Any, ids: Sequence[int], length: int, position: int) -> bool:
    """The rule for one position, word by word as the request's documentation has it."""
    in_prompt = position < length
    if isinstance(data, str):
        return {
            "all": True,
            "prompt": in_prompt,
            "generated": not in_prompt,
            "last_prompt": position == length - 1,
        }[data]
    if set(data) == {"exclude"}:
        return not selected(data["exclude"], ids, length, position)

    def absolute(p: int) -> int:
        return p if p >= 0 else length + p

    texts = data.get("text") or []
    image = data.get("image", False)
    named = (
        range(len(IMAGES) if image else 0) if isinstance(image, bool) else [image] if isinstance(image, int) else image
    )
    chosen = (
        (in_prompt and data.get("prompt", False))
        or (not in_prompt and data.get("generated", False))
        or any(absolute(p) == position for p in data.get("positions") or ())
        or any(absolute(a) <= position < absolute(b) for a, b in data.get("ranges") or ())
        or (in_prompt and position >= length - (data.get("last") or 0))
        or ids[position] in (data.get("token_ids") or ())
        or (in_prompt and any(position in IMAGES[i] for i in named))
        or (in_prompt and any(position in TEXT[t] for t in ([texts] if isinstance(texts, str) else texts)))
        or (in_prompt and any(position in ROLES[r] for r in data.get("roles") or ()))
    )
    excluded = data.get("exclude") is not None and selected(data["exclude"], ids, length, position)
    return bool(chosen and not excluded)


WORDS = st.sampled_from(["all", "prompt", "generated", "last_prompt"])
OBJECT: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.booleans(),
    "generated": st.booleans(),
    "positions": st.lists(st.integers(-12, 25), max_size=4),
    "ranges": st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)).map(sorted), max_size=2)
    | st.lists(st.tuples(st.integers(-12, -1), st.integers(-12, -1)).map(sorted), max_size=2),
    "last": st.integers(0, 12),
    "image": st.booleans() | st.integers(0, 1) | st.lists(st.integers(0, 1), min_size=1, max_size=2),
    "text": st.sampled_from(["cat", "dog", ""]) | st.lists(st.sampled_from(["cat", "dog"]), max_size=2),
    "token_ids": st.lists(st.integers(0, 6), max_size=2),
    "roles": st.lists(st.sampled_from(["user", "system"]), max_size=2),
}
FLAT = st.fixed_dictionaries({}, optional=OBJECT)
SELECTOR = WORDS | st.fixed_dictionaries(
    {},
    optional={
        **OBJECT,
        "exclude": WORDS | FLAT | st.fixed_dictionaries({}, optional={**OBJECT, "exclude": WORDS | FLAT}),
    },
)
IDS = st.lists(st.integers(0, 6), min_size=1, max_size=20)


def masks(selection: Selection, ids: Sequence[int], start: int, end: int) -> list[int]:
    whole = np.asarray(ids, dtype=np.int64)
    found = selection.masks(start, end, lambda: whole[start:end])
    assert found.dtype == np.uint64
    assert found.shape == (end - start,)
    return [int(m) for m in found]


@given(st.lists(SELECTOR, min_size=1, max_size=4), IDS, st.data())
@settings(max_examples=300, deadline=None)
def test_masks_are_those_of_each_position_by_itself(selectors: list[Any], ids: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(ids)))
    parsed = [tokens(s) for s in selectors]
    selection = Selection.build(parsed, prompt(ids[:length]), [f"[{i}]" for i in range(len(parsed))])
    want = [
        sum(selected(s, ids, length, p) << i for i, s in enumerate(selectors))
        for p in range(len(ids))
    ]  # fmt: skip
    assert masks(selection, ids, 0, len(ids)) == want
    for i in range(len(selectors)):
        count = selection.count(i, len(ids), lambda: np.asarray(ids, dtype=np.int64))
        assert count == sum(m >> i & 1 for m in want)

    # in chunks, of any sizes
    cuts = sorted({0, len(ids), *data.draw(st.lists(st.integers(0, len(ids)), max_size=5))})
    parts = [masks(selection, ids, a, b) for a, b in pairwise(cuts)]
    assert [m for part in parts for m in part] == want

    # through JSON
    again = Selection.from_json(json.loads(json.dumps(selection.to_json())))
    assert again == selection
    assert masks(again, ids, 0, len(ids)) == want

    # the first edit, and whether there may be one at all
    edited = [p for p, m in enumerate(want) if m]
    assert not edited or edited[0] >= selection.first
    assert selection.anything or not edited
    for a, b, mask in selection.runs:
        assert 0 <= a < b <= length
        assert want[a:b] == [mask] * (b - a)
        assert mask
    assert all(one[1] < two[0] or one[2] != two[2] for one, two in pairwise(selection.runs))


def build(*data: object, ids: Sequence[int] = tuple(range(10))) -> Selection:
    return Selection.build([tokens(d) for d in data], prompt(ids), [f"[{i}].tokens" for i in range(len(data))])


def test_words_and_their_objects_mean_the_same() -> None:
    same = {"all": {"prompt": True, "generated": True}, "prompt": {"prompt": True}, "last_prompt": {"last": 1}}
    for word, data in same.items():
        assert build(word) == build(data)


def test_only_exclude_means_everything_else() -> None:
    selection = build({"exclude": {"positions": [0, -1]}})
    assert selection.runs == ((1, 9, 1),)
    assert (selection.generated, selection.rules) == (1, {})
    assert build({"exclude": "prompt"}) == build("generated")
    assert build({"exclude": {"exclude": "prompt"}}) == build("prompt")
    assert not build({"prompt": False, "exclude": "generated"}).anything


def test_an_object_that_selects_nothing_selects_nothing() -> None:
    nothing = build({}, {"positions": []}, {"positions": [-11]}, {"last": 0}, {"prompt": True, "exclude": "all"})
    assert (nothing.runs, nothing.generated, nothing.rules) == ((), 0, {})
    assert not nothing.anything
    assert nothing.first == 10


def test_positions_and_ranges_reach_into_what_is_generated() -> None:
    selection = build({"positions": [9, 10, 12], "ranges": [[8, 9], [20, 22]]})
    assert [p for p, m in enumerate(masks(selection, [0] * 30, 0, 30)) if m] == [8, 9, 10, 12, 20, 21]
    assert selection.runs == ((8, 10, 1),)


def test_a_range_may_mix_ends() -> None:
    assert build({"ranges": [[-2, 12]]}).runs == ((8, 10, 1),)
    assert build({"ranges": [[-99, 2]]}).runs == ((0, 2, 1),)
    with pytest.raises(InvalidRequest, match="ends before it begins") as raised:
        build("all", {"ranges": [[0, 1], [5, -8]]})
    assert raised.value.param == "[1].tokens.ranges[1]"
    with pytest.raises(InvalidRequest) as raised:
        build({"exclude": {"ranges": [[3, 2]]}})
    assert raised.value.param == "[0].tokens.exclude.ranges[0]"


def test_token_ids_are_asked_for_only_where_a_rule_needs_them() -> None:
    def never() -> Ints:
        raise AssertionError("no rule needs ids here")

    constant = build("all", {"last": 2}, {"text": "cat"}, {"generated": True, "exclude": {"last": 3}})
    assert constant.rules == {}
    constant.masks(0, 50, never)
    named = build({"token_ids": [7]})
    named.masks(0, 10, never)
    assert named.runs == ((7, 8, 1),)
    assert masks(named, [7] * 12, 10, 12) == [1, 1]


def test_excluding_token_ids_from_what_is_generated() -> None:
    selection = build({"generated": True, "exclude": {"token_ids": [3]}})
    assert masks(selection, [0] * 10 + [3, 4, 3], 10, 13) == [0, 1, 0]


def test_sixty_four_interventions_and_the_last_bit() -> None:
    selection = build(*["all"] * 63, "last_prompt")
    assert selection.runs == ((0, 9, 2**63 - 1), (9, 10, 2**64 - 1))
    assert selection.generated == 2**63 - 1
    last = build(*[{}] * 63, {"generated": True, "exclude": {"token_ids": [3]}})
    assert set(last.rules) == {63}
    again = Selection.from_json(json.loads(json.dumps(last.to_json())))
    assert masks(again, [0] * 10 + [3, 4], 8, 12) == [0, 0, 0, 2**63]
    assert last.count(63, 12, lambda: np.asarray([0] * 10 + [3, 4])) == 1
    everything = Selection.from_json(json.loads(json.dumps(build(*["all"] * 64).to_json())))
    assert masks(everything, [0] * 12, 9, 11) == [2**64 - 1] * 2


def test_an_empty_prompt() -> None:
    selection = build("all", "last_prompt", {"last": 3}, "generated", ids=[])
    assert (selection.runs, selection.generated, selection.first) == ((), 0b1001, 0)


@pytest.mark.parametrize("data", [{"text": "cat"}, {"roles": ["user"]}, {"exclude": {"text": "cat"}}])
def test_without_a_text_to_search_its_selectors_are_errors(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no text or messages") as raised:
        select(tokens(data), Prompt([1, 2, 3]), "tokens")
    assert raised.value.param is not None
    assert raised.value.param.rsplit(".", 1)[-1] in ("text", "roles")


def test_finders_are_called_only_when_needed() -> None:
    calls: list[str] = []

    def find(what: str) -> list[int]:
        calls.append(what)
        return [0]

    select(tokens({"prompt": True}), Prompt([1, 2], find, find))
    assert calls == []
    mask, rule = select(tokens({"text": ["a", "b"], "roles": ["user"]}), Prompt([1, 2], find, find))
    assert calls == ["a", "b", "user"]
    assert mask.tolist() == [True, False]
    assert rule == Rule(False)


def test_expanding_keeps_what_is_stated() -> None:
    stated = tokens({"last": 2, "exclude": "prompt"})
    assert expand(stated) is stated
