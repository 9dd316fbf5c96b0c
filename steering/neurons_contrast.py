"""Which neurons differ between two sets of observations: pure functions of their mean activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest, NonFinite

_FLOOR = 1e-6  # a neuron that varies by less than this share of its layer's size varies by rounding alone


@dataclass(frozen=True)
class Contrast:
    """Of n neurons, positive less negative."""

    difference: Tensor  # [n] float32, of the means
    effect: Tensor  # [n] float32, d'


def contrast(positive: Tensor, negative: Tensor) -> Contrast:
    """d' = (μ⁺ − μ⁻)/√((σ²⁺ + σ²⁻)/2) of activations [examples, n] of one layer; each side needs two examples.

    The variances are unbiased. Where both sides hardly vary, their deviation is taken as a millionth of the layer's
    root mean square, so that rounding makes no effect large and none is infinite.
    """
    for side, examples in (("positive", positive), ("negative", negative)):
        if examples.dim() != 2 or len(examples) < 2:
            raise InvalidRequest(f"needs at least two examples, is {[*examples.shape]}", side)
        if not torch.isfinite(examples).all():
            raise NonFinite("holds NaN or infinity", side)
    if positive.shape[1] != negative.shape[1]:
        raise InvalidRequest(f"{positive.shape[1]} and {negative.shape[1]} neurons: not of one layer", "negative")
    rows = torch.cat([positive, negative]).double()
    first = (torch.arange(len(rows)) < len(positive)).double()[None]
    difference, effect = _dealt(rows, first)
    return Contrast(difference[0].float(), effect[0].float())


def chance(
    positive: Mapping[int, Tensor], negative: Mapping[int, Tensor], *, rounds: int = 200, seed: int = 0
) -> float:
    """The |d'| that the largest of all neurons reaches by chance in one case of twenty.

    Examples are dealt to the two sides anew `rounds` times: the 0.95 quantile of the largest |d'| over all layers. A
    neuron above it differs although the best of so many was looked for (Westfall and Young 1993).
    """
    if not positive or positive.keys() != negative.keys():
        raise InvalidRequest("both sides need the same layers, at least one", "layers")
    generator = torch.Generator().manual_seed(seed)
    split, count = (len(next(iter(side.values()))) for side in (positive, negative))
    deal = torch.stack([torch.randperm(split + count, generator=generator) < split for _ in range(rounds)]).double()
    largest = torch.zeros(rounds, dtype=torch.float64)
    for layer in positive:
        _, effect = _dealt(torch.cat([positive[layer], negative[layer]]).double(), deal)
        largest = torch.maximum(largest, effect.abs().amax(1))
    return float(largest.quantile(0.95))


def _dealt(rows: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Differences and effects [deals, n] of rows [examples, n], where `first` [deals, examples] is 1 on one side."""
    size = rows.square().mean().sqrt()
    rows = rows - rows.mean(0)  # so that little is lost where squares are subtracted
    means, variances = [], []
    for side in (first, 1 - first):
        count = side.sum(1, keepdim=True)
        means.append(side @ rows / count)
        variances.append((side @ rows.square() - count * means[-1].square()) / (count - 1))
    deviation = ((variances[0] + variances[1]) / 2).clamp_min(0).sqrt()
    difference = means[0] - means[1]
    return difference, difference / deviation.clamp_min(max(_FLOOR * float(size), 1e-300))


def strongest(found: Mapping[int, Contrast], count: int, *, sign: int = 0) -> list[tuple[int, int]]:
    """The `count` neurons (layer, index) of the largest |d'|; `sign` 1 or -1: of those more or less active only."""
    pairs = [(layer, i) for layer, each in found.items() for i in range(len(each.effect))]
    effect = torch.cat([each.effect for each in found.values()])
    size = effect * sign if sign else effect.abs()
    order = size.argsort(descending=True, stable=True)
    return [pairs[i] for i in order[: max(count, 0)].tolist() if size[i] > 0]


def control_sets(
    chosen: Sequence[tuple[int, int]],
    widths: Mapping[int, int],
    count: int,
    *,
    seed: int = 0,
    besides: Collection[tuple[int, int]] = (),
) -> list[list[tuple[int, int]]]:
    """`count` random sets with as many neurons in each layer as `chosen`, and none of `chosen` or `besides`."""
    generator = torch.Generator().manual_seed(seed)
    wanted = Counter(layer for layer, _ in chosen)
    taken: dict[int, set[int]] = {layer: set() for layer in wanted}
    for layer, index in (*chosen, *besides):
        if layer in taken:
            taken[layer].add(index)
    for layer, number in wanted.items():
        if len(taken[layer]) + number > widths[layer]:
            raise InvalidRequest(f"layer {layer} has too few neurons besides the {number} chosen", "controls")
    out = []
    for _ in range(count):
        drawn: list[tuple[int, int]] = []
        for layer in sorted(wanted):
            free = torch.tensor([i for i in range(widths[layer]) if i not in taken[layer]])
            order = torch.randperm(len(free), generator=generator)[: wanted[layer]]
            drawn += [(layer, i) for i in sorted(free[order].tolist())]
        out.append(drawn)
    return out
