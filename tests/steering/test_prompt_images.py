"""Whole images, ranges of their tokens and boxes on them, as positions of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter

from steersman.steering.errors import InvalidRequest, OutOfRange
from steersman.steering.image_grids import Box, Grid, Layout, anyres, cropped, tiled, whole
from steersman.steering.prompt_images import PromptImage
from steersman.steering.spec import Tokens
from steersman.steering.tokens import Prompt, Selection

ADAPTER: TypeAdapter[Tokens] = TypeAdapter(Tokens)
LENGTH = 30
FIRST = [2, 3, 4, 5, 7, 8, 9, 10]  # 4 × 2 tokens, a mark between the rows
SECOND = [12, 13, 14, 15]  # 2 × 2


def unknown() -> Layout:
    raise InvalidRequest("use patches")


IMAGES = [
    PromptImage(FIRST, lambda: whole((80, 40), 4, 2)),
    PromptImage(SECOND, lambda: whole((100, 60), 2, 2)),
    PromptImage([20, 21], unknown),
]


def positions(images: list[PromptImage] = IMAGES, **data: Any) -> list[int]:
    tokens = ADAPTER.validate_json(json.dumps(data))
    selection = Selection.build([tokens], Prompt(range(LENGTH), images=images), ["steering.interventions[0].tokens"])
    assert not selection.generated
    assert not selection.rules
    return [p for a, b, _ in selection.runs for p in range(a, b)]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"image": True}, [*FIRST, *SECOND, 20, 21]),
        ({"image": False}, []),
        ({"image": 0}, FIRST),
        ({"image": [2, 1]}, [*SECOND, 20, 21]),
        ({"image": [1, 1]}, SECOND),
        ({"image": 0, "patches": [[3, 5], [0, 1]]}, [2, 5, 7]),
        ({"image": [0, 1], "patches": [[1, 2]]}, [3, 13]),
        ({"image": True, "patches": [[0, 2]]}, [2, 3, 12, 13, 20, 21]),
        ({"image": 0, "box": [20, 0, 40, 20]}, [3]),
        ({"image": 0, "box": [19.9, 0, 40.1, 20]}, [2, 3, 4]),
        ({"image": 0, "box": [[0, 0, 1, 1], [79, 39, 80, 40]]}, [2, 10]),
        ({"image": 0, "box": [0, 0, 80, 40]}, FIRST),
        ({"image": [0, 1], "box": [0, 0, 50, 30]}, [2, 3, 4, 7, 8, 9, 12]),
        ({"image": 0, "box": [0, 0, 1, 1], "patches": [[7, 8]]}, [2, 10]),
        ({"image": 0, "box": [0, 0, 1, 1], "positions": [0]}, [0, 2]),
        ({"image": 0, "exclude": {"image": 0, "box": [0, 0, 80, 20]}}, [7, 8, 9, 10]),
        ({"image": 2, "patches": [[1, 2]]}, [21]),
    ],
)
def test_what_is_named_is_selected(data: dict[str, Any], wanted: list[int]) -> None:
    assert positions(**data) == sorted(wanted)


@pytest.mark.parametrize(
    ("data", "kind", "param", "says"),
    [
        ({"image": 3}, OutOfRange, "image", "no image 3: the prompt has 3"),
        ({"image": [0, 5]}, OutOfRange, "image[1]", "no image 5"),
        ({"image": 0, "patches": [[0, 8], [7, 9]]}, OutOfRange, "patches[1]", "image 0 has 8 tokens, from 0 to 7"),
        ({"image": True, "patches": [[3, 4]]}, OutOfRange, "patches[0]", "image 2 has 2 tokens"),
        ({"image": 0, "box": [0, 0, 80.5, 40]}, OutOfRange, "box", "image 0, which is 80 × 40"),
        ({"image": 0, "box": [[0, 0, 1, 1], [0, 39, 1, 41]]}, OutOfRange, "box[1]", "80 × 40"),
        ({"image": [1, 0], "box": [0, 0, 100, 60]}, OutOfRange, "box", "image 0"),
        ({"image": 2, "box": [0, 0, 1, 1]}, InvalidRequest, "box", "use patches"),
        ({"exclude": {"image": 0, "box": [[90, 0, 91, 1]]}}, OutOfRange, "exclude.box[0]", "80 × 40"),
    ],
)
def test_what_is_not_there_is_an_error(data: dict[str, Any], kind: type[Exception], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as raised:
        positions(**data)
    assert (type(raised.value), raised.value.param) == (kind, f"steering.interventions[0].tokens.{param}")


def test_a_part_of_images_needs_one() -> None:
    assert positions([], image=True) == []
    for name, part in (("patches", [[0, 1]]), ("box", [0, 0, 1, 1])):
        with pytest.raises(InvalidRequest, match="no image") as raised:
            positions([], image=True, **{name: part})
        assert raised.value.param == f"steering.interventions[0].tokens.{name}"


def test_a_box_that_the_model_never_sees_is_an_error() -> None:
    image = PromptImage(range(4), lambda: cropped((200, 100), (56, 28), (28, 28), 14))
    assert positions([image], image=0, box=[40, 0, 60, 1]) == [0]
    with pytest.raises(InvalidRequest, match="cuts off") as raised:
        positions([image], image=0, box=[[40, 0, 60, 1], [0, 0, 50, 100]])
    assert raised.value.param == "steering.interventions[0].tokens.box[1]"


def test_where_an_image_lies_is_asked_only_for_boxes() -> None:
    assert positions([PromptImage([1], unknown)], image=0, patches=[[0, 1]]) == [1]


# -- grids -------------------------------------------------------------------------------------------


def test_a_cells_edges_belong_to_it_on_the_left_alone() -> None:
    grid = Grid(3, 2, 10.0, 10.0, left=5.0, top=-4.0, first=7, between=1)
    assert grid.tokens((5, 0, 15, 6)) == [7]
    assert grid.tokens((15, 5.9, 15.1, 6.1)) == [8, 12]
    assert grid.tokens((0, 0, 5, 16)) == grid.tokens((35, 0, 40, 16)) == []
    assert grid.tokens((0, 0, 100, 100)) == [7, 8, 9, 11, 12, 13]


@pytest.mark.parametrize(
    ("make", "sent", "wanted"),
    [
        # widths of cells that are not exact in binary
        (lambda size: whole(size, 7, 3), (100, 30), 21),
        (lambda size: cropped(size, (224, 224), (224, 224), 14), (333, 77), 256),
        (lambda size: anyres(size, [(672, 336), (336, 672)], 336, 14), (640, 480), 576 + 24 * (32 + 1)),
        (lambda size: tiled(size, 1456, 364, 13, True), (640, 480), 13 * 169),
    ],
)
def test_cells_neither_overlap_nor_leave_gaps(
    make: Callable[[tuple[int, int]], Layout], sent: tuple[int, int], wanted: int
) -> None:
    """Each cell as a box selects itself alone of its grid."""
    layout = make(sent)
    assert layout.count == wanted
    for grid in layout.grids:
        for row in range(grid.rows):
            for column in range(grid.columns):
                x, y = grid.left + column * grid.cell_width, grid.top + row * grid.cell_height
                box: Box = (x, y, x + grid.cell_width, y + grid.cell_height)
                assert grid.tokens(box) == [grid.first + row * (grid.columns + grid.between) + column]
