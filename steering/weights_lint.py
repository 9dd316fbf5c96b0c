"""The null-space linter on a stored asset and a checkpoint: how much of its directions W_down reads.

Only at `mlp_post`, which one map alone reads, and which narrows: at the other sites a direction is read by many. It
takes the singular vectors of one W_down for each layer: seconds for a small model, minutes for one of 7B.
"""

from __future__ import annotations

from torch import Tensor

from steersman.steering.assets import Asset, DictionaryMeta, VectorMeta
from steersman.steering.errors import ModelMismatch, WidthMismatch
from steersman.steering.lint import Finding, lint_null_space
from steersman.steering.neurons_checkpoint import Checkpoint
from steersman.steering.sites import Site

SHOWN = 5  # findings of one layer; the rest is counted


def applies(asset: Asset) -> bool:
    """Whether the asset has directions at the one site where this can be told."""
    return isinstance(asset.meta, VectorMeta | DictionaryMeta) and asset.meta.site is Site.MLP_POST


def lint_weights(asset: Asset, checkpoint: Checkpoint) -> list[Finding]:
    """Warnings on directions of which W_down sees little. ``ModelMismatch`` where the checkpoint is another model's."""
    made_for = asset.meta.model
    if (made_for.n_layers, made_for.d_model) != (checkpoint.n_layers, checkpoint.d_model):
        raise ModelMismatch(
            f"{asset.ref} was made for {made_for.n_layers} layers and d_model {made_for.d_model}; "
            f"{checkpoint.folder} has {checkpoint.n_layers} and {checkpoint.d_model}"
        )
    out: list[Finding] = []
    for layer, names, rows in _directions(asset):
        width = checkpoint.widths((layer,))[layer]
        if rows.shape[1] != width:
            raise WidthMismatch(f"{asset.ref} is {rows.shape[1]} wide, mlp_post is {width} wide at layer {layer}")
        kept = rows.norm(dim=1) > 0
        names = [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        found = lint_null_space(names, rows[kept], checkpoint.down(layer).T.float())
        found.sort(key=lambda f: -f.value)
        out += found[:SHOWN]
        if len(found) > SHOWN:
            more = f"layer {layer}: and {len(found) - SHOWN} more of {len(names)} directions"
            out.append(Finding("null_space", more, found[SHOWN].value))
    return out


def _directions(asset: Asset) -> list[tuple[int, list[str], Tensor]]:
    """(layer, a name for each, [k, d] float32)."""
    if isinstance(asset.meta, DictionaryMeta):
        rows = asset.tensors["decoder"].float()
        return [(asset.meta.layer, [f"feature {i}" for i in range(len(rows))], rows)]
    assert isinstance(asset.meta, VectorMeta)
    stacked = asset.tensors["vectors"].float()
    stacked = stacked if stacked.dim() == 3 else stacked[:, None]
    return [
        (
            layer,
            [f"layer {layer}" if len(rows) == 1 else f"layer {layer}, direction {i}" for i in range(len(rows))],
            rows,
        )
        for layer, rows in zip(asset.meta.layers, stacked, strict=True)
    ]
