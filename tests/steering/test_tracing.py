import math
from typing import Any

import numpy as np
import pytest

from steersman.steering.recipes import Recipe
from steersman.steering.tracing import (
    Ablated,
    Falls,
    Table,
    Traced,
    embedding_noise,
    groups_of,
    noised,
    ranked,
    recipe,
    recovery,
    window,
)


def test_the_seven_groups_part_what_the_picture_can_reach() -> None:
    """Two tokens, a picture of six, and five words, of which the object's name is the second and third."""
    found = groups_of(14, picture=range(2, 8), boxed=[4, 6], named=[1, 9, 10])
    assert found == {
        "early_visual": [2, 3],
        "object_visual": [4, 6],
        "late_visual": [5, 7],
        "early_text": [8],
        "object_text": [9, 10],
        "late_text": [11, 12],
        "last": [13],
    }
    assert sorted(p for positions in found.values() for p in positions) == [*range(2, 14)]


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"picture": range(2, 8), "boxed": [2, 7]}, ["object_visual", "late_visual", "last"]),
        ({"picture": range(2, 8), "boxed": []}, ["last"]),
        ({"picture": range(2, 8), "named": [1]}, ["last"]),  # before the picture
        ({"named": [0, 13]}, ["object_text", "late_text", "last"]),  # of which the last token is its own group
        ({"named": [13]}, ["last"]),
        ({}, ["last"]),
    ],
)
def test_groups_without_what_divides_them(asked: dict[str, Any], names: list[str]) -> None:
    assert list(groups_of(14, **asked)) == names


def test_a_picture_in_two_parts_with_marks_between_them() -> None:
    found = groups_of(9, picture=[1, 2, 4, 5], boxed=[2], named=[3, 7])
    assert (found["late_visual"], found["early_text"], found["object_text"]) == ([4, 5], [6], [7])


def test_noise_has_its_size_and_depends_on_seed_and_picture_alone() -> None:
    grey = np.full((40, 50, 3), 128, np.uint8)
    found = noised(grey, 20.0, 1)
    off = found.astype(float) - 128
    assert abs(off.mean()) < 1
    assert off.std() == pytest.approx(20, rel=0.03)
    np.testing.assert_array_equal(found, noised(grey.copy(), 20.0, 1))
    assert (found != noised(grey, 20.0, 2)).mean() > 0.9
    other = grey.copy()
    other[0, 0, 0] += 1
    assert (found[1:] != noised(other, 20.0, 1)[1:]).mean() > 0.9
    np.testing.assert_array_equal(noised(grey, 0.0, 1), grey)
    extreme = noised(np.zeros_like(grey), 500.0, 1)
    assert set(np.unique(extreme[extreme != 0])) <= set(range(1, 256))
    assert (extreme == 0).mean() == pytest.approx(0.5, abs=0.05)


def test_noise_of_embeddings() -> None:
    found = embedding_noise(50, 40, 3.0, 4)
    assert (found.shape, found.dtype) == ((50, 40), np.float32)
    assert found.std() == pytest.approx(3, rel=0.05)
    np.testing.assert_array_equal(found, embedding_noise(50, 40, 3.0, 4))


def test_windows_are_cut_at_the_ends() -> None:
    layers = [*range(6)]
    assert [window(i, 1, layers) for i in layers] == [[i] for i in layers]
    assert [window(i, 3, layers) for i in layers] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5]]
    assert window(2, 4, layers) == [1, 2, 3, 4]
    assert window(4, 3, [0, 4, 5]) == [4, 5]


def test_recovery_and_its_filter() -> None:
    assert recovery(0.4, 0.2, 0.6) == pytest.approx(0.5)
    assert recovery(0.1, 0.2, 0.6) == pytest.approx(-0.25)
    assert recovery(0.6, 0.2, 0.6) == 1.0
    for clean in (0.205, 0.2, 0.1):  # the noise costs too little, nothing, or helps
        assert math.isnan(recovery(0.4, 0.2, clean, 0.01))
    assert math.isnan(recovery(0.4, 0.2, 0.2, 0.0))


