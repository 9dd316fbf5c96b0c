"""The linters of `steering/lint.py` on a plan: what an answer to a dry run warns of. Nothing here forbids an edit.

* directions of two interventions at one place that overlap. Where either edit is more than a plain add, each also
  changes what the other reads. Interventions whose gates or tokens never meet are told all the same;
* edits larger than the stream. Those relative to ‖x‖ are so by themselves; of plain adds the size of the stream must be
  known, the others (clamp, set, ablate, ...) have a size that only the stream tells, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from steersman.kernels.program import Block
from steersman.steering.lint import Finding, gram
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site

MAX_DIRECTIONS = 2048  # at one place: their Gram matrix is made
OVERLAP = 0.3  # of the cosine's size
LARGE = 1.0  # of an edit beside the stream
_PARTS = (Site.ATTN_Z, Site.MLP_POST)  # no activation there is of the stream's size


@dataclass(frozen=True)
class Lint:
    findings: tuple[Finding, ...]
    crowded: tuple[Place, ...]  # too many directions to compare
    unsized: tuple[int, ...]  # interventions that add what is as large as it is, beside a stream of unknown size


def lint(plan: Plan, stream_norms: Mapping[int, float] | None = None) -> Lint:
    """``stream_norms``: a usual ‖x‖ leaving each layer, where it is known."""
    crowded = tuple(place for place, blocks in plan.blocks.items() if _count(blocks) > MAX_DIRECTIONS)
    overlaps = _overlaps(plan, crowded)
    sizes, unsized = _sizes(plan, stream_norms or {})
    return Lint((*overlaps, *sizes), crowded, unsized)


def unchecked(plan: Plan, found: Lint) -> list[str]:
    """In words, what was not looked at and what would do so."""
    out = [
        f"{plan.steps[i].path}: its size beside the stream, of which nothing usual is known (--steering-norm-baseline)"
        for i in found.unsized
    ]
    out += [
        f"layer {place.layer} {place.site.value}: overlaps among more than {MAX_DIRECTIONS} directions"
        for place in found.crowded
    ]
    out += [
        f"{step.path}: how much of its direction the next map reads (steersman assets verify NAME --weights FOLDER)"
        for step in plan.steps
        if step.site is Site.MLP_POST and step.op != "neurons"
    ]
    return out


def _count(blocks: tuple[Block, ...]) -> int:
    return sum(b.count for b in blocks if b.write.dense is not None)


def _overlaps(plan: Plan, crowded: tuple[Place, ...]) -> Iterator[Finding]:
    """One finding for each pair of interventions, of the place where they overlap most."""
    worst: dict[tuple[int, int], tuple[float, Place]] = {}
    for place, blocks in plan.blocks.items():
        if place in crowded or len(blocks) < 2:
            continue
        for pair, cosine in _cosines(blocks):
            if plan.steps[pair[0]].path == plan.steps[pair[1]].path:
                continue  # one intervention's, each for tokens of its own
            if abs(cosine) > max(OVERLAP, abs(worst.get(pair, (0.0, place))[0])):
                worst[pair] = cosine, place
    adds = {b.intervention for blocks in plan.blocks.values() for b in blocks if _is_add(b)}
    for (i, j), (cosine, place) in sorted(worst.items()):
        if {i, j} <= adds:
            does = "together they strengthen each other" if cosine > 0 else "together they weaken each other"
        else:
            does = "each changes what the other does"
        message = (
            f"{plan.steps[i].path} and {plan.steps[j].path} overlap: a cosine of {cosine:.3f} at layer {place.layer} "
            f"{place.site.value}; {does}"
        )
        yield Finding("overlap", message, cosine)


def _cosines(blocks: tuple[Block, ...]) -> Iterator[tuple[tuple[int, int], float]]:
    """((intervention, intervention), largest cosine of what they write), of blocks that write the same kind of rows."""
    dense = [(b.intervention, _directions(b)) for b in blocks if b.write.dense is not None]
    dense = [(i, rows) for i, rows in dense if len(rows)]
    if len(dense) > 1:
        cosines, start, spans = gram(torch.cat([rows for _, rows in dense])), 0, []
        for i, rows in dense:
            spans.append((i, slice(start, start + len(rows))))
            start += len(rows)
        for (i, a), (j, b) in combinations(spans, 2):
            part = cosines[a, b].flatten()
            yield (i, j), float(part[part.abs().argmax()])
    columns = [(b.intervention, b.write.columns) for b in blocks if b.write.columns is not None]
    for (i, one), (j, other) in combinations(columns, 2):
        yield (i, j), float(torch.isin(one, other).any())


def _directions(block: Block) -> Tensor:
    """[k, d] what a block writes along, less rows of zeros; of adds, towards where they go."""
    assert block.write.dense is not None
    rows = block.write.dense
    if _is_add(block):
        rows = rows * torch.where(block.offset < 0, -1.0, 1.0)[:, None]
    return rows[rows.norm(dim=1) > 0]


def _is_add(block: Block) -> bool:
    """Whether it adds the same direction at every token, if not as much of it."""
    return block.read is None and block.encode is None


def _sizes(plan: Plan, norms: Mapping[int, float]) -> tuple[list[Finding], tuple[int, ...]]:
    """One finding for each intervention, of the layer where it is largest; and those that could not be judged."""
    worst: dict[int, tuple[float, Place]] = {}
    unsized = set()
    for place, blocks in plan.blocks.items():
        for block in blocks:
            if not _is_add(block) or block.preserve_norm or place.site in _PARTS:
                continue
            size = float(block.constant.norm())
            if not block.relative:
                # What enters a layer left the one before; what a branch adds is judged beside what leaves the layer.
                norm = norms.get(place.layer - 1 if place.site is Site.RESID_PRE else place.layer, 0.0)
                if not norm > 0:
                    unsized.add(block.intervention)
                    continue
                size /= norm
            if size > max(LARGE, worst.get(block.intervention, (0.0, place))[0]):
                worst[block.intervention] = size, place
    found = [
        Finding(
            "large_edit",
            f"{plan.steps[i].path} is {size:.2f} times as large as the stream at layer {place.layer}; lower its scale",
            size,
        )
        for i, (size, place) in sorted(worst.items())
    ]
    return found, tuple(sorted(unsized))
