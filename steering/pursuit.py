"""Matching pursuit: what is left of a token gives up, again and again, the feature that it has most of."""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.steering import exact
from steersman.steering.assets import DictionaryMeta
from steersman.steering.exact import Products


def pursue(rest: Tensor, atoms: Products, meta: DictionaryMeta) -> Tensor:
    """[n, m] float32, the activations for ``rest`` [n, d] float32, SAELens's and each row's own to the bit.

    A token ends when its support or what is left of it stops changing, or after `max_iterations`.
    """
    rest = rest.clone()
    out = rest.new_zeros(len(rest), len(atoms.rows))
    alive = torch.arange(len(rest), device=rest.device)
    for _ in range(meta.max_iterations or rest.shape[1]):
        if not len(alive):
            break
        own = rest[alive]
        best = _best(own, atoms)
        taken = atoms.rows[best].float()
        value = exact.pairs(own, taken).relu().float()
        known = out[alive, best] != 0
        out[alive, best] += value
        rest[alive] = own = own - value[:, None] * taken
        ended = torch.zeros_like(known)
        if meta.stop_on_duplicate_support:
            ended |= known | (value == 0)
        if meta.residual_threshold > 0:
            ended |= exact.pairs(own, own).sqrt() < meta.residual_threshold
        alive = alive[~ended]
    return out


def _best(rest: Tensor, atoms: Products) -> Tensor:
    """[n] the feature of the largest product with each row; of equal ones the first."""
    found, bound = atoms.fast(rest)
    largest, best = found.max(dim=1)
    close = found >= (largest - 2 * bound)[:, None]
    for row in torch.nonzero((close.sum(dim=1) > 1) & (largest + bound > 0) & (bound > 0))[:, 0].tolist():
        among = torch.nonzero(close[row])[:, 0]
        best[row] = among[atoms.dots(rest[row : row + 1], among)[0].argmax()]
    return best
