"""Where a box's tokens lie, against the processors of Hugging Face and vLLM themselves.

A box is painted white on a black image, the real processor makes pixels of it, and vLLM's own code, where the model has
any, puts them in the order of the tokens. Of every pixel that a token is made of, its lightness between that of a black
image and that of a white one tells how much of it is painted: more than half inside the box, less outside.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    LlavaConfig,
    LlavaNextConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from steersman.server.engine.image_models import Sent, layout_of
from steersman.steering.errors import InvalidRequest
from steersman.steering.image_grids import Box, Grid, Layout, Size, smart_resize, tiled

Cells = NDArray[np.float64]
"""[tokens, values] what each token of an image is made of; zeros where it shows no part of it."""

BACKENDS = ["pil", "torchvision"] if importlib.util.find_spec("torchvision") else ["pil"]
BICUBIC, LANCZOS = 2, 3  # how many pixels a filter reaches
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # height, width
SIZES = [(112, 112), (200, 90), (61, 150), (333, 257), (40, 30), (640, 31)]


@pytest.fixture(autouse=True, scope="module")
def without_torchvision() -> Iterator[None]:
    """vLLM's LLaVA imports a processor that needs torchvision; transformers' own one for PIL stands in."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    if "torchvision" not in BACKENDS and name not in sys.modules:
        from transformers.models.pixtral import image_processing_pil_pixtral as pil

        module = ModuleType(name)
        vars(module).update({k: v for k, v in vars(pil).items() if not k.startswith("__")})
        module.PixtralImageProcessor = pil.PixtralImageProcessorPil  # type: ignore[attr-defined]
        sys.modules[name] = module
        yield
        del sys.modules[name]
    else:
        yield


def processor(model: str, name: str, backend: str, **settings: Any) -> Any:
    """The class that vLLM gets from transformers, with torchvision or without."""
    middle, end = ("_pil", "Pil") if backend == "pil" else ("", "")
    module = importlib.import_module(f"transformers.models.{model}.image_processing{middle}_{model}")
    return getattr(module, f"{name}ImageProcessor{end}")(**settings)


def patches(pixels: Any, patch: int) -> torch.Tensor:
    """[n, 3, h, w] pixels as [n, h/p · w/p, 3·p·p], in reading order."""
    n, channels, height, width = pixels.shape
    split = torch.as_tensor(pixels).reshape(n, channels, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(n, height // patch * (width // patch), channels * patch**2)


@dataclass(frozen=True)
class Case:
    config: Any
    image_processor: Any
    cells: Callable[[Case, Image.Image], torch.Tensor]
    reach: float = BICUBIC  # pixels that a resizing mixes, of the coarser of the two images
    passes: int = 1  # how often an image is resized
    options: Mapping[str, Any] = field(default_factory=dict)

    def layout(self, size: Size) -> Layout:
        made = SimpleNamespace(image_processor=self.image_processor)
        context = SimpleNamespace(get_merged_mm_kwargs=dict)
        info = SimpleNamespace(get_hf_config=lambda: self.config, get_hf_processor=lambda: made, ctx=context)
        return layout_of(Sent(size, info, self.options))

    def read(self, image: Image.Image) -> Cells:
        return self.cells(self, image).double().numpy()

    def pixels(self, image: Image.Image) -> Any:
        return self.image_processor(image, return_tensors="pt", **self.options)["pixel_values"]


def _plain(case: Case, image: Image.Image) -> torch.Tensor:
    return patches(case.pixels(image), case.config.vision_config.patch_size)[0]


def _anyres(case: Case, image: Image.Image) -> torch.Tensor:
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

    patch = case.config.vision_config.patch_size
    model: Any = SimpleNamespace(config=case.config, image_newline=torch.zeros(3 * patch**2))
    merge = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
    size = torch.tensor([image.height, image.width])
    return merge(model, size, patches(case.pixels(image)[0], patch), strategy="spatial_unpad")


def _shuffled(case: Case, image: Image.Image) -> torch.Tensor:
    from vllm.model_executor.models.idefics3 import Idefics3Connector

    tiles = patches(case.pixels(image)[0], case.config.vision_config.patch_size)
    return Idefics3Connector.pixel_shuffle(None, tiles, case.config.scale_factor).flatten(0, 1)  # type: ignore[arg-type]


def _merged(case: Case, image: Image.Image) -> torch.Tensor:
    pixels = case.pixels(image)  # [patches, 3·2·p·p], the patches of a token behind one another
    return pixels.reshape(-1, case.config.vision_config.spatial_merge_size**2 * pixels.shape[1])


def _fused(case: Case, image: Image.Image) -> torch.Tensor:
    return patches(case.image_processor(image)["pixel_values"][:, :3], 14)[0]


def llava(backend: str, edge: int = 112, crop: int = 112, **settings: Any) -> Case:
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=crop, patch_size=14))
    size = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop, "width": crop}}
    return Case(config, processor("clip", "CLIP", backend, **{**size, **settings}), _plain)


