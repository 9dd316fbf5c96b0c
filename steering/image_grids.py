"""Where the tokens of an image lie on it: what a vision model's resizing, cropping and tiling make of a box.

Whatever a processor does, each token stands for one cell of a grid, and a grid lies over the image or a part of it. So
every model comes down to :class:`Grid`, in pixels of the image as it was sent, and one function here for each way of
cutting images up. Sizes are (width, height), coordinates (x, y) from the upper left corner, cells in reading order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1): from the left and upper edge to the right and lower one, which are outside."""
Size = tuple[int, int]

_LARGEST = 4096  # Idefics3's processor makes no image larger
_ROUNDING = 1e-6  # of a cell: an edge that lies on a cell's border in exact numbers


@dataclass(frozen=True)
class Grid:
    """Tokens in rows. Lengths are in pixels of the image as sent; a grid may reach beyond the image."""

    columns: int
    rows: int
    cell_width: float
    cell_height: float
    left: float = 0.0
    top: float = 0.0
    first: int = 0  # its first token, among those of the image
    between: int = 0  # tokens after each row that show no part of the image

    def tokens(self, box: Box) -> list[int]:
        """The tokens whose cells overlap the box, among those of the image."""
        columns = _overlapped(box[0] - self.left, box[2] - self.left, self.cell_width, self.columns)
        rows = _overlapped(box[1] - self.top, box[3] - self.top, self.cell_height, self.rows)
        return [self.first + row * (self.columns + self.between) + column for row in rows for column in columns]


@dataclass(frozen=True)
class Layout:
    """All the grids over one image, of ``width`` × ``height`` pixels as sent."""

    width: int
    height: int
    grids: tuple[Grid, ...]
    count: int  # the image's tokens, also those that are of no grid

    def tokens(self, box: Box) -> list[int]:
        """The tokens of every grid that overlap the box, ascending; none where the model does not see it."""
        return sorted(token for grid in self.grids for token in grid.tokens(box))


def _overlapped(start: float, end: float, cell: float, count: int) -> range:
    first, last = math.floor(start / cell + _ROUNDING), math.ceil(end / cell - _ROUNDING)
    return range(min(max(first, 0), count), min(max(last, 0), count))


def _over(size: Size, columns: int, rows: int, first: int = 0) -> Grid:
    """A grid over all of the image."""
    return Grid(columns, rows, size[0] / columns, size[1] / rows, first=first)


def whole(size: Size, columns: int, rows: int) -> Layout:
    """The image resized to the grid, whatever its shape (PaliGemma, OpenVLA, Qwen2-VL)."""
    return Layout(*size, (_over(size, columns, rows),), columns * rows)


def cropped(size: Size, resized: Size, crop: Size, patch: int, before: int = 0) -> Layout:
    """The image resized, then its centre cut out or, where it is smaller, surrounded (CLIP's processor).

    ``patch`` is a patch's edge after that; ``before`` tokens come before the grid's, such as a class token.
    """
    columns, rows = crop[0] // patch, crop[1] // patch
    x, y = size[0] / resized[0], size[1] / resized[1]  # pixels as sent for one of the resized image
    left, top = (resized[0] - crop[0]) // 2 * x, (resized[1] - crop[1]) // 2 * y
    grid = Grid(columns, rows, patch * x, patch * y, left, top, before)
    return Layout(*size, (grid,), before + columns * rows)


