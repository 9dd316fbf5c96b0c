"""Training learns, goes on where it stopped to the same weights, and saves what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from steersman.clients import learning, small_llava
from steersman.clients.learning import Schedule
from steersman.clients.lvlm import eyes, lessons, model, train, vocabulary

TINY = {name: Schedule(2, rate=1e-3, warm=1) for name in train.STAGES}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "EYES_SCENES", 4)
    monkeypatch.setattr(train, "SCENES", 2)
    monkeypatch.setattr(train, "HELD", 3)


def test_deepening_changes_no_answer() -> None:
    shallow = model.build(1).eval()
    deep = model.deepen(shallow, 1).eval()
    lesson = lessons.batch(9, 0, 2)
    with torch.no_grad():
        before, after = lessons.logits(shallow, lesson)[0], lessons.logits(deep, lesson)[0]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert len(deep.model.language_model.layers) == model.SHAPE.layers
    written = [bool(layer.mlp.down_proj.weight.any()) for layer in deep.model.language_model.layers]
    assert written == [True, False, False] * model.SHALLOW.layers


def test_what_patches_show() -> None:
    (scene,) = lessons.batch(9, 0, 1).scenes
    kinds = eyes.shown([scene])[0].reshape(4, 4)
    side = model.SHAPE.patch
    for row in range(4):
        for column in range(4):
            cell = scene.shown[row * side : (row + 1) * side, column * side : (column + 1) * side]
            counts = np.bincount(cell[cell >= 0], minlength=16)
            enough = counts.max() >= eyes.LEAST * side * side
            assert kinds[row, column] == (counts.argmax() if enough else 16)
    assert set(kinds.flatten().tolist()) - {16} <= set(scene.kinds)


def test_eyes_learn_to_name(tmp_path: Path) -> None:
    naming = eyes.Naming(model.build(0))
    pictures, kinds = eyes.batch(0, 0, 16)
    with torch.no_grad():
        before = naming(pictures, kinds)
    learning.learn(naming, lambda step: naming(pictures, kinds), Schedule(25, 2e-3, 5), tmp_path / "eyes.pt")
    with torch.no_grad():
        assert naming(pictures, kinds) < 0.4 * before
    assert eyes.right(naming, pictures, kinds)["colours"] > 0.5


def test_it_goes_on_where_it_stopped_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "EVERY", 0.0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, about = train.train(TINY, 4, tmp_path / "whole")
    for stop in range(1, 6):  # stopped after every step but the last, in every stage
        with monkeypatch.context() as patch:
            _stop_after(1, patch)
            with pytest.raises(KeyboardInterrupt):
                train.train(TINY, 4, tmp_path / "parts")
        states = sorted(p.name for p in (tmp_path / "parts").glob("*.pt"))
        assert states == sorted(f"{name}.pt" for name in list(train.STAGES)[: (stop + 1) // 2])
    again, told = train.train(TINY, 4, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert told == about


def _stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """From now on only so many steps are made before it is interrupted, in whichever stage."""
    left = iter(range(steps))

    def counted(function: Any) -> Any:
        def call(*given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*given)

        return call

    call = counted(lambda *given: None)
    for module, name in ((eyes, "batch"), (lessons, "loss")):
        plain = getattr(module, name)
        patch.setattr(module, name, lambda *given, plain=plain: (call(), plain(*given))[1])


def test_the_command_leaves_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    steps = [argument for name in train.STAGES for argument in (f"--{name}-steps", "1")]
    train.main(["--out", str(tmp_path), "--seed", "3", *steps])
    about = json.loads((tmp_path / "training.json").read_text())
    assert (about["seed"], about["stages"]["deep"]["steps"]) == (3, 1)
    assert not list(tmp_path.glob("*.pt"))
    loaded, found = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    lesson = lessons.batch(9, 0, 2)
    shown = [Image.fromarray(p.numpy()) for p in lesson.pictures[:, 0]]
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(shown, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, small_llava.pixels(lesson.pictures), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(vocabulary.WORDS)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_a_chat_becomes_the_prompt_that_was_learnt() -> None:
    content = [{"type": "image"}, {"type": "text", "text": vocabulary.question(5)}]
    made = vocabulary.tokenizer().apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
    )
    wanted = [
        small_llava.BOS,
        small_llava.IMAGE,
        *vocabulary.ids(vocabulary.question(5)),
        *vocabulary.ids("ASSISTANT:"),
    ]
    assert made == wanted
    assert small_llava.UNKNOWN not in made
