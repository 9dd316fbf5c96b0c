"""Where the tokens of an image lie on it, by the numbers that vLLM itself processes the image with.

The contract with vLLM: ``processor.info`` of a multimodal processor has ``get_hf_config()``, ``get_hf_processor()`` and
``ctx.get_merged_mm_kwargs({})``, the server's own options for the processor, which a request's go before. The processor
is transformers', or vLLM's own one of OpenVLA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from steersman.steering.errors import InvalidRequest
from steersman.steering.image_grids import (
    Layout,
    Size,
    anyres,
    cropped,
    smart_resize,
    tiled,
    to_shortest_edge,
    whole,
)

OPENVLA_PATCH = 14  # a constant of vLLM's model too
OPTIONS = frozenset(
    {"size", "min_pixels", "max_pixels", "do_resize", "crop_size", "do_center_crop"}
    | {"max_image_size", "do_image_splitting"}
)
"""What a server or a request may set for its processor, of what is read here."""


class Sent(NamedTuple):
    """How an image came."""

    size: Size
    info: Any  # vLLM's ProcessingInfo of the model
    options: Mapping[str, Any]  # of the request for the processor, those of OPTIONS


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of all options for a processor those of OPTIONS, whether they are meant for images alone or for all."""
    flat = {**given, **(given.get("images_kwargs") or {})}
    return {name: flat[name] for name in OPTIONS & flat.keys()}


@dataclass(frozen=True)
class _Model:
    """The numbers of a model and its processor, with the options of one request."""

    config: Any  # transformers' configuration of the model
    processor: Any  # transformers' processor
    options: Mapping[str, Any]

    @classmethod
    def of(cls, info: Any, given: Mapping[str, Any]) -> _Model:
        options = {**read_options(info.ctx.get_merged_mm_kwargs({})), **given}
        return cls(info.get_hf_config(), info.get_hf_processor(), options)

    def option(self, name: str) -> Any:
        own = getattr(self.processor.image_processor, name, None)
        given = self.options.get(name)
        return own if given is None else given

    def size(self, name: str) -> dict[str, int]:
        try:
            return dict(self.option(name) or {})
        except (TypeError, ValueError):
            raise _unknown(f"where {name} is {self.option(name)}") from None

    def resized(self, sent: Size) -> Size:
        """What the processor of CLIP or SigLIP resizes an image to."""
        size = self.size("size")
        if not self.option("do_resize"):
            return sent
        if set(size) == {"shortest_edge"}:
            return to_shortest_edge(sent, size["shortest_edge"])
        if set(size) == {"height", "width"}:
            return size["width"], size["height"]
        raise _unknown(f"where images are resized to {size}")

    def crop(self, resized: Size) -> Size:
        if not self.option("do_center_crop"):
            return resized
        crop = self.size("crop_size")
        return crop["width"], crop["height"]

    def tokens_before(self) -> int:
        """How many of the vision tower's tokens the model keeps before those of the patches: a class token or none."""
        kind, kept = self.config.vision_config.model_type, self.config.vision_feature_select_strategy
        before = {"clip_vision_model": 1, "siglip_vision_model": 0}.get(kind)
        dropped = {"default": 1, "full": 0}.get(kept)
        if before is None or dropped is None or before < dropped:
            raise _unknown(f"with a tower of type {kind} of which it takes {kept!r}")
        return before - dropped


def layout_of(sent: Sent) -> Layout:
    """Where the tokens of an image lie on it. Raises InvalidRequest where that is not known."""
    model = _Model.of(sent.info, sent.options)
    read = _READERS.get(model.config.model_type)
    if read is None:
        raise _unknown(f"of type {model.config.model_type}")
    return read(model, sent.size)


def _unknown(what: str) -> InvalidRequest:
    known = ", ".join(_READERS)
    return InvalidRequest(f"a box needs a model of a known type ({known}); not known for one {what}: use patches")


def _llava(model: _Model, sent: Size) -> Layout:
    before = model.tokens_before()
    resized = model.resized(sent)
    return cropped(sent, resized, model.crop(resized), model.config.vision_config.patch_size, before)


def _llava_next(model: _Model, sent: Size) -> Layout:
    vision = model.config.vision_config
    square = (vision.image_size, vision.image_size)
    resized = model.resized(square)  # which is done to each tile
    if model.tokens_before() or resized != square or model.crop(resized) != square:
        raise _unknown("whose tiles are resized or cropped")
    resolutions = [(width, height) for height, width in model.config.image_grid_pinpoints]
    return anyres(sent, resolutions, vision.image_size, vision.patch_size)


def _qwen_vl(model: _Model, sent: Size) -> Layout:
    vision, size = model.config.vision_config, model.size("size")
    unit = vision.patch_size * vision.spatial_merge_size
    resized = sent
    if model.option("do_resize"):
        least = model.options.get("min_pixels") or size["shortest_edge"]
        most = model.options.get("max_pixels") or size["longest_edge"]
        resized = smart_resize(sent, unit, least, most)
    return whole(sent, resized[0] // unit, resized[1] // unit)


def _idefics3(model: _Model, sent: Size) -> Layout:
    tile = model.size("max_image_size")["longest_edge"]
    side = tile // model.config.vision_config.patch_size // model.config.scale_factor
    longest = model.size("size").get("longest_edge") if model.option("do_resize") else None
    if longest is None and model.option("do_resize"):
        raise _unknown(f"where images are resized to {model.size('size')}")
    return tiled(sent, longest, tile, side, bool(model.option("do_image_splitting")))


def _paligemma(model: _Model, sent: Size) -> Layout:
    resized = model.resized(sent)
    return cropped(sent, resized, model.crop(resized), model.config.vision_config.patch_size)


def _openvla(model: _Model, sent: Size) -> Layout:
    side = model.processor.image_processor.image_size // OPENVLA_PATCH
    return whole(sent, side, side)


_READERS: dict[str, Callable[[_Model, Size], Layout]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "paligemma": _paligemma,
    "openvla": _openvla,
}