def inside_of(size: Size, edge: int) -> tuple[Size, Size]:
    """The size that an image has inside a square, its shape kept, and its left upper corner there (openpi)."""
    ratio = max(size) / edge
    width, height = (max(int(side / ratio), 1) for side in size)
    return (width, height), ((edge - width) // 2, (edge - height) // 2)


def inside(size: Size, edge: int, patch: int) -> Layout:
    """The image resized into a square of ``edge`` pixels with borders (π0). ``patch`` is a patch's edge in that."""
    (width, height), (left, top) = inside_of(size, edge)
    x, y = size[0] / width, size[1] / height  # pixels as sent for one of the resized image
    grid = Grid(edge // patch, edge // patch, patch * x, patch * y, -left * x, -top * y)
    return Layout(*size, (grid,), grid.columns * grid.rows)


def to_shortest_edge(size: Size, edge: int) -> Size:
    """The size with its shorter side made ``edge`` pixels long, as Hugging Face's processors round it."""
    short, long = min(size), max(size)
    other = int(edge * long / short)
    return (edge, other) if size[0] <= size[1] else (other, edge)


def smart_resize(size: Size, unit: int, least: int, most: int) -> Size:
    """Both sides as multiples of ``unit`` with between ``least`` and ``most`` pixels together (Qwen2-VL)."""
    width, height = size
    w, h = round(width / unit) * unit, round(height / unit) * unit
    if w * h > most:
        shrink = math.sqrt(width * height / most)
        return (
            max(unit, math.floor(width / shrink / unit) * unit),
            max(unit, math.floor(height / shrink / unit) * unit),
        )
    if w * h < least:
        grow = math.sqrt(least / (width * height))
        return math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
    return w, h


def anyres(size: Size, resolutions: Sequence[Size], tile: int, patch: int) -> Layout:
    """LLaVA-NeXT: the whole image in one tile, then at the best of ``resolutions`` in tiles, without its padding.

    The tiles make one grid, and every row of it ends in a newline token. Rows or columns of it that lie in the padding
    alone are left out, by the model's own rounding.
    """
    width, height = size
    side = tile // patch
    target = _best(size, resolutions)
    columns, rows = target[0] // tile * side, target[1] // tile * side
    across, down = target[0] / width, target[1] / height
    if across < down:
        fitted = target[0], min(math.ceil(height * across), target[1])
    else:
        fitted = min(math.ceil(width * down), target[0]), target[1]
    above = beside = 0  # rows and columns left out on each side
    if width / height > columns / rows:
        above = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        beside = (columns - int(round(width * (rows / height), 7))) // 2
    x, y = width / fitted[0], height / fitted[1]
    grid = Grid(
        columns=columns - 2 * beside,
        rows=rows - 2 * above,
        cell_width=patch * x,
        cell_height=patch * y,
        left=(beside * patch - (target[0] - fitted[0]) // 2) * x,
        top=(above * patch - (target[1] - fitted[1]) // 2) * y,
        first=side * side,
        between=1,
    )
    return Layout(*size, (_over(size, side, side), grid), side * side + grid.rows * (grid.columns + 1))


def _best(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of the image's pixels and, of several, wastes the fewest of its own."""

    def kept(resolution: Size) -> int:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    return max(resolutions, key=lambda r: (kept(r), kept(r) - r[0] * r[1]))


def tiled(size: Size, longest_edge: int | None, tile: int, side: int, split: bool) -> Layout:
    """Idefics3, SmolVLM: the resized image in tiles of ``side``² tokens, then the whole of it in one.

    The image is made ``longest_edge`` pixels long, if that is given, and then as many whole tiles. Without ``split``,
    or where it fits into one tile, there is the last one alone.
    """
    each = side * side
    columns, rows = _tiles(_to_longest_edge(size, longest_edge) if longest_edge else size, tile)
    if not split or columns == rows == 1:
        return whole(size, side, side)
    width, height = size[0] / columns, size[1] / rows  # of a tile
    grids = [
        Grid(side, side, width / side, height / side, column * width, row * height, (row * columns + column) * each)
        for row in range(rows)
        for column in range(columns)
    ]
    grids.append(_over(size, side, side, first=len(grids) * each))
    return Layout(*size, tuple(grids), len(grids) * each)


def _to_longest_edge(size: Size, edge: int) -> Size:
    """The size with its longer side made ``edge`` pixels long, the other one even."""
    ratio = size[0] / size[1]
    if size[0] >= size[1]:
        width, height = edge, int(edge / ratio)
        height = max(height + height % 2, 1)
    else:
        width, height = int(edge * ratio), edge
        width = max(width + width % 2, 1)
    ratio = width / height
    if width >= height and width > _LARGEST:
        return _LARGEST, max(int(_LARGEST / ratio), 1)
    if height > width and height > _LARGEST:
        return max(int(_LARGEST * ratio), 1), _LARGEST
    return width, height


def _tiles(size: Size, tile: int) -> Size:
    """How many tiles the image is made to fill, across and down."""
    ratio = size[0] / size[1]
    if size[0] >= size[1]:
        columns = math.ceil(size[0] / tile)
        return columns, math.ceil(int(columns * tile / ratio) / tile)
    rows = math.ceil(size[1] / tile)
    return math.ceil(int(rows * tile * ratio) / tile), rows