def question(clean: float, corrupted: float, **patched: dict[str, list[float | None]]) -> Traced:
    return Traced(clean, corrupted, patched)  # type: ignore[arg-type]


def test_a_table_leaves_out_what_does_not_count_and_what_is_not_there() -> None:
    table = Table.of(
        [
            question(0.8, 0.4, attn={"last": [0.4, 0.8, None], "object_text": [0.6, 0.6, 0.6]}),
            question(0.6, 0.2, attn={"last": [0.4, 0.2, 0.2]}),
            question(0.6, 0.599, attn={"last": [0.9, 0.9, 0.9], "object_text": [9, 9, 9]}),
        ]
    )
    assert (table.questions, table.used) == (3, 2)
    np.testing.assert_allclose(table.rates["attn"]["last"], [0.25, 0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(table.rates["attn"]["object_text"], [0.5, 0.5, 0.5])
    assert table.counts == {"attn": {"last": 2, "object_text": 1}}
    assert "mlp" not in table.rates
    assert Table.of([question(0.5, 0.5, attn={"last": [0.5]})]).rates == {}


def test_layers_without_a_rate_are_never_ranked() -> None:
    rates = np.array([0.1, math.nan, 0.4, -0.2, 0.4])
    assert ranked(rates, 1) == (2,)
    assert ranked(rates, 3) == (0, 2, 4)
    assert ranked(rates, 5) == (0, 2, 3, 4)


def test_the_recipe_is_the_papers_and_one_that_the_store_takes() -> None:
    """Attention and MLP are ranked apart, at the last token, whatever other groups and hidden states say."""
    attn, mlp = [0.0, 0.3, 0.1, 0.2, 0.05], [0.5, 0.1, 0.2, math.nan, 0.0]
    rates = {
        "attn": {"last": np.array(attn), "object_text": np.array([9.0] * 5)},
        "mlp": {"last": np.array(mlp)},
        "hidden": {"last": np.array([1.0] * 5)},
    }
    table = Table(rates, {}, 1, 1)  # type: ignore[arg-type]
    found = recipe(table, 0.26, 0.16, sources=2, targets=4)
    assert found["rr_attn"] == attn
    assert found["rr_mlp"] == [0.5, 0.1, 0.2, 0.0, 0.0]
    assert found["sources"] == {"attn": [1, 3], "mlp": [0, 2]}
    assert found["targets"] == {"attn": [1, 2, 3, 4], "mlp": [0, 1, 2, 4]}
    assert (found["lambda_a"], found["lambda_m"]) == (0.26, 0.16)
    assert Recipe.model_validate_json(__import__("json").dumps(found)).component("mlp").receiving == (1, 2, 4)
    del rates["mlp"]
    with pytest.raises(ValueError, match="rates of mlp"):
        recipe(table, 0.1, 0.1)


def test_falls_are_of_the_questions_that_are_answered_rightly() -> None:
    found = Falls.of(
        [
            Ablated(0.8, True, [0.4, 0.8], [False, True], "recall"),
            Ablated(0.5, True, [0.5, 0.25], [True, True], "recall"),
            Ablated(0.1, False, [0.9, 0.9], [True, True], "recall"),
            Ablated(0.1, False, [0.0, 0.0], [False, False], "context"),
        ]
    )
    assert list(found) == ["recall", "context"]
    recall, context = found.values()
    np.testing.assert_allclose(recall.probability, [0.25, 0.25])
    np.testing.assert_allclose(recall.accuracy, [0.5, 0.0])
    assert (recall.questions, recall.used, context.questions, context.used) == (3, 2, 1, 0)
    assert np.isnan(context.probability).all()
    assert np.isnan(context.accuracy).all()
