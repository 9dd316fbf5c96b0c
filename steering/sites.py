"""Where a decoder layer can be read and edited, and how wide each place is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from steersman.steering.errors import LayerOutOfRange, SiteUnsupported


class Site(StrEnum):
    """TransformerLens's names, in the order in which a forward pass reaches them within one layer."""

    RESID_PRE = "resid_pre"  # the residual stream entering the block
    ATTN_Z = "attn_z"  # the heads' outputs, input of o_proj
    ATTN_OUT = "attn_out"  # what attention adds to the stream
    RESID_MID = "resid_mid"  # the stream between attention and MLP
    MLP_POST = "mlp_post"  # neuron activations, input of down_proj
    MLP_OUT = "mlp_out"  # what the MLP adds to the stream
    RESID_POST = "resid_post"  # the residual stream leaving the block

    __hash__ = str.__hash__  # Enum's own is a Python function, and hooks look places up at every layer


ORDER = {site: i for i, site in enumerate(Site)}


def before(layer: int, site: Site, other_layer: int, other_site: Site) -> bool:
    """Whether the first place is computed before the second one in a forward pass."""
    return (layer, ORDER[site]) < (other_layer, ORDER[other_site])


@dataclass(frozen=True)
class ModelInfo:
    """What the served model looks like to steering. Widths are the whole model's, not a shard's."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int  # width of one head's output (its value dimension)
    sites: Mapping[Site, Mapping[int, int]] = field(default_factory=dict)  # site -> layer -> width
    fingerprint: str | None = None

    def width(self, site: Site, layer: int) -> int:
        """The site's width at ``layer``; raises when the layer or the site does not exist here."""
        if not 0 <= layer < self.n_layers:
            raise LayerOutOfRange(f"layer {layer} does not exist: {self.name} has layers 0 to {self.n_layers - 1}")
        layers = self.sites.get(site, {})
        if layer not in layers:
            where = f"only at layers {sorted(layers)}" if layers else "at no layer"
            raise SiteUnsupported(f"{self.architecture} can be steered at {site.value} {where}, not at layer {layer}")
        return layers[layer]

    def to_json(self) -> dict[str, object]:
        """The model as JSON: ``sites`` maps each site to its layers, ``widths`` to its widths there."""
        return {
            "model": self.name,
            "architecture": self.architecture,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_head": self.d_head,
            "fingerprint": self.fingerprint,
            "sites": {s.value: sorted(layers) for s, layers in self.sites.items()},
            "widths": {s.value: {str(k): v for k, v in sorted(w.items())} for s, w in self.sites.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> ModelInfo:
        widths = data["widths"]
        assert isinstance(widths, Mapping)
        sites = {Site(s): {int(k): int(v) for k, v in w.items()} for s, w in widths.items()}
        return cls(
            name=str(data["model"]),
            architecture=str(data["architecture"]),
            n_layers=int(str(data["n_layers"])),
            d_model=int(str(data["d_model"])),
            n_heads=int(str(data["n_heads"])),
            d_head=int(str(data["d_head"])),
            sites=sites,
            fingerprint=None if data["fingerprint"] is None else str(data["fingerprint"]),
        )
