import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.clients.divergence import kl_bound, mean_kl, read_prompt_logprobs

K = 20


def distributions(seed: int, distance: float, size: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of two distributions; the second one is the first moved by noise of size `distance`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=size) * 3
    both = np.stack([logits, logits + distance * rng.normal(size=size)])
    normed = both - np.log(np.exp(both).sum(1, keepdims=True))
    return normed[0], normed[1]


def told(logprobs: np.ndarray, actual: int) -> Mapping[str, float]:
    """What a server says: the K likeliest tokens, and the prompt's own next one."""
    chosen = [*np.argsort(-logprobs)[:K], actual]
    return {str(i): float(np.float32(logprobs[i])) for i in chosen}


@given(st.integers(0, 10_000), st.floats(0, 6), st.integers(0, 399))
def test_never_more_than_the_whole_divergence(seed: int, distance: float, actual: int) -> None:
    p, q = distributions(seed, distance)
    true = float((np.exp(p) * (p - q)).sum())
    assert 0 <= kl_bound(told(p, actual), told(q, actual), K) <= true + 1e-5


def test_close_to_the_whole_where_few_tokens_hold_most() -> None:
    shares = []
    for seed in range(50):
        p, q = distributions(seed, 1.0)
        shares.append(kl_bound(told(p, 0), told(q, 0), K) / float((np.exp(p) * (p - q)).sum()))
    assert np.mean(shares) > 0.7


def test_the_same_answer_is_no_distance() -> None:
    p, _ = distributions(1, 0)
    assert kl_bound(told(p, 3), told(p, 3), K) == pytest.approx(0, abs=1e-12)


def test_exact_where_everything_is_told() -> None:
    base, other = {"a": math.log(0.9), "b": math.log(0.1)}, {"a": math.log(0.5), "b": math.log(0.5)}
    assert kl_bound(base, other, 2) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-9)


def test_tokens_that_the_other_does_not_tell_of_are_bounded_by_its_least_likely() -> None:
    """p puts all on token a, which q's two likeliest do not include: q gives a at most 0.1 of the 0.3 it has left."""
    base, other = {"a": 0.0}, {"b": math.log(0.6), "c": math.log(0.1)}
    assert kl_bound(base, other, 2) == pytest.approx(math.log(1 / 0.1))
    one_more = {**other, "d": math.log(0.001)}  # the prompt's own token: it says nothing of the k likeliest
    assert kl_bound(base, one_more, 2) == pytest.approx(math.log(1 / 0.1))


def test_means_over_positions() -> None:
    a, b = {"x": math.log(0.5), "y": math.log(0.5)}, {"x": math.log(0.9), "y": math.log(0.1)}
    assert mean_kl([None, a, a], [None, a, b], 2) == pytest.approx(kl_bound(a, b, 2) / 2)
    with pytest.raises(ValueError, match="2 and 1 positions"):
        mean_kl([None, a], [None], 2)
    with pytest.raises(ValueError, match="no second token"):
        mean_kl([None], [None], 2)


def test_reads_what_a_server_writes() -> None:
    choice = {"prompt_logprobs": [None, {"17": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}]}
    assert read_prompt_logprobs(choice) == [None, {"17": -0.5}]
