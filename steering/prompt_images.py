"""Which tokens of a prompt's images a selector names: whole images, ranges of their tokens, boxes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from steersman.steering.errors import InvalidRequest, OutOfRange, located
from steersman.steering.image_grids import Box, Layout
from steersman.steering.spec import TokenSet


@dataclass(frozen=True)
class PromptImage:
    """One image of a prompt. ``layout`` is called only when a box is asked for; it raises where it is not known."""

    positions: Sequence[int]  # of the tokens that hold its embeddings, ascending
    layout: Callable[[], Layout]


def image_positions(chosen: TokenSet, images: Sequence[PromptImage], path: str) -> list[int]:
    """The prompt positions that ``image``, ``patches`` and ``box`` of the selector at ``path`` name."""
    named = list(_named(chosen, images, path))
    single = isinstance(chosen.box, tuple)
    boxes = [chosen.box] if isinstance(chosen.box, tuple) else chosen.box or []
    part = chosen.patches is not None or chosen.box is not None
    if part and not named:
        raise InvalidRequest("the prompt has no image", f"{path}.{'box' if chosen.patches is None else 'patches'}")
    out: list[int] = []
    for index in named:
        image = images[index]
        if not part:
            out += image.positions
        for i, (start, end) in enumerate(chosen.patches or ()):
            if end > len(image.positions):
                count = len(image.positions)
                raise OutOfRange(f"image {index} has {count} tokens, from 0 to {count - 1}", f"{path}.patches[{i}]")
            out += image.positions[start:end]
        for i, box in enumerate(boxes):
            with located(f"{path}.box" if single else f"{path}.box[{i}]"):
                out += [image.positions[token] for token in _in_box(box, image.layout(), index)]
    return out


def _named(chosen: TokenSet, images: Sequence[PromptImage], path: str) -> Iterator[int]:
    if isinstance(chosen.image, bool):
        yield from range(len(images) if chosen.image else 0)
        return
    single = isinstance(chosen.image, int)
    for i, index in enumerate([chosen.image] if isinstance(chosen.image, int) else chosen.image):
        if index >= len(images):
            where = f"{path}.image" if single else f"{path}.image[{i}]"
            raise OutOfRange(f"there is no image {index}: the prompt has {len(images)}, counted from 0", where)
        yield index


def _in_box(box: Box, layout: Layout, index: int) -> list[int]:
    if box[2] > layout.width or box[3] > layout.height:
        raise OutOfRange(f"reaches beyond image {index}, which is {layout.width} × {layout.height} pixels as sent")
    found = layout.tokens(box)
    if not found:
        raise InvalidRequest(f"lies in a part of image {index} that the model's processor cuts off")
    return found
