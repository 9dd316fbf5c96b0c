"""Conflict's formula, and the messages that it is about."""

import math
from typing import Any

import pytest

from steersman.steering.conflict import FLOOR, check_images, conflict, has_images, without_images
from steersman.steering.errors import InvalidRequest

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
WORDS = {"type": "text", "text": "An image?"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [PICTURE, WORDS]},
]


def test_the_formula() -> None:
    p, q = [0.9, 0.5, 1e-12, 1.0], [0.3, 0.5, 0.2, 1e-30]
    found = conflict([math.log(x) for x in p], [math.log(x) for x in q])
    assert found == pytest.approx([math.log((a + 1e-9) / (b + 1e-9)) for a, b in zip(p, q, strict=True)], rel=1e-12)
    assert found[0] == pytest.approx(math.log(3), rel=1e-8)
    assert found[3] == pytest.approx(-math.log(FLOOR), rel=1e-6)  # the floor bounds it
    assert conflict([-math.inf], [0.0]) == pytest.approx([math.log(FLOOR)], rel=1e-6)
    with pytest.raises(ValueError):
        conflict([0.0], [])


def test_messages_without_images() -> None:
    plain = without_images(MESSAGES)
    assert plain == [MESSAGES[0], {"role": "user", "content": [WORDS]}]
    assert has_images(MESSAGES)
    assert not has_images(plain)
    assert without_images(plain) == plain


@pytest.mark.parametrize(
    ("part", "image"),
    [
        (PICTURE, True),
        ({"type": "input_image", "image_url": "u"}, True),
        ({"type": "image_embeds", "image_embeds": "x"}, True),
        ({"image_url": "u", "uuid": "n"}, True),
        ({"uuid": "n", "image_pil": None}, True),
        ({"type": "video_url", "video_url": {"url": "u"}}, False),
        ({"type": "text", "text": "image_url"}, False),
        ("an image", False),
    ],
)
def test_parts_that_are_images(part: Any, image: bool) -> None:
    messages = [{"role": "user", "content": [WORDS, part]}]
    assert has_images(messages) == image
    assert without_images(messages) == [{"role": "user", "content": [WORDS] if image else [WORDS, part]}]


def test_a_message_without_content_stays_one() -> None:
    call = {"role": "assistant", "tool_calls": []}
    assert without_images([call]) == [call]


@pytest.mark.parametrize("messages", [None, [], MESSAGES[:1], without_images(MESSAGES)])
def test_it_needs_an_image(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="needs a chat with an image") as caught:
        check_images(["answer_entropy", "conflict"], messages)
    assert caught.value.param == "steering.signals[1]"
    check_images(["answer_entropy"], messages)
    check_images(["conflict"], MESSAGES)