def llava_siglip(backend: str) -> Case:
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=112, patch_size=16), vision_feature_select_strategy="full"
    )
    return Case(config, processor("siglip", "Siglip", backend, size={"height": 112, "width": 112}), _plain)


def llava_next(backend: str, tile: int = 56, pinpoints: list[list[int]] = PINPOINTS) -> Case:
    vision = CLIPVisionConfig(image_size=tile, patch_size=14)
    config = LlavaNextConfig(vision_config=vision, image_grid_pinpoints=pinpoints)
    size = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    made = processor("llava_next", "LlavaNext", backend, image_grid_pinpoints=pinpoints, **size)
    return Case(config, made, _anyres)


def idefics3(backend: str, tile: int = 56, longest: int = 168, splits: bool = True, smol: bool = False) -> Case:
    config = (SmolVLMConfig if smol else Idefics3Config)(
        vision_config={"image_size": tile, "patch_size": 14}, scale_factor=2
    )
    size = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    model = ("smolvlm", "SmolVLM") if smol else ("idefics3", "Idefics3")
    made = processor(*model, backend, do_image_splitting=splits, **size)
    return Case(config, made, _shuffled, LANCZOS, 3)


def qwen(backend: str, version: type[Any] = Qwen2VLConfig, **options: Any) -> Case:
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}
    return Case(version(), processor("qwen2_vl", "Qwen2VL", backend, size=size), _merged, options=options)


def paligemma(backend: str) -> Case:
    config = PaliGemmaConfig(vision_config=SiglipVisionConfig(image_size=112, patch_size=14))
    return Case(config, processor("siglip", "Siglip", backend, size={"height": 112, "width": 112}), _plain)


def openvla(backend: str) -> Case:
    from vllm.transformers_utils.processors.openvla import OpenVLAImageProcessor

    config = SimpleNamespace(model_type="openvla")
    return Case(config, OpenVLAImageProcessor(image_size=112), _fused)


CASES: dict[str, Callable[[str], Case]] = {
    "llava": llava,
    "llava of another crop": lambda backend: llava(backend, 150, 112),
    "llava without a crop": lambda backend: llava(backend, size={"height": 112, "width": 112}, do_center_crop=False),
    "llava with siglip": llava_siglip,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "idefics3 whole": lambda backend: idefics3(backend, splits=False),
    "smolvlm": lambda backend: idefics3(backend, smol=True),
    "qwen2_vl": qwen,
    "qwen2_5_vl": lambda backend: qwen(backend, Qwen2_5_VLConfig),
    "qwen2_vl of a request's own size": lambda backend: qwen(
        backend, size={"shortest_edge": 784, "longest_edge": 9408}
    ),
    "paligemma": paligemma,
    "openvla": openvla,
}


@functools.cache
def cached(make: Callable[..., Case], **settings: Any) -> Case:
    return make("pil", **settings)


def painted(size: Size, box: Box | None = None, background: str = "black") -> Image.Image:
    image = Image.new("RGB", size, background)
    if box is not None:
        x0, y0, x1, y1 = (int(edge) for edge in box)
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill="white")
    return image


