"""Generated scenes of coloured shapes, whose objects come in company as those of photographs do.

Every kind of object belongs to one of three themes, nearly all of a scene's objects are of its theme, and one theme is
seen more often than the next. Objects are small, some are pale, and the picture is noisy, so that what is there is not
always plain to see: then company is evidence, and misleads.

A scene is a function of its seed and number alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels
COLOURS = {"red": (215, 50, 45), "green": (50, 165, 70), "blue": (60, 90, 215), "yellow": (225, 195, 50)}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
THEMES = tuple(tuple(range(t, len(KINDS), 3)) for t in range(3))  # kinds of each
THEME_ODDS = (0.5, 0.3, 0.2)
COUNT_ODDS = (0.05, 0.10, 0.20, 0.35, 0.30)  # of one to five objects
OF_THEME = 0.93  # the share of objects that are of the scene's theme
CELL = 16  # pixels: two objects are never centred in the same cell of this grid
OFF = 3.0  # pixels, how far from a cell's centre an object is at most, either way
RADIUS = (4.5, 7.5)  # pixels
CONTRAST = (0.1, 1.0)  # of an object's colour over the background
NOISE = 22.0  # standard deviation of a channel, of 255
REACH = RADIUS[1] + 1  # pixels from an object's centre
_ALONG = np.arange(SIZE, dtype=np.float32) + 0.5

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """``kinds`` are distinct, from the left to the right; ``boxes`` [x0, y0, x1, y1] in pixels, x1 and y1 outside."""

    picture: Picture  # [SIZE, SIZE, 3]
    kinds: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    shown: NDArray[np.int8]  # [SIZE, SIZE], the kind that is seen at a pixel, -1 for none


def draw(seed: int, number: int) -> Scene:
    rng = np.random.default_rng([seed, number])
    kinds = _choose(rng)
    radii = rng.uniform(*RADIUS, len(kinds))
    centres = _place(rng, len(kinds))
    tones = np.array([COLOURS[KINDS[k].split()[0]] for k in kinds]) + rng.uniform(-20, 20, (len(kinds), 3))
    contrasts = rng.uniform(*CONTRAST, len(kinds))
    plain = rng.uniform(90, 165) + rng.uniform(-15, 15, 3)
    picture = NOISE * rng.standard_normal((SIZE, SIZE, 3), np.float32) + plain.astype(np.float32)
    shown = np.full((SIZE, SIZE), -1, np.int8)
    order = [int(i) for i in np.argsort(centres[:, 0])]
    boxes = []
    for i in order:
        x, y = (slice(max(0, int(c - REACH)), int(c + REACH) + 1) for c in centres[i])
        shape = KINDS[kinds[i]].split()[1]
        cover = _cover(shape, _ALONG[x] - centres[i, 0], _ALONG[y] - centres[i, 1], radii[i])
        picture[y, x] += (contrasts[i] * cover)[..., None] * (tones[i] - plain).astype(np.float32)
        inside = cover > 0.5
        shown[y, x][inside] = kinds[i]
        rows, columns = np.flatnonzero(inside.any(1)) + y.start, np.flatnonzero(inside.any(0)) + x.start
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return Scene(picture.clip(0, 255).astype(np.uint8), tuple(kinds[i] for i in order), tuple(boxes), shown)


def _choose(rng: np.random.Generator) -> list[int]:
    theme = THEMES[rng.choice(len(THEMES), p=THEME_ODDS)]
    others = [k for k in range(len(KINDS)) if k not in theme]
    left = [list(rng.permutation(theme)), list(rng.permutation(others))]
    kinds = []
    for _ in range(1 + rng.choice(len(COUNT_ODDS), p=COUNT_ODDS)):
        from_theme = rng.random() < OF_THEME and left[0]
        kinds.append(int(left[0 if from_theme else 1].pop()))
    return kinds


def _place(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Centres [n, 2], x and y."""
    side = SIZE // CELL
    cells = rng.permutation(side * side)[:n]
    return CELL * (np.stack([cells % side, cells // side], axis=1) + 0.5) + rng.uniform(-OFF, OFF, (n, 2))


def _cover(shape: str, x: Plane, y: Plane, radius: float) -> Plane:
    """How much of each pixel a shape covers, [y, x], by its distance to the outline; ``x``, ``y`` from its centre."""
    x, y = x[None], y[:, None]
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.88 * radius
    elif shape == "triangle":
        distance = np.maximum(y - 0.75 * radius, 0.87 * abs(x) - 0.5 * (y + radius))
    else:
        arm = 0.35 * radius
        distance = np.minimum(np.maximum(abs(x) - radius, abs(y) - arm), np.maximum(abs(x) - arm, abs(y) - radius))
    cover: Plane = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return cover
