"""What neurons write, in words: W_down's columns through the unembedding, block by block.

For a neuron with the column w the logits are U·w, without the final norm, as Geva et al. 2022 (arXiv 2203.14680) and,
for robot policies, Haon et al. 2025 (arXiv 2509.00328) take them. Kept are each neuron's k largest, and of the whole
distribution its mean, standard deviation and log-sum-exp, so that a logit can be read as z-score or as probability.

Memory: a layer's W_down (as stored and in float32), a block of U and a block of logits, of which the last two stay
within `memory` bytes whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest, NonFinite

MEMORY = 1 << 28  # bytes
_COPIES = 3  # of a block of logits while its largest and its sums are taken
_MAX_NEURONS = 16384  # at once


class Weights(Protocol):
    """Where weights come from; :class:`steersman.steering.neurons_checkpoint.Checkpoint` is one."""

    d_model: int

    def widths(self, layers: tuple[int, ...] | None = None) -> dict[int, int]: ...

    def down(self, layer: int) -> Tensor: ...

    def unembedding(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Projection:
    """The logits of n neurons: by layer in order, within a layer by index."""

    tokens: Tensor  # [n, k] int32, the largest logit first
    logits: Tensor  # [n, k] float32
    mean: Tensor  # [n] float32, over the vocabulary
    deviation: Tensor  # [n] float32
    logsumexp: Tensor  # [n] float32

    @staticmethod
    def join(parts: list[Projection]) -> Projection:
        return Projection(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Projection)))


def project(
    weights: Weights,
    vocabulary: int,
    *,
    top_k: int = 10,
    layers: tuple[int, ...] | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    memory: int = MEMORY,
    device: str = "cpu",
    advance: Callable[[int], object] = lambda neurons: None,
) -> Projection:
    """Every neuron of `layers` (default: all) onto the first `vocabulary` tokens.

    `norm` is applied to the columns [n, d_model] first. `advance` is told how many neurons are done.
    """
    if not 1 <= top_k <= vocabulary:
        raise InvalidRequest(f"must be 1 to {vocabulary}, the size of the vocabulary", "top_k")
    parts = []
    for layer, width in weights.widths(layers).items():
        down = weights.down(layer)
        for start in range(0, width, _MAX_NEURONS):
            columns = down[start : start + _MAX_NEURONS].to(device).float().contiguous()
            if not torch.isfinite(columns).all():
                raise NonFinite(f"W_down of layer {layer} holds NaN or infinity", "model")
            columns = columns if norm is None else norm(columns)
            parts.append(_project(weights, columns, vocabulary, top_k, memory, advance))
    return Projection.join(parts)


def _project(
    weights: Weights, columns: Tensor, vocabulary: int, top_k: int, memory: int, advance: Callable[[int], object]
) -> Projection:
    """Columns [n, d_model] float32, by blocks of the vocabulary."""
    n, step = len(columns), max(1, memory // (4 * (weights.d_model + _COPIES * len(columns))))
    tokens = torch.empty(n, 0, dtype=torch.int32, device=columns.device)
    logits = torch.empty(n, 0, device=columns.device)
    total = torch.full((n,), -torch.inf, device=columns.device)
    sums = torch.zeros(2, n, dtype=torch.float64, device=columns.device)  # of logits, and of their squares
    done = 0
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        block = columns @ weights.unembedding(start, stop).to(columns.device).T  # [n, stop − start]
        values, found = block.topk(min(top_k, stop - start), dim=1)
        logits = torch.cat([logits, values], dim=1)
        tokens = torch.cat([tokens, (found + start).int()], dim=1)
        logits, order = logits.topk(min(top_k, logits.shape[1]), dim=1)
        tokens = tokens.gather(1, order)
        total = torch.logaddexp(total, block.logsumexp(dim=1))
        sums[0] += block.sum(dim=1, dtype=torch.float64)
        sums[1] += block.square_().sum(dim=1, dtype=torch.float64)
        advance(n * stop // vocabulary - done)
        done = n * stop // vocabulary
    if not torch.isfinite(total).all():
        raise NonFinite("the unembedding holds NaN or infinity", "model")
    mean = sums[0] / vocabulary
    deviation = (sums[1] / vocabulary - mean.square()).clamp_min(0).sqrt()
    return Projection(tokens.cpu(), logits.cpu(), mean.float().cpu(), deviation.float().cpu(), total.cpu())