def grown(layout: Layout, box: Box, by: Callable[[Grid], tuple[float, float]]) -> set[int]:
    """The tokens of the box with each edge moved outwards by so many pixels."""
    found = set[int]()
    for grid in layout.grids:
        x, y = by(grid)
        moved = (box[0] - x, box[1] - y, box[2] + x, box[3] + y)
        if moved[0] < moved[2] and moved[1] < moved[3]:
            found |= set(grid.tokens(moved))
    return found


def borders(grids: list[tuple[float, float, int]], length: int, random: np.random.Generator) -> list[int]:
    """Two edges of a box, mostly on or within a pixel of where cells end: (first, cell, count) of each grid."""
    found = random.choice(length + 1, 2, replace=False)
    first, cell, count = grids[random.integers(len(grids))]
    near = np.round(first + cell * random.integers(count + 1, size=2)) + random.integers(-1, 2, size=2)
    use = (random.random(2) < 0.8) & (near >= 0) & (near <= length)
    chosen = sorted(np.where(use, near, found).astype(int).tolist())
    return chosen if chosen[0] < chosen[1] else sorted(found.tolist())


def check(case: Case, size: Size, boxes: int, seed: int = 0) -> int:
    """Compares boxes; returns how many tokens were compared that lie on a box's edge."""
    layout = case.layout(size)
    dark, light = case.read(painted(size)), case.read(painted(size, background="white"))
    assert layout.count == len(dark)
    shows = np.abs(light - dark) > 1e-6  # padding does not
    contrast = np.where(shows, light - dark, 1.0)
    patch = 14 if not hasattr(case.config, "vision_config") else case.config.vision_config.patch_size
    per_token = patch * getattr(case.config, "scale_factor", 1)
    per_token *= getattr(getattr(case.config, "vision_config", None), "spatial_merge_size", 1)

    def blur(grid: Grid) -> tuple[float, float]:
        """Pixels of the image as sent that one pixel, of it or of what it is resized to, is long."""
        return max(1.0, grid.cell_width / per_token), max(1.0, grid.cell_height / per_token)

    random, edges, reach = np.random.default_rng(seed), 0, case.passes * case.reach
    for _ in range(boxes):
        x0, x1 = borders([(g.left, g.cell_width, g.columns) for g in layout.grids], size[0], random)
        y0, y1 = borders([(g.top, g.cell_height, g.rows) for g in layout.grids], size[1], random)
        box = (x0, y0, x1, y1)
        share = np.where(shows, (case.read(painted(size, box)) - dark) / contrast, 0.0).max(axis=1)
        inside = {int(t) for t in np.flatnonzero(share > 0.6)}
        changed = {int(t) for t in np.flatnonzero(share > 0.03)}
        found = set(layout.tokens(box))
        surely = grown(layout, box, lambda g: (-case.passes * blur(g)[0], -case.passes * blur(g)[1]))
        maybe = grown(layout, box, lambda g: (reach * blur(g)[0], reach * blur(g)[1]))
        assert surely <= inside <= found <= maybe, (size, box)
        assert changed <= maybe, (size, box)
        edges += len(found - surely)
    return edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_boxs_tokens_are_those_whose_pixels_it_changes(name: str, backend: str) -> None:
    case = CASES[name](backend)
    edges = sum(check(case, size, 10, seed) for seed, size in enumerate(SIZES))
    assert edges > 30, "hardly a token on an edge, so this shows little"


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_size_of_the_published_models(backend: str) -> None:
    check(llava(backend, 336, 336), (640, 480), 3)
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    check(llava_next(backend, 336, pinpoints), (640, 480), 2)
    assert tiled((640, 480), 2048, 512, 8, True).count == (4 * 3 + 1) * 64


