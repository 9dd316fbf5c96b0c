"""Histograms against numpy, value by value."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.kernels import statistics
from steersman.kernels.statistics import Histograms, KeyedHistograms, cosines, entropies, logprobs, norms, stream_of

BOUNDS = (-1.0, 0.0, 0.5, 2.0)
NUMBERS = st.floats(-10, 10, width=32) | st.sampled_from([*BOUNDS, math.nan, math.inf, -math.inf])


def plainly(values: list[float]) -> tuple[list[int], float, float]:
    """Counts by bucket, sum and maximum, one value after another."""
    counts = [0] * (len(BOUNDS) + 1)
    for v in values:
        counts[next((i for i, bound in enumerate(BOUNDS) if v <= bound), len(BOUNDS))] += 1
    finite = [v for v in values if math.isfinite(v)]
    return counts, sum(finite), max(finite, default=-math.inf)


@given(st.lists(st.lists(st.tuples(st.integers(-1, 3), NUMBERS), max_size=20), max_size=5))
def test_histograms_are_those_of_a_loop(batches: list[list[tuple[int, float]]]) -> None:
    found = Histograms(4, BOUNDS)
    for batch in batches:
        found.add(np.array([r for r, _ in batch], np.int64), np.array([v for _, v in batch]))
    told = {row: rest for row, *rest in found.rows()}
    for row in range(4):
        values = [v for batch in batches for r, v in batch if r == row]
        if not values:
            assert row not in told
            continue
        counts, total, largest = plainly(values)
        assert told[row] == [counts, pytest.approx(total, abs=1e-9), largest]


def test_keys_beyond_the_limit_share_one_histogram() -> None:
    found = KeyedHistograms(3, BOUNDS, "other")
    for i in [*range(8), *range(8)]:
        found.add(f"k{i}", np.array([0.25, float(i)]))
    rows = {key: rest for key, *rest in found.rows()}
    assert set(rows) == {"k0", "k1", "k2", "other"}
    assert rows["k2"] == [[0, 0, 2, 2, 0], 4.5, 2.0]
    counts, total, largest = plainly([v for i in range(3, 8) for v in (0.25, float(i))] * 2)
    assert rows["other"] == [counts, total, largest]
    found.clear()
    assert found.rows() == []
    found.add("k7", np.array([1.0]))
    assert [key for key, *_ in found.rows()] == ["k7"]


@pytest.mark.parametrize("name", [n for n in dir(statistics) if n.endswith("_BOUNDS")])
def test_bounds_ascend(name: str) -> None:
    bounds: Any = getattr(statistics, name)
    assert list(bounds) == sorted(set(bounds))
    assert len(bounds) <= 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_norms_and_cosines(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual, other = (torch.randn(6, 10, generator=generator).to(dtype) for _ in range(3))
    stream, before, spare = torch.full((3, 5, 10), math.nan)
    assert stream_of(x, residual, stream, spare) is stream
    assert stream_of(other, None, before, spare) is before
    a, b = x[:5].double().numpy() + residual[:5].double().numpy(), other[:5].double().numpy()
    lengths = np.sqrt((a**2).sum(1)), np.sqrt((b**2).sum(1))
    np.testing.assert_allclose(norms(stream).numpy(), lengths[0], rtol=1e-6)
    found = cosines(before, stream, norms(before), norms(stream), spare).numpy()
    np.testing.assert_allclose(found, (a * b).sum(1) / (lengths[0] * lengths[1]), rtol=1e-5, atol=1e-6)
    other += 1  # a layer may write into what it was given
    np.testing.assert_array_equal(before.numpy(), b.astype(np.float32))


def test_logprobs_of_tokens_and_of_what_the_vocabulary_lacks() -> None:
    logits = torch.tensor([[0.0, 1.0, -50.0], [4.0, 4.0, 4.0]])
    want = logits.double().log_softmax(-1)[:, [2, 0]].numpy()
    found = logprobs(logits, [2, 0, 3, 10**9]).numpy()
    np.testing.assert_allclose(found[:, :2], want, rtol=1e-6)
    assert (found[:, 2:] == -math.inf).all()


def test_entropies() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 1.0, -2.0, 0.0], [3.0, -math.inf, 3.0, -math.inf]])
    p = torch.softmax(logits.double(), -1).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        want = -np.nansum(p * np.log(p), 1)
    np.testing.assert_allclose(entropies(logits).numpy(), want, rtol=1e-5)
    assert entropies(logits)[2].item() == pytest.approx(math.log(2))
