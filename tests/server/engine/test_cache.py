"""vLLM's own requests and block hasher, with our keys."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import vllm
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from steersman.server.engine import cache
from steersman.server.engine.wire import KEY
from steersman.steering.spec import Tokens, TokenSet
from steersman.steering.tokens import Prompt, Selection

LOOK = "vLLM changed what server/engine/cache.py relies on; see its docstring"
BLOCK = 4
PROMPT = list(range(100, 112))  # three blocks


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    init_none_hash(sha256)
    original = inspect.unwrap(getattr(kv_cache_utils, cache.NAME))
    for module in bound():
        monkeypatch.setattr(module, cache.NAME, original)
    cache.patch()


def bound() -> list[ModuleType]:
    """The modules of this vLLM that hold the function by name."""
    names = [name for name in (cache.OWNER, *cache.IMPORTERS) if importlib.util.find_spec(name)]
    return [m for m in map(importlib.import_module, names) if hasattr(m, cache.NAME)]


def request(
    prompt: list[int],
    *selectors: Tokens,
    output: list[int] | None = None,
    plan: str = "plan",
    decides: bool = False,
    **kwargs: Any,
) -> Request:
    extra = None
    if selectors:
        selection = Selection.build(selectors, Prompt(prompt), [""] * len(selectors))
        args = {"plan": "?", "edits": plan, "key": "?", "selection": selection.to_json(), "decides": decides}
        extra = {KEY: args}
    made = Request(
        request_id="r",
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(extra_args=extra),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
        **kwargs,
    )
    for token in output or []:
        made.append_output_token_ids(token)
    return made


def hashes(*args: Any, **kwargs: Any) -> list[bytes]:
    return list(request(*args, **kwargs).block_hashes)


def test_an_unsteered_request_hashes_as_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    with_us = hashes(PROMPT, output=PROMPT)
    monkeypatch.setattr(kv_cache_utils, cache.NAME, inspect.unwrap(getattr(kv_cache_utils, cache.NAME)))
    assert hashes(PROMPT, output=PROMPT) == with_us
    assert len(with_us) == 6


def test_blocks_before_the_first_edit_are_shared_with_everybody() -> None:
    plain, edited = hashes(PROMPT), hashes(PROMPT, TokenSet(positions=[5]))
    assert edited[:1] == plain[:1]
    assert edited[1] != plain[1]
    assert edited[2] != plain[2]  # by its parent's hash


def test_equal_plans_and_selections_share_everything() -> None:
    assert hashes(PROMPT, "all", output=PROMPT) == hashes(PROMPT, "all", output=PROMPT)
    assert hashes(PROMPT, "last_prompt") == hashes(PROMPT, TokenSet(positions=[-1]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"plan": "a"}, {"plan": "b"}),
        ({"selectors": [TokenSet(positions=[5])]}, {"selectors": [TokenSet(positions=[6])]}),
        ({"selectors": [TokenSet(positions=[5])]}, {"selectors": [TokenSet(positions=[5, 6])]}),
        ({"selectors": ["all", TokenSet(positions=[5])]}, {"selectors": [TokenSet(positions=[5]), "all"]}),
    ],
    ids=["plans", "positions", "more positions", "interventions"],
)
def test_other_edits_give_other_hashes(one: dict[str, Any], other: dict[str, Any]) -> None:
    def block(selectors: tuple[Tokens, ...] = (TokenSet(positions=[5]),), **kwargs: Any) -> bytes:
        return hashes(PROMPT, *selectors, **kwargs)[1]

    assert block(**one) != block(**other)


def test_a_gate_that_decides_once_binds_the_blocks_to_the_prompt_s_length() -> None:
    longer = [*PROMPT, 1, 2, 3, 4]
    assert hashes(PROMPT, "all") == hashes(longer, "all")[:3]
    short, long = hashes(PROMPT, "all", decides=True), hashes(longer, "all", decides=True)
    assert not set(short) & set(long)
    assert short == hashes(PROMPT, "all", decides=True)


def test_generated_tokens_that_become_a_prompt_are_edited_no_longer() -> None:
    more = [7, 8, 9, 10]
    generated, prompt = hashes(PROMPT, "generated", output=more), hashes([*PROMPT, *more], "generated")
    assert generated[:3] == prompt[:3]
    assert generated[3] != prompt[3]
    assert prompt == hashes([*PROMPT, *more])


def test_tokens_that_are_edited_wherever_they_stand_stay_shared() -> None:
    more = [7, 8, 9, 10]
    for selector in ("all", TokenSet(token_ids=[8, 103])):
        assert hashes(PROMPT, selector, output=more) == hashes([*PROMPT, *more], selector)


def test_the_prompt_s_end_inside_a_block() -> None:
    short = PROMPT[:10]
    assert hashes(short, "prompt", output=PROMPT[10:])[2] != hashes(PROMPT, "prompt")[2]
    assert hashes(short, "last_prompt", output=PROMPT[10:])[2] != hashes(PROMPT, "last_prompt")[2]


def test_hashing_as_tokens_come_equals_hashing_at_once() -> None:
    args: Any = (TokenSet(positions=[5], generated=True),)
    growing = request(PROMPT, *args, output=list(range(1, 10)))
    at_once = request(PROMPT, *args)
    at_once.append_output_token_ids(list(range(1, 10)))
    assert len(growing.block_hashes) == 5
    assert growing.block_hashes == at_once.block_hashes


def test_other_keys_stay() -> None:
    salted = request(PROMPT, "all", cache_salt="salt")
    ours = cache.block_key(salted, 0, BLOCK)
    keys, mm_index = getattr(kv_cache_utils, cache.NAME)(salted, 0, BLOCK, 0)
    theirs, same_index = inspect.unwrap(getattr(kv_cache_utils, cache.NAME))(salted, 0, BLOCK, 0)
    assert keys == (*theirs, ours)
    assert mm_index == same_index
    assert hashes(PROMPT, "all", cache_salt="salt") != hashes(PROMPT, "all", cache_salt="other")


def test_patching_twice_changes_nothing() -> None:
    once = getattr(kv_cache_utils, cache.NAME)
    cache.patch()
    assert getattr(kv_cache_utils, cache.NAME) is once


def test_every_module_that_bound_the_name_has_ours() -> None:
    ours = getattr(kv_cache_utils, cache.NAME)
    assert hasattr(ours, "__wrapped__")
    assert len(bound()) > 1, LOOK
    assert all(getattr(module, cache.NAME) is ours for module in bound())


def test_contract_the_function_takes_and_gives_what_we_rely_on() -> None:
    original = inspect.unwrap(getattr(kv_cache_utils, cache.NAME))
    assert list(inspect.signature(original).parameters) == [
        "request", "start_token_idx", "end_token_idx", "start_mm_idx",
    ], LOOK  # fmt: skip
    assert original(request(PROMPT), 0, BLOCK, 0) == (None, 0), LOOK


def test_contract_no_other_module_imports_the_name() -> None:
    root = Path(vllm.__file__).parent
    users = {
        ".".join(("vllm", *path.relative_to(root).with_suffix("").parts))
        for path in root.rglob("*.py")
        if cache.NAME in path.read_text(encoding="utf-8")
    }
    unknown = users - {cache.OWNER, *cache.IMPORTERS}
    assert not unknown, f"{unknown} use {cache.NAME}: add what imports it to IMPORTERS in server/engine/cache.py"


def test_contract_events_take_our_key() -> None:
    untag = getattr(kv_cache_utils, "to_event_extra_keys", None)
    if untag is None:
        pytest.skip("this vLLM publishes keys as they are")
    key = cache.block_key(request(PROMPT, "all"), 0, BLOCK)
    assert key is not None
    assert untag([(key,), None]) == [(key[1],), None], LOOK