def test_every_pixel_of_the_image_is_of_a_token() -> None:
    """A box of one pixel selects at least one token, all of the image every token that shows a part of it."""
    for name in ("idefics3", "smolvlm", "qwen2_vl", "paligemma", "openvla", "llava_next"):
        case = CASES[name]("pil")
        for size in SIZES:
            layout = case.layout(size)
            corners = [(x, y, x + 1.0, y + 1.0) for x in (0.0, size[0] - 1.0) for y in (0.0, size[1] - 1.0)]
            assert all(layout.tokens(corner) for corner in corners), (name, size)
            marks = sum(grid.between * grid.rows for grid in layout.grids)
            assert len(layout.tokens((0, 0, *size))) == layout.count - marks


def test_what_is_cropped_away_has_no_tokens() -> None:
    layout = llava("pil").layout((200, 100))
    assert layout.tokens((0, 0, 50, 100)) == []
    assert layout.tokens((150, 0, 200, 100)) == []
    assert layout.tokens((49, 0, 51, 100)) == [row * 8 for row in range(8)]


# -- how many tokens, of any size --------------------------------------------------------------------

SIDES = st.integers(1, 700)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES)
def test_llava_next_has_as_many_tokens_as_vllm_says(width: int, height: int) -> None:
    from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo

    case = cached(llava_next)
    info = LlavaNextProcessingInfo(SimpleNamespace(get_hf_config=lambda _: case.config))  # type: ignore[arg-type]
    wanted = info.get_num_image_tokens(image_width=width, image_height=height)
    assert case.layout((width, height)).count == wanted


@settings(max_examples=300, deadline=None)
@given(st.integers(8, 700), st.integers(8, 700), st.booleans(), st.booleans())
def test_idefics3_has_as_many_tiles_as_hugging_face_says(width: int, height: int, splits: bool, smol: bool) -> None:
    case = cached(idefics3, splits=splits, smol=smol)
    tiles = max(case.image_processor.get_number_of_image_patches(height, width, {})[0], 1)  # as vLLM reads it
    layout = case.layout((width, height))
    assert (layout.count, len(layout.grids)) == (4 * tiles, tiles)


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 700), st.integers(4, 700), st.integers(1, 40), st.integers(1, 40))
def test_smart_resize_is_qwens(width: int, height: int, least: int, more: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    bounds = least * 784, (least + more) * 784
    h, w = theirs(height, width, 28, *bounds)
    assert smart_resize((width, height), 28, *bounds) == (w, h)


# -- what is not known -------------------------------------------------------------------------------


def refused(case: Case) -> str:
    with pytest.raises(InvalidRequest) as raised:
        case.layout((100, 100))
    assert "use patches" in raised.value.message
    return raised.value.message


def test_models_that_are_not_known() -> None:
    plain = llava("pil")
    message = refused(Case(SimpleNamespace(model_type="florence2"), plain.image_processor, _plain))
    assert "florence2" in message
    assert all(name in message for name in ("llava_next", "qwen2_5_vl", "openvla"))
    plain.config.vision_config.model_type = "pixtral"
    assert "pixtral" in refused(plain)


def test_processors_that_do_something_else() -> None:
    assert "max_height" in refused(llava("pil", size={"max_height": 5, "max_width": 5}))
    without_class_token = llava_siglip("pil")
    without_class_token.config.vision_feature_select_strategy = "default"
    assert "siglip" in refused(without_class_token)
    other_tiles = llava_next("pil")
    other_tiles.image_processor.size = {"shortest_edge": 70}
    assert "tiles" in refused(other_tiles)
    other_shape = idefics3("pil")
    other_shape.image_processor.size = {"height": 70, "width": 70}
    assert "resized to {'height': 70" in refused(other_shape)
    plain = llava("pil")
    given = Case(plain.config, plain.image_processor, _plain, options={"size": 3})
    assert "where size is 3" in refused(given)


def test_a_class_token_that_is_kept_comes_first() -> None:
    case = llava("pil")
    case.config.vision_feature_select_strategy = "full"
    layout = case.layout((112, 112))
    assert (layout.count, layout.tokens((0, 0, 1, 1))) == (65, [1])
