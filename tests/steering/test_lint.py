"""Planted faults are reported with their size, and what is sound is not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.steering.errors import InvalidRequest, NonFinite, WidthMismatch
from steersman.steering.lint import edit_ratio, gram, lint_null_space, lint_overlap, lint_size, null_share, split
from tests.steering.library import noise

D_MODEL, D_FF = 96, 384  # wide enough that chance is steady
READER = noise(D_MODEL, D_FF)


def null_and_row(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Unit vectors [d_ff]: one that the reader cannot see, one in its row space."""
    basis = torch.linalg.qr(torch.cat([READER, noise(1, D_FF, seed=seed)]).T.double())[0].T
    row = torch.linalg.lstsq(READER.double(), noise(D_MODEL, seed=seed).double()).solution
    return basis[-1].float(), (row / row.norm()).float()


@settings(max_examples=30, deadline=None)
@given(angle=st.floats(0, 90), length=st.sampled_from([1e-3, 1.0, 500.0]))
def test_the_share_is_the_sine_of_the_angle_to_what_is_read(angle: float, length: float) -> None:
    null, row = null_and_row()
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    found = null_share(length * (sine * null + cosine * row)[None], READER)
    assert abs(float(found.share[0]) - sine) < 1e-5
    assert found.chance == pytest.approx(math.sqrt(1 - D_MODEL / D_FF))


def test_random_directions_have_the_share_of_chance() -> None:
    found = null_share(noise(500, D_FF, seed=2), READER)
    assert abs(float(found.share.mean()) - found.chance) < 0.01


def test_a_reader_of_low_rank_reads_less() -> None:
    low = noise(D_MODEL, 3) @ noise(3, D_FF, seed=1)
    assert null_share(noise(1, D_FF), low).chance == pytest.approx(math.sqrt(1 - 3 / D_FF))
    blind = null_share(noise(2, D_FF), torch.zeros(4, D_FF))
    assert blind.share.tolist() == [1, 1]
    assert blind.chance == 1
    square = null_share(noise(2, D_MODEL), noise(D_MODEL, D_MODEL))
    assert float(square.share.max()) < 1e-6


def test_the_two_parts_add_up_and_only_one_is_read() -> None:
    v = noise(3, D_FF, seed=3)
    null, row = split(v, READER)
    torch.testing.assert_close(null + row, v)
    assert (null @ READER.T).abs().max() < 1e-4
    torch.testing.assert_close(row @ READER.T, v @ READER.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(null.norm(dim=1) / v.norm(dim=1), null_share(v, READER).share)


def test_the_illusion_is_reported_and_ordinary_directions_are_not() -> None:
    null, row = null_and_row()
    names = ["hidden", "read", *(f"random {i}" for i in range(100))]
    directions = torch.stack([3 * null + 0.3 * row, row, *noise(100, D_FF, seed=4)])
    found = lint_null_space(names, directions, READER)
    assert [f.message.split(":")[0] for f in found] == ["hidden"]
    assert found[0].code == "null_space"
    assert found[0].value == pytest.approx(3 / math.hypot(3, 0.3), abs=1e-4)


@pytest.mark.parametrize(("of_usual", "warned"), [(0.4, True), (0.6, False)])
def test_the_bound_is_half_of_what_a_random_direction_shows(of_usual: float, warned: bool) -> None:
    null, row = null_and_row()
    seen = of_usual * D_MODEL / D_FF  # of the direction's square
    v = math.sqrt(1 - seen) * null + math.sqrt(seen) * row
    assert bool(lint_null_space(["v"], v[None], READER)) is warned


def test_cosines() -> None:
    v = noise(4, 9)
    found = gram(v * torch.tensor([1.0, 2, 1e-3, 1e3])[:, None])
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    for i in range(4):
        torch.testing.assert_close(found[i], torch.nn.functional.cosine_similarity(v[i][None], v))


def test_overlaps_are_reported_once_with_their_sign() -> None:
    a, b = torch.eye(5)[0], torch.eye(5)[1]
    found = lint_overlap(["a", "b", "ab", "not-a"], torch.stack([a, b, a + b, -2 * a]))
    assert [(f.code, round(f.value, 3)) for f in found] == [("overlap", v) for v in (0.707, -1.0, 0.707, -0.707)]
    assert "a and not-a" in found[1].message
    assert "weaken" in found[1].message
    assert lint_overlap(["a", "b"], torch.stack([a, b])) == []
    assert lint_overlap(["a", "ab"], torch.stack([a, a + b]), above=0.71) == []
    with pytest.raises(InvalidRequest, match="1 names"):
        lint_overlap(["a"], torch.stack([a, b]))


def test_edits_are_measured_against_the_stream() -> None:
    stream = torch.tensor([[3.0, 4], [0, 10]])
    torch.testing.assert_close(edit_ratio(torch.tensor([0.0, 5]), stream), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(edit_ratio(stream * 2, stream), torch.tensor([2.0, 2]))
    with pytest.raises(WidthMismatch):
        edit_ratio(torch.ones(3), stream)
    with pytest.raises(InvalidRequest, match="zero"):
        edit_ratio(torch.ones(2), torch.zeros(1, 2))


def test_edits_larger_than_the_stream_are_reported_by_layer() -> None:
    found = lint_size({3: 20.0, 1: 10.0, 2: 9.0}, {1: 10.0, 2: 10.0, 3: 10.0})
    assert [(f.code, f.value, f.message.split(":")[0]) for f in found] == [("large_edit", 2.0, "layer 3")]
    assert [f.value for f in lint_size({1: 10.0}, {1: 20.0}, above=0.4)] == [0.5]
    for norms in ({}, {1: 0.0}, {1: math.nan}):
        with pytest.raises(InvalidRequest, match="layer 1"):
            lint_size({1: 1.0}, norms)


def test_what_is_no_direction_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="zero"):
        gram(torch.zeros(1, 3))
    with pytest.raises(NonFinite):
        gram(torch.full((1, 3), torch.inf))
    with pytest.raises(InvalidRequest, match="wanted"):
        gram(torch.ones(3))
    with pytest.raises(WidthMismatch):
        null_share(torch.ones(1, 3), READER)
