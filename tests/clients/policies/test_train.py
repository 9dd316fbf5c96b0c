"""Training learns from demonstrations, goes on where it stopped, and saves what transformers and vLLM load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from steersman.clients import learning, small_llava
from steersman.clients.policies import demonstrations, eyes, model, train, vocabulary
from steersman.clients.policies.demonstrations import CHUNK, SAMPLES, Demonstrations
from steersman.clients.policies.train import Lessons
from steersman.clients.policies.vocabulary import Scale
from steersman.clients.simulators.metaworld import SIZE, MetaWorld
from steersman.clients.simulators.simulator import Floats, Picture, Seen
from tests.clients.simulators.point import Point


class Expert(Point):
    """A point with an expert and pictures of the policy's size; 25 samples suffice for what is tested here."""

    def expert(self) -> Floats:
        return np.append(np.clip(5 * (self.goal - self.at), -1, 1), 0.0)

    def observe(self) -> Seen:
        return Seen({name: self._draw(i) for i, name in enumerate(("side", "top"))}, np.append(self.at, 1.0))

    def _draw(self, first: int) -> Picture:
        """A white square where the goal is, seen along one axis."""
        out = np.zeros((SIZE, SIZE, 3), np.uint8)
        i, j = (SIZE * (self.goal[first : first + 2] - 0.1) / 0.2).astype(int)
        out[max(0, i - 4) : i + 4, max(0, j - 4) : j + 4] = 255
        return out


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Demonstrations:
    folder = tmp_path_factory.mktemp("demonstrations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations, "SHARD", 20)
        demonstrations.collect(Expert(), folder, 40)
    return demonstrations.load(folder)


@pytest.fixture
def lessons(shown: Demonstrations, monkeypatch: pytest.MonkeyPatch) -> Lessons:
    monkeypatch.setattr(model, "WIDTH", 64)
    monkeypatch.setattr(model, "LAYERS", 2)
    monkeypatch.setattr(train, "HELD", 40)
    monkeypatch.setattr(train, "BATCH", 8)
    monkeypatch.setattr(train, "WARM", 5)
    action = Scale.of(shown.actions.reshape(-1, 4), MetaWorld.moves, 0.01)
    return Lessons(shown, "reach the red ball", action, Scale.of(shown.states, np.ones(4, np.bool_), 0.0))


def test_a_label_is_what_the_expert_does_from_there(shown: Demonstrations) -> None:
    assert shown.pictures.shape == (40 * SAMPLES, 2, SIZE, SIZE, 3)
    assert shown.actions.shape == (40 * SAMPLES, CHUNK, 4)
    for i in range(0, len(shown.states), 7):
        point = Expert()
        point.reset(demonstrations.TRAIN_SEEDS + i // SAMPLES)
        point.at = shown.states[i, :3].astype(float)
        for action in shown.actions[i]:
            np.testing.assert_allclose(action, point.expert(), atol=1e-5)
            point.act(action)
    spread = shown.states[:, :3].std(axis=0)
    assert (spread > 0.03).all(), "the hand is pushed about"


def test_demonstrations_that_were_stopped_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "SHARD", 2)
    demonstrations.collect(Expert(), tmp_path, 4)
    whole = demonstrations.load(tmp_path)
    (tmp_path / "point-000002.npz").unlink()
    demonstrations.collect(Expert(), tmp_path, 4)
    again = demonstrations.load(tmp_path)
    np.testing.assert_array_equal(again.actions, whole.actions)
    with pytest.raises(FileNotFoundError, match="no demonstrations"):
        demonstrations.load(tmp_path / "none")


def test_eyes_and_language_learn(lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eyes, "BATCH", 16)
    policy = model.build(0).train()
    wanted = lessons.bins / vocabulary.BINS
    errors = eyes.train(policy, lessons.pictures, lessons.states, wanted, 160, 0)
    assert np.mean(errors[-20:]) < 0.85 * float((wanted - wanted.mean(0)).square().mean())
    before = lessons.error(policy)
    about = train.train(policy, lessons, tmp_path, 50, 0)
    assert about["held_out_error"] < 0.6 * before


def test_a_policy_is_small() -> None:
    assert sum(p.numel() for p in model.build(0).parameters()) < 5e6


def test_it_goes_on_where_it_stopped(lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "EVERY", 0.0)
    whole, stopped, again = (model.build(1).train() for _ in range(3))
    train.train(whole, lessons, _made(tmp_path / "a"), 4, 1)
    loss = Lessons.loss
    calls = iter(range(2))
    monkeypatch.setattr(Lessons, "loss", lambda *given: loss(*given) if next(calls, None) is not None else _stop())
    with pytest.raises(KeyboardInterrupt):
        train.train(stopped, lessons, _made(tmp_path / "b"), 4, 1)
    monkeypatch.setattr(Lessons, "loss", loss)
    train.train(again, lessons, tmp_path / "b", 4, 1)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)


