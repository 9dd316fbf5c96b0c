"""What may be wrong with directions before they are used. Pure functions: numbers first, then the warnings they give.

Nothing here forbids an edit. Each warning says what was measured, what would be usual, and what to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest, NonFinite, WidthMismatch

_RANK_TOLERANCE = 1e-6  # singular values of a reader below this share of the largest read nothing


@dataclass(frozen=True)
class Finding:
    """One finding. `code` is stable; `value` is the number that was measured."""

    code: str  # "null_space" | "overlap" | "large_edit"
    message: str
    value: float


@dataclass(frozen=True)
class NullShare:
    """How much of each direction the next linear map does not see."""

    share: Tensor  # [k] ‖v_null‖/‖v‖, 0 to 1
    chance: float  # the same for a random direction, √(1 − rank/width): not small where the map narrows


def null_share(directions: Tensor, reader: Tensor) -> NullShare:
    """v = v_null + v_row, where W·v_null = 0 and v_row lies in the row space of W, the map that reads the site.

    directions: [k, n]. reader: W [m, n] as `torch.nn.Linear` keeps it, e.g. `down_proj.weight` for directions at
    `mlp_post`. A direction found by its correlation may lie mostly in v_null: patching along it then works by waking
    v_row, a part that was dormant, and shows nothing about what the model does (Makelov et al. 2023, arXiv 2311.17030).
    """
    v, basis = _units(directions), _row_space(reader, directions)
    null = (v - v @ basis.T @ basis).norm(dim=1).clamp(max=1)
    return NullShare(null.float(), (1 - len(basis) / reader.shape[1]) ** 0.5)


def split(directions: Tensor, reader: Tensor) -> tuple[Tensor, Tensor]:
    """v_null and v_row of each direction, [k, n] float32; patching along each alone shows which of them acts."""
    v, basis = directions.double(), _row_space(reader, directions)
    row = v @ basis.T @ basis
    return (v - row).float(), row.float()


def gram(directions: Tensor) -> Tensor:
    """Cosines between directions [k, d]: [k, k] float32, ones on the diagonal."""
    v = _units(directions)
    return (v @ v.T).clamp(-1, 1).float()


def edit_ratio(edits: Tensor, stream: Tensor) -> Tensor:
    """‖Δx‖/‖x‖ of edits [n, d] of the stream [n, d], or of one edit [d] at every token: [n] float32."""
    if stream.dim() != 2 or edits.shape not in (stream.shape, stream.shape[1:]):
        shapes = f"{[*edits.shape]} and {[*stream.shape]}"
        raise WidthMismatch(f"edits and stream are {shapes}; wanted: [n, d] or [d], and [n, d]")
    size = stream.double().norm(dim=1)
    if not (size > 0).all():
        raise InvalidRequest("the stream is zero at some token")
    return (edits.double().norm(dim=-1) / size).float()


def lint_null_space(names: Sequence[str], directions: Tensor, reader: Tensor, slack: float = 0.5) -> list[Finding]:
    """Warns of directions of whose square the reader sees less than `slack` times what it sees of a random one's."""
    found = null_share(directions, reader)
    usual = 1 - found.chance**2
    out = []
    for name, share in zip(names, found.share.tolist(), strict=True):
        if 1 - share**2 < slack * usual:
            out.append(
                Finding(
                    "null_space",
                    f"{name}: {share:.3f} of its length lies where the next map reads nothing ({found.chance:.3f} "
                    "for a random direction); its effect may come from a part that is otherwise dormant. "
                    "Patch along its row part alone and compare",
                    share,
                )
            )
    return out


def lint_overlap(names: Sequence[str], directions: Tensor, above: float = 0.3) -> list[Finding]:
    """Warns of each pair whose cosine is above `above` in size: edits along them add up or cancel."""
    if len(names) != len(directions):
        raise InvalidRequest(f"{len(names)} names for {len(directions)} directions")
    cosines = gram(directions)
    out = []
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            cosine = float(cosines[i, j])
            if abs(cosine) > above:
                does = "strengthen" if cosine > 0 else "weaken"
                message = f"{names[i]} and {names[j]} have a cosine of {cosine:.3f}: together they {does} each other"
                out.append(Finding("overlap", message, cosine))
    return out


def lint_size(edit_norms: Mapping[int, float], stream_norms: Mapping[int, float], above: float = 1.0) -> list[Finding]:
    """Warns of layers where an edit is larger than `above` times the stream. Both are mean ‖·‖ by layer."""
    out = []
    for layer, edit in sorted(edit_norms.items()):
        if layer not in stream_norms or not stream_norms[layer] > 0:
            raise InvalidRequest(f"no norm of the stream is given for layer {layer}")
        ratio = edit / stream_norms[layer]
        if ratio > above:
            message = f"layer {layer}: the edit is {ratio:.2f} times as large as the stream there; lower its scale"
            out.append(Finding("large_edit", message, ratio))
    return out


def _units(directions: Tensor) -> Tensor:
    """[k, d] float64 of unit length."""
    if directions.dim() != 2 or not len(directions):
        raise InvalidRequest(f"directions are {[*directions.shape]}; wanted: [k, d]")
    if not torch.isfinite(directions).all():
        raise NonFinite("directions hold NaN or infinity")
    norms = directions.double().norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise InvalidRequest("a direction is zero")
    return directions.double() / norms


def _row_space(reader: Tensor, directions: Tensor) -> Tensor:
    """An orthonormal basis [rank, n] float64 of what the reader sees."""
    if reader.dim() != 2 or directions.dim() != 2 or reader.shape[1] != directions.shape[1]:
        shapes = f"{[*reader.shape]} and {[*directions.shape]}"
        raise WidthMismatch(f"reader and directions are {shapes}; wanted: [m, n] and [k, n]")
    _, s, basis = torch.linalg.svd(reader.double(), full_matrices=False)
    return basis[: int((s > s[0] * _RANK_TOLERANCE).sum())]
