"""Text and roles among a prompt's tokens, with tokenizers of the kinds there are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from jinja2 import Environment
from jinja2.exceptions import TemplateError

from steersman.server.engine.prompts import LONGEST_CHARACTER, RoleFinder, TextFinder
from steersman.steering.errors import InvalidRequest
from tests.models.tiny import _tokenizer

TEXT = "The ship — naïve, 你好 🚢🚢 — came about. ship Ship ship"


@cache
def byte_level() -> Any:
    """Byte-level BPE: characters beyond ASCII are spread over several tokens."""
    return _tokenizer()


class SentencePiece:
    """Words begin with ▁; the space at the very start of what is decoded is dropped; unknown characters are bytes."""

    def __init__(self, words: Sequence[str]) -> None:
        self.pieces = [*words, *(f"<0x{i:02X}>" for i in range(256))]

    def encode(self, text: str) -> list[int]:
        out, rest = [], "▁" + text.replace(" ", "▁")
        while rest:
            piece = max((p for p in self.pieces[:-256] if rest.startswith(p)), key=len, default=None)
            if piece is None:
                out += [len(self.pieces) - 256 + b for b in rest[0].encode()]
                rest = rest[1:]
            else:
                out.append(self.pieces.index(piece))
                rest = rest[len(piece) :]
        return out

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        raw = b"".join(
            bytes([i - len(self.pieces) + 256]) if i >= len(self.pieces) - 256 else self.pieces[i].encode() for i in ids
        )
        text = raw.decode(errors="replace").replace("▁", " ")
        return text.removeprefix(" ")


PIECES = SentencePiece(["▁", "▁the", "▁ship", "ship", "s", "▁came", "▁a", "bout", ".", "▁2", "5", "<s>", "▁é"])


def spelled(finder: TextFinder, positions: Sequence[int]) -> str:
    return str(finder.tokenizer.decode([finder.ids[i] for i in positions], skip_special_tokens=False))


@pytest.mark.parametrize("text", [TEXT, "plain words only", "🚢", "é" * 50, "a\n\n\tb", "你好" * 20, ""])
def test_the_decoded_text_is_the_prompts(text: str) -> None:
    tokenizer = byte_level()
    finder = TextFinder(tokenizer, tokenizer.encode(text))
    assert finder.text == "<|bos|>" + text


@pytest.mark.parametrize("part", ["ship", "naïve", "你", "好", "🚢", "—", " ", "The", "T", "<|bos|>"])
def test_the_tokens_found_hold_the_text_and_are_the_fewest(part: str) -> None:
    tokenizer = byte_level()
    finder = TextFinder(tokenizer, tokenizer.encode(TEXT))
    found = finder(part)
    assert found == sorted(set(found))
    _, starts, ends = finder._decoded
    wanted, at = set(), finder.text.find(part)
    while at >= 0:
        wanted |= {i for i in range(len(finder.ids)) if starts[i] < at + len(part) and ends[i] > at}
        at = finder.text.find(part, at + 1)
    assert wanted
    assert set(found) == wanted
    assert part in spelled(finder, found)


def test_a_character_spread_over_tokens_belongs_to_all_of_them() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a🚢b", add_special_tokens=False)
    assert len(ids) == 6  # the ship is four bytes, each a token
    finder = TextFinder(tokenizer, ids)
    assert finder("🚢") == [1, 2, 3, 4]
    assert finder("a🚢") == [0, 1, 2, 3, 4]
    assert finder("b") == [5]


def test_every_occurrence_is_found_also_where_they_overlap() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("zzz", add_special_tokens=False)
    finder = TextFinder(tokenizer, ids)
    assert finder("zz") == list(range(len(ids)))


@pytest.mark.parametrize("text", ["absent", "SHIP", ""])
def test_what_does_not_occur_matches_nothing(text: str) -> None:
    tokenizer = byte_level()
    assert TextFinder(tokenizer, tokenizer.encode(TEXT))(text) == []


def test_no_tokens_no_text() -> None:
    finder = TextFinder(byte_level(), [])
    assert finder.text == ""
    assert finder("a") == []


@pytest.mark.parametrize("text", ["the ship came about.", "the é ship 25", "ship the ship", "the 船 ship"])
def test_a_leading_space_that_the_tokenizer_drops(text: str) -> None:
    ids = PIECES.encode(text)
    finder = TextFinder(PIECES, ids)
    assert finder.text == text
    for word in text.split():
        assert word in spelled(finder, finder(word))


def test_prompts_of_anything_are_read_alike_in_whole_and_in_parts() -> None:
    tokenizer, chance = byte_level(), random.Random(3)
    alphabet = "ab é—你好🚢\n"
    for _ in range(100):
        text = "".join(chance.choice(alphabet) for _ in range(chance.randrange(30)))
        finder = TextFinder(tokenizer, tokenizer.encode(text, add_special_tokens=False))
        assert finder.text == text
        _, starts, ends = finder._decoded
        assert len(starts) == len(ends) == len(finder.ids)
        assert all(a <= b for a, b in zip(starts, ends, strict=True))


class Counting:
    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        self.decoded += len(ids)
        return byte_level().decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("text", ["\ufffd" * 500, "é" * 500, "plain " * 500])
def test_the_work_grows_with_the_length_and_not_its_square(text: str) -> None:
    ids = byte_level().encode(text, add_special_tokens=False)
    tokenizer = Counting()
    assert TextFinder(tokenizer, ids).text
    assert tokenizer.decoded <= 2 * LONGEST_CHARACTER * len(ids)


def test_bytes_that_make_no_character_do_not_hide_what_follows() -> None:
    tokenizer = byte_level()
    lone = tokenizer.encode("é", add_special_tokens=False)[:1]
    ids = lone * 40 + tokenizer.encode(" ship", add_special_tokens=False)
    finder = TextFinder(tokenizer, ids)
    assert "ship" in spelled(finder, finder("ship"))
    assert min(finder("ship")) >= 40 - LONGEST_CHARACTER


# -- roles ------------------------------------------------------------------------------------------

CHATML = (
    "{% if messages[0].role != 'system' %}<|system|>You are kind to the user.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
)
STRIPPING = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [/{{ m.role }}]{% endfor %}"
PARTS = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}CALL {{ m.tool_calls[0].name }}"
    "{% else %}{{ m.content }}{% endif %}</{{ m.role }}>{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user',) %}{{ raise('no') }}{% endif %}{{ m.content }};{% endfor %}"
)


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def rendering(template: str) -> Callable[[Sequence[Any]], str]:
    def fail(message: str) -> None:
        raise TemplateError(message)

    compiled = Environment().from_string(template)
    return lambda messages: compiled.render(messages=messages, **{"raise": fail})


def roles(template: str, messages: list[dict[str, Any]], bos: bool = True) -> RoleFinder:
    tokenizer, render = byte_level(), rendering(template)
    return RoleFinder(
        TextFinder(tokenizer, tokenizer.encode(render(messages), add_special_tokens=bos)), messages, render
    )


def text_of(found: RoleFinder, role: str) -> str:
    return spelled(found.finder, found(role))


def test_each_roles_contents_are_found() -> None:
    found = roles(CHATML, said(("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "Bye 🚢")))
    assert text_of(found, "system") == "Be brief."
    assert text_of(found, "user") == "HelloBye 🚢"
    assert text_of(found, "assistant") == "Yes?"
    assert found("tool") == []


@pytest.mark.parametrize("bos", [True, False])
def test_a_system_prompt_of_the_templates_own_is_nobodys(bos: bool) -> None:
    found = roles(CHATML, said(("user", "You are kind to the user.")), bos)
    assert text_of(found, "user") == "You are kind to the user."
    assert found("user")[0] > len(byte_level().encode("You are kind to the user.", add_special_tokens=False))
    assert found("system") == []


@pytest.mark.parametrize("content", ["  spaced out  ", "\n\nlines\n", " left", "right ", "none"])
def test_a_template_that_strips(content: str) -> None:
    found = roles(STRIPPING, said(("user", content), ("assistant", "ok")))
    assert text_of(found, "user").strip() == content.strip()
    assert text_of(found, "assistant").strip() == "ok"


def test_words_that_the_template_says_too() -> None:
    turns = (("user", "[user] a [/user]"), ("user", "a [/user][user] a"), ("assistant", "[user]"))
    found = roles(STRIPPING, said(*turns))
    assert "".join(text_of(found, "user").split()) == "".join((turns[0][1] + turns[1][1]).split())
    assert "[user]" in text_of(found, "assistant")


def test_contents_given_as_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert text_of(roles(PARTS, said(("user", parts))), "user").strip() == "onetwo"
    joined = roles(CHATML, said(("user", "one\ntwo")))
    assert text_of(RoleFinder(joined.finder, said(("user", parts)), joined.render), "user") == "one\ntwo"


@pytest.mark.parametrize("content", [None, "", []])
def test_messages_without_text_are_left_as_they_are(content: Any) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": [{"name": "look"}]}
    found = roles(CALLS, [*said(("user", "where")), call, *said(("tool", "here"))])
    assert text_of(found, "user") == "where"
    assert text_of(found, "tool") == "here"
    assert found("assistant") == []


def test_no_message_at_all() -> None:
    assert roles(CALLS, [])("user") == []


@pytest.mark.parametrize(
    "template",
    [
        "nothing of it",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }} {{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }};{% endfor %}",
    ],
)
def test_where_the_template_does_not_show_it_it_is_an_error(template: str) -> None:
    found = roles(template, said(("user", "first"), ("assistant", "second")))
    with pytest.raises(InvalidRequest, match="does not show"):
        found("user")


def test_a_template_that_raises_is_an_error_too() -> None:
    tokenizer = byte_level()
    finder = TextFinder(tokenizer, tokenizer.encode("x"))
    with pytest.raises(InvalidRequest, match="does not show"):
        RoleFinder(finder, said(("system", "x")), rendering(STRICT))("system")


def test_a_prompt_that_was_cut_is_an_error() -> None:
    whole = roles(CHATML, said(("user", "Hello"), ("assistant", "Yes?")))
    cut = TextFinder(whole.finder.tokenizer, whole.finder.ids[20:])
    with pytest.raises(InvalidRequest, match="does not show"):
        RoleFinder(cut, whole.messages, whole.render)("user")
