"""What is noted of images on their way to the model, and what the parts of vLLM that are relied on look like."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from steersman.server.engine import images
from steersman.server.engine.images import Seen, prompt_images
from steersman.steering.errors import InvalidRequest
from tests.server.engine.fakes import parameters

VISION = SimpleNamespace(image_size=28, patch_size=14, model_type="clip_vision_model")


def info(**config: Any) -> Any:
    """A model whose images are 28 × 28, 4 patches."""
    about = {"model_type": "llava", "vision_config": VISION, "vision_feature_select_strategy": "default", **config}
    size = {"size": {"height": 28, "width": 28}, "do_resize": True, "do_center_crop": False}
    processor = SimpleNamespace(image_processor=SimpleNamespace(**size))
    context = SimpleNamespace(get_merged_mm_kwargs=dict)
    return SimpleNamespace(
        get_hf_config=lambda: SimpleNamespace(**about), get_hf_processor=lambda: processor, ctx=context
    )


def inputs(*pictures: Any, **options: Any) -> ProcessorInputs:
    items = MultiModalDataItems({"image": ImageProcessorItems(list(pictures))})
    return ProcessorInputs([1, 2], items, hf_processor_mm_kwargs=options)


def feature(mm_hash: str, offset: int, embedded: list[bool] | int, modality: str = "image") -> MultiModalFeatureSpec:
    mask = None if isinstance(embedded, int) else torch.tensor(embedded)
    length = embedded if isinstance(embedded, int) else len(embedded)
    place = PlaceholderRange(offset=offset, length=length, is_embed=mask)
    return MultiModalFeatureSpec(
        data=None, modality=modality, identifier=f"lora:{mm_hash}", mm_position=place, mm_hash=mm_hash
    )


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def refused(seen: Seen, *given: Any) -> str:
    image = prompt_images([feature(*given)], seen)[0]
    with pytest.raises(InvalidRequest) as raised:
        image.layout()
    return raised.value.message


def test_only_what_takes_an_embedding_is_an_images() -> None:
    found = prompt_images(
        [
            feature("a", 3, [False, True, True, False, True]),
            feature("sound", 9, 4, "audio"),
            feature("b", 20, 3),
        ]
    )
    assert [list(image.positions) for image in found] == [[4, 5, 7], [20, 21, 22]]
    assert prompt_images(None) == prompt_images([]) == []


def test_an_image_lies_as_it_was_sent() -> None:
    seen = Seen()
    from_a_url = MediaWithBytes(picture(10, 40), b"")
    seen.note(info(), inputs(picture(60, 20), from_a_url), {"image": ["a", "b"]})
    wide, tall = prompt_images([feature("a", 1, 4), feature("b", 7, [True, True, False, True, True])], seen)
    assert (wide.layout().width, wide.layout().height) == (60, 20)
    assert wide.layout().tokens((31, 0, 32, 9)) == [1]
    assert tall.layout().tokens((0, 21, 1, 22)) == [2]


def test_a_requests_options_go_before_the_servers() -> None:
    seen, model = Seen(), info()
    model.ctx.get_merged_mm_kwargs = lambda given: {"size": {"height": 14, "width": 56}, **given}
    options = {
        "size": {"height": 28, "width": 28},
        "other": "x",
        "images_kwargs": {"size": {"height": 42, "width": 14}},
    }
    seen.note(model, inputs(picture(60, 20), **options), {"image": ["a"]})
    seen.note(model, inputs(picture(60, 20)), {"image": ["b"]})
    tall, wide = prompt_images([feature("a", 0, 3), feature("b", 3, 4)], seen)
    assert tall.layout().tokens((0, 19, 60, 20)) == [2]
    assert wide.layout().tokens((0, 19, 60, 20)) == [0, 1, 2, 3]
    assert set(seen.get("a").options) == {"size"}, "what a client sends is kept only where it is read"


def test_a_cached_image_is_still_known() -> None:
    seen = Seen(2)
    seen.note(info(), inputs(picture(60, 20)), {"image": ["a"]})
    seen.note(info(), inputs(picture(10, 10)), {"image": ["b"]})
    seen.note(info(), inputs(None), {"image": ["a"]})
    seen.note(info(), inputs(picture(10, 10)), {"image": ["c"]})
    assert prompt_images([feature("a", 0, 4)], seen)[0].layout().width == 60
    assert "not known" in refused(seen, "b", 0, 4)


def test_an_image_that_cannot_be_measured_is_noted_by_none() -> None:
    seen = Seen()
    strange = SimpleNamespace(mm_data_items={"image": SimpleNamespace()}, hf_processor_mm_kwargs={})
    seen.note(info(), strange, {"image": ["a"]})
    seen.note(info(), SimpleNamespace(mm_data_items={}), {"audio": ["sound"]})
    assert "not known" in refused(seen, "a", 0, 4)


def test_an_image_of_other_tokens_than_its_size_makes_is_refused() -> None:
    seen = Seen()
    seen.note(info(), inputs(picture(60, 20)), {"image": ["a"]})
    assert "5 tokens where its size makes 4" in refused(seen, "a", 0, 5)


# -- the contract with vLLM --------------------------------------------------------------------------


class Processor(BaseMultiModalProcessor[Any]):
    """Its ``apply`` is vLLM's own; what the model would do is left out."""

    def __init__(self) -> None:
        self.info = info()

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        found = SimpleNamespace(kwargs={}, hashes={"image": ["a"]}, prompt_updates={}, prompt_ids=[1, 2])
        return (
            found if "mm_res" in parameters(BaseMultiModalProcessor._maybe_apply_prompt_updates) else ([], found, True)
        )

    def _maybe_apply_prompt_updates(self, *args: Any, **kwargs: Any) -> Any:
        return [1, 2], {}

    def _get_mm_fields_config(self, *args: Any) -> Any:
        raise NotImplementedError

    def _get_prompt_updates(self, *args: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    monkeypatch.setattr(images, "SEEN", seen)
    monkeypatch.setattr(BaseMultiModalProcessor, "apply", BaseMultiModalProcessor.apply)
    images.patch()
    return seen


def test_what_vllm_processes_is_noted_once(patched: Seen) -> None:
    once = BaseMultiModalProcessor.apply
    images.patch()
    assert BaseMultiModalProcessor.apply is once
    timing: Any = SimpleNamespace(record=lambda _: nullcontext())
    result = Processor().apply(inputs(picture(60, 20)), timing)
    assert result["prompt_token_ids"] == [1, 2]
    assert patched.get("a").size == (60, 20)


def test_what_is_relied_on_is_there() -> None:
    assert parameters(BaseMultiModalProcessor.apply)[:2] == ["self", "inputs"]
    fields = {field.name for field in dataclasses.fields(ProcessorInputs)}
    assert {"mm_data_items", "hf_processor_mm_kwargs"} <= fields
    fields = {field.name for field in dataclasses.fields(MultiModalFeatureSpec)}
    assert {"modality", "mm_position", "mm_hash"} <= fields
    assert {field.name for field in dataclasses.fields(PlaceholderRange)} >= {"offset", "length", "is_embed"}
