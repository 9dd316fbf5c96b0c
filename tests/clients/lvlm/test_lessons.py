"""Questions in one sequence are computed as if each were alone, and ask what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steersman.clients.lvlm import lessons, model, scenes, vocabulary
from steersman.clients.lvlm.scenes import KINDS
from steersman.clients.small_llava import BOS, EOS, IMAGE, PAD, pixels


@pytest.fixture(scope="module")
def made() -> Any:
    return model.build(3).eval()


def texts(row: torch.Tensor) -> list[list[int]]:
    """The ids of each text after the image."""
    positions, _ = lessons.layout()
    starts = (positions[0] == 1 + model.SHAPE.patches).nonzero()[:, 0].tolist()
    return [row[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_a_text_is_computed_as_if_it_were_alone(made: Any) -> None:
    lesson = lessons.batch(5, 0, 2)
    with torch.no_grad():
        found, _, places = lessons.logits(made, lesson)
        for row in range(2):
            start = 1 + model.SHAPE.patches
            for ids in texts(lesson.ids[row]):
                given = torch.tensor([[BOS, *[IMAGE] * model.SHAPE.patches, *ids]])
                alone = made(input_ids=given, pixel_values=pixels(lesson.pictures[row : row + 1])).logits[0]
                inside = (places[:, 0] == row) & (places[:, 1] >= start) & (places[:, 1] < start + len(ids))
                assert inside.any()
                at = places[inside, 1] - start + 1 + model.SHAPE.patches
                torch.testing.assert_close(found[inside], alone[at], rtol=1e-4, atol=1e-5)
                start += len(ids)


def test_questions_and_captions_are_of_their_scene() -> None:
    lesson = lessons.batch(5, 3, 8)
    words = vocabulary.WORDS
    yes = 0
    for scene, row, wanted in zip(lesson.scenes, lesson.ids, lesson.wanted, strict=True):
        *questions, caption = texts(row)
        assert len(questions) == lessons.QUESTIONS
        for ids in questions:
            said = " ".join(words[i] for i in ids)
            kind = KINDS.index(" ".join(words[i] for i in ids[3:5]))
            answer = "yes" if kind in scene.kinds else "no"
            assert said == f"Is there a {KINDS[kind]} in the image ? ASSISTANT: {answer}"
            yes += answer == "yes"
        there = [i for i in caption if i != PAD]
        assert there == vocabulary.ids(f"{vocabulary.CAPTION} ASSISTANT: {vocabulary.caption(scene.kinds)}")
        answers = [words[i] for i in wanted[wanted != PAD].tolist()]
        assert answers.count("<eos>") == lessons.QUESTIONS + 1
        after = lesson.ids[0].new_tensor([*row[1:].tolist(), PAD])
        learnt = (wanted != PAD) & (wanted != EOS)
        assert torch.equal(wanted[learnt], after[learnt])  # what follows in the same text
    assert 0.3 < yes / (8 * lessons.QUESTIONS) < 0.7


def test_a_step_is_the_same_whenever_it_is_drawn() -> None:
    first, again, other = lessons.batch(5, 2, 4), lessons.batch(5, 2, 4), lessons.batch(6, 2, 4)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.pictures, again.pictures)
    assert not torch.equal(first.pictures, other.pictures)
    assert first.scenes[3].kinds == scenes.draw(5, 11).kinds