def _stop() -> Any:
    raise KeyboardInterrupt


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_is_saved_is_what_was_trained(lessons: Lessons, shown: Demonstrations, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    policy = model.build(2).eval()
    scale = Scale(-np.ones(4), np.ones(4), MetaWorld.moves)
    model.save(policy, model.describe("reach_v3", 2, scale, scale), tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert all("vision_tower.vision_model." in name for name in names if "vision_tower" in name)
    assert json.loads((tmp_path / "config.json").read_text())["steersman_policy"]["cameras"] == 2
    loaded, about = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"]
    rows = torch.arange(3)
    pictures = [Image.fromarray(p) for p in shown.pictures[:3].reshape(-1, SIZE, SIZE, 3)]
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, small_llava.pixels(lessons.pictures[rows]), rtol=0, atol=1e-5)
    answers = vocabulary.FIRST_ACTION + lessons.bins[rows].round().long()
    ids = torch.cat([lessons.prompts[rows], answers[:, :-1]], dim=1)
    with torch.no_grad():
        whole = loaded.eval()(input_ids=ids, pixel_values=pixels).logits[:, -answers.shape[1] :]
        ours = lessons.logits(policy, rows)
    torch.testing.assert_close(whole[..., vocabulary.FIRST_ACTION :], ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stopped_in", ["eyes", "all"])
def test_a_command_that_was_stopped_ends_in_the_same_weights(
    stopped_in: str, lessons: Lessons, shown: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the tower's training and once in that of all, with weights of another policy to begin with."""
    monkeypatch.setattr(learning, "EVERY", 0.0)
    scale = Scale(-np.ones(4), np.ones(4), MetaWorld.moves)
    model.save(model.build(4), model.describe("reach_v3", 2, scale, scale), tmp_path / "start")
    shown.save(_made(tmp_path / "demos") / "a.npz")
    command = ["--demonstrations", str(tmp_path / "demos"), "--start", str(tmp_path / "start"), "--eyes-steps", "3"]

    def run(out: str, *more: str) -> dict[str, torch.Tensor]:
        train.main([*command, "--out", str(tmp_path / out), "--steps", "4", *more])
        found: dict[str, torch.Tensor] = load_file(tmp_path / out / "model.safetensors")
        return found

    whole = run("whole")
    where, name = (eyes, "look") if stopped_in == "eyes" else (Lessons, "loss")
    plain: Any = getattr(where, name)
    calls = iter(range(2))
    monkeypatch.setattr(where, name, lambda *given: plain(*given) if next(calls, None) is not None else _stop())
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(where, name, plain)
    assert (tmp_path / "stopped/training.pt").exists() == (stopped_in == "all")
    if stopped_in == "all":
        with pytest.raises(ValueError, match=r"eyes\.pt is of another training"):
            run("stopped", "--seed", "1")
        with pytest.raises(ValueError, match=r"training\.pt is of another training"):
            run("stopped", "--steps", "5")
    again = run("stopped")
    assert again.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0, msg=key)
    assert any((whole[key] != value).any() for key, value in load_file(tmp_path / "start/model.safetensors").items())


def test_the_command_leaves_a_checkpoint_and_nothing_else(
    lessons: Lessons, shown: Demonstrations, tmp_path: Path
) -> None:
    (tmp_path / "demos").mkdir()
    shown.save(tmp_path / "demos/a.npz")
    steps = ["--steps", "2", "--eyes-steps", "2", "--seed", "3"]
    train.main(["--demonstrations", str(tmp_path / "demos"), "--out", str(tmp_path / "made"), *steps])
    about = json.loads((tmp_path / "made/training.json").read_text())
    assert (about["task"], about["steps"], about["seed"], about["samples"]) == ("reach-v3", 2, 3, lessons.train)
    policy, action, state = model.load(tmp_path / "made")
    assert Lessons(shown, "reach the red ball", action, state).error(policy) == about["held_out_error"]
    assert not list((tmp_path / "made").glob("*.pt"))
