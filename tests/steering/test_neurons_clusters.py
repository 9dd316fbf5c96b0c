"""k-means against every partition, and the random projection against all logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from steersman.steering.errors import InvalidRequest
from steersman.steering.neurons_clusters import k_means, random_map, sketch, top_words
from tests.steering.library import noise
from tests.steering.test_neurons_labels import Given, column, labelled


def closeness(points: Tensor, member: Tensor, k: int) -> float:
    """The mean cosine with the best centres of a partition: the length of each cluster's sum."""
    return sum(float(points[member == i].sum(0).norm()) for i in range(k)) / len(points)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_best_of_all_partitions_is_found(seed: int, k: int) -> None:
    points = normalize(noise(7, 3, seed=seed), dim=1)
    best = max(closeness(points, torch.tensor(m), k) for m in itertools.product(range(k), repeat=7) if len({*m}) == k)
    found = k_means(points, k, restarts=20)
    assert found.closeness == pytest.approx(best, abs=1e-5)
    assert closeness(points, found.member, k) == pytest.approx(best, abs=1e-5)


def test_planted_clusters_come_back_whatever_the_order() -> None:
    centres = torch.eye(6)[:5]
    true = torch.arange(5).repeat_interleave(torch.tensor([20, 40, 80, 100, 60]))
    points = normalize(centres[true] + 0.1 * noise(300, 6), dim=1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for at in (torch.arange(300), order):
        found = k_means(points[at], 5)
        pairs = set(zip(found.member.tolist(), true[at].tolist(), strict=True))
        assert len(pairs) == 5
        assert torch.allclose(found.centres.norm(dim=1), torch.ones(5))


def test_as_many_clusters_as_points_and_points_that_are_equal() -> None:
    points = normalize(noise(6, 4), dim=1)
    found = k_means(points, 6)
    assert sorted(found.member.tolist()) == [*range(6)]
    assert found.closeness == pytest.approx(1, abs=1e-6)
    same = k_means(points[:1].repeat(5, 1), 3)
    assert sorted({*same.member.tolist()}) == [0, 1, 2]
    for k in (0, 7):
        with pytest.raises(InvalidRequest, match="1 to 6"):
            k_means(points, k)


def test_it_is_the_same_each_time() -> None:
    points = normalize(noise(200, 5), dim=1)
    assert torch.equal(k_means(points, 7, seed=3).member, k_means(points, 7, seed=3).member)


def test_the_sketch_keeps_the_cosines_of_centred_logits() -> None:
    """Within a few times 1/√r; the mean row, which moves all logits alike, plays no part."""
    head = noise(5000, 12) + 5 * noise(12, seed=9)  # U has a mean that would drown the rest
    weights = Given({0: noise(30, 12, seed=1), 2: noise(20, 12, seed=2)}, head)
    neurons = [(2, 5), *((0, i) for i in range(30)), (2, 7)]
    r = 1024
    points = sketch(weights, neurons, random_map(weights, 5000, r))
    rows = torch.stack([weights.columns[layer][index] for layer, index in neurons])
    logits = rows @ head.T
    wanted = torch.corrcoef(logits)
    error = (points @ points.T - wanted).abs()
    assert error.max() < 5 / r**0.5
    assert wanted.fill_diagonal_(0).abs().max() > 0.5  # so there is something to keep
    shorter = sketch(weights, neurons, random_map(weights, 5000, 64))
    assert (shorter @ shorter.T - wanted).fill_diagonal_(0).abs().mean() > 2 * error.mean()


def test_part_of_the_vocabulary_is_all_that_counts() -> None:
    weights = Given({0: noise(10, 6)}, torch.cat([noise(300, 6, seed=1), 1e6 * noise(20, 6, seed=2)]))
    alone = Given(weights.columns, weights.head[:300])
    assert torch.equal(random_map(weights, 300, 16), random_map(alone, 300, 16))


def test_the_words_of_a_cluster_are_what_its_neurons_share_and_others_lack() -> None:
    """All six neurons write " Up"; the first three write "up" too."""
    some = [column(t0=1.0, t1=1.0, t3=1.0), column(t0=1.0, t1=1.0, t7=1.0), column(t0=1.0, t1=1.0, t4=1.0)]
    labels = labelled({0: torch.stack([*some, *(column(t1=1.0, t5=1.0, t6=1.0) for _ in range(3))])})
    words = top_words(labels, [(0, 0), (0, 1), (0, 2)])
    assert words[0] == "up"
    assert {*words[1:4]} == {"down", "é", " cup"}
    assert {*top_words(labels, [(0, 3)])} == {"[action: 0.502]", "\n"}
