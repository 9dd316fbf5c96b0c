"""Neurons that write alike: k-means on the cosine of their logits, through a random projection.

The logits of a neuron, less their mean, are C·w with C = U − the mean row of U: two neurons write alike where the
cosine of C·w is near 1. They are never all in memory: with random signs R [r, V], R·C·w keeps cosines within about
1/√r (Johnson and Lindenstrauss), and R·C is a matrix [r, d_model] that is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest
from steersman.steering.neurons_labels import NeuronLabels
from steersman.steering.neurons_projection import Weights

_BLOCK = 4096  # tokens, or neurons, at once


@dataclass(frozen=True)
class Clusters:
    member: Tensor  # [n] int64, the cluster of each point
    centres: Tensor  # [k, r] float32, unit length
    closeness: float  # mean cosine of the points and their centres


def random_map(weights: Weights, vocabulary: int, r: int, seed: int = 0) -> Tensor:
    """R·C/√r, [r, d_model] float32."""
    generator = torch.Generator().manual_seed(seed)
    out, mean, total = torch.zeros(r, weights.d_model), torch.zeros(weights.d_model), torch.zeros(r)
    for start in range(0, vocabulary, _BLOCK):
        rows = weights.unembedding(start, min(start + _BLOCK, vocabulary))
        signs = torch.randint(0, 2, (r, len(rows)), generator=generator).float() * 2 - 1
        out += signs @ rows
        total += signs.sum(1)
        mean += rows.sum(0)
    return (out - total[:, None] * (mean / vocabulary)) / r**0.5


def sketch(
    weights: Weights,
    neurons: Sequence[tuple[int, int]],
    mapping: Tensor,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """[n, r] float32 of unit length, for (layer, index) pairs: what their logits are like. Zero columns stay zero."""
    out = torch.empty(len(neurons), len(mapping))
    for layer in sorted({layer for layer, _ in neurons}):
        at = torch.tensor([i for i, (where, _) in enumerate(neurons) if where == layer])
        down = weights.down(layer)
        for part in at.split(_BLOCK):
            columns = down[[neurons[i][1] for i in part.tolist()]].float()
            out[part] = (columns if norm is None else norm(columns)) @ mapping.T
    return out / out.norm(dim=1, keepdim=True).clamp_min(1e-20)


def k_means(points: Tensor, k: int, *, seed: int = 0, restarts: int = 4, rounds: int = 100) -> Clusters:
    """Spherical k-means of points [n, r] of unit length: the best of `restarts`, each begun by k-means++.

    Sources: Dhillon and Modha 2001; Arthur and Vassilvitskii 2007. A cluster that has lost all its points begins anew
    at the point that is farthest from its centre.
    """
    if not 1 <= k <= len(points):
        raise InvalidRequest(f"must be 1 to {len(points)}, the number of neurons", "clusters")
    generator = torch.Generator().manual_seed(seed)
    return max((_run(points, k, generator, rounds) for _ in range(restarts)), key=lambda found: found.closeness)


def _run(points: Tensor, k: int, generator: torch.Generator, rounds: int) -> Clusters:
    centres, member = _begin(points, k, generator), torch.full((len(points),), -1)
    for _ in range(rounds):
        cosine, assigned = _nearest(points, centres)
        empty = (torch.bincount(assigned, minlength=k) == 0).nonzero().flatten()
        if len(empty):
            assigned[cosine.argsort()[: len(empty)]] = empty
        if torch.equal(assigned, member):
            break
        member = assigned
        sums = torch.zeros_like(centres).index_add_(0, member, points)
        centres = sums / sums.norm(dim=1, keepdim=True).clamp_min(1e-20)
    return Clusters(member, centres, float((points * centres[member]).sum(1).mean()))


def _begin(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further centre is a point drawn in proportion to its squared distance from the nearest one."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    far = torch.full((len(points),), torch.inf)
    while len(chosen) < k:
        far = torch.minimum(far, (2 - 2 * points @ points[chosen[-1]]).clamp_min(0))
        far[chosen] = 0
        weight = far.double() if far.sum() > 0 else torch.ones(len(points), dtype=torch.float64)
        mark = torch.rand(1, generator=generator, dtype=torch.float64) * weight.sum()
        chosen.append(min(int(torch.searchsorted(weight.cumsum(0), mark, right=True)), len(points) - 1))
    return points[chosen]


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine with the nearest centre, and which it is, for each point."""
    found = [(part @ centres.T).max(dim=1) for part in points.split(_BLOCK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def top_words(labels: NeuronLabels, neurons: Sequence[tuple[int, int]], count: int = 10) -> list[str]:
    """What tells the neurons apart: the tokens that they have more of, in z-scores, than all labelled neurons."""
    rows = torch.tensor([labels.row(neuron) for neuron in neurons])
    score = torch.zeros(2, len(labels.vocabulary))  # of these neurons, and of all
    for out, chosen in zip(score, (rows, slice(None)), strict=True):
        out.index_add_(0, labels.projection.tokens[chosen].long().flatten(), labels.z[chosen].flatten())
    values, found = (score[0] / len(rows) - score[1] / len(labels.z)).topk(min(count, len(labels.vocabulary)))
    return [labels.vocabulary[i] for value, i in zip(values.tolist(), found.tolist(), strict=True) if value > 0]
