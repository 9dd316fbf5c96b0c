"""Recipes of same-pass injection (IRI, arXiv 2511.05923): what the op `inject` does, and to which layers.

With a(l) the output of layer l's attention and m(l) that of its MLP, both as they are added to the stream,

    ã(l) = a(l) + λ_a·Σ_{k in sources, k < l} RR_k·a(k)    for l in targets, then rescaled to ‖a(l)‖

and the same for m with λ_m and rates of its own. RR_k is layer k's recovery rate by causal tracing. The method takes
the layers of the highest rates: the sources are the best 3, the targets the best 10, which is what a recipe gets that
names none. They are part of the recipe from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from steersman.steering.asset_fields import CommonMeta, Frozen, Index, Number, beyond, check_increasing
from steersman.steering.sites import Site

Component = Literal["attn", "mlp"]
COMPONENTS: Final[dict[Component, Site]] = {"attn": Site.ATTN_OUT, "mlp": Site.MLP_OUT}
SOURCES: Final = 3  # layers of the highest rates, where a recipe names none
TARGETS: Final = 10
_Some = Annotated[tuple[Index, ...], AfterValidator(check_increasing)]


class ByComponent(Frozen):
    """Layers of attention and of MLP outputs, which are ranked separately. A component without any is left alone."""

    attn: _Some = ()
    mlp: _Some = ()


def best(rates: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` layers of the highest rates, or all if there are fewer, ascending; of equal ones the earlier."""
    return tuple(sorted(sorted(range(len(rates)), key=lambda layer: (-rates[layer], layer))[:count]))


def _default_sources(data: dict[str, Any]) -> ByComponent:
    return ByComponent(attn=best(data["rr_attn"], SOURCES), mlp=best(data["rr_mlp"], SOURCES))


def _default_targets(data: dict[str, Any]) -> ByComponent:
    """None for a component that has no sources."""
    sources: ByComponent = data["sources"]
    return ByComponent(
        attn=best(data["rr_attn"], TARGETS if sources.attn else 0),
        mlp=best(data["rr_mlp"], TARGETS if sources.mlp else 0),
    )


class Part(NamedTuple):
    """What a recipe does to one component."""

    rates: tuple[float, ...]  # [n_layers]
    strength: float  # λ
    sources: tuple[int, ...]
    receiving: tuple[int, ...]  # the targets that have a source before them: the others stay as they are


class Recipe(Frozen):
    """What an asset of kind ``recipe`` and one given in a request have in common."""

    rr_attn: Annotated[tuple[Number, ...], Field(min_length=1)]  # [n_layers] rates of the attention outputs
    rr_mlp: tuple[Number, ...]  # [n_layers] rates of the MLP outputs
    sources: ByComponent = Field(default_factory=_default_sources, validate_default=True)
    targets: ByComponent = Field(default_factory=_default_targets, validate_default=True)
    lambda_a: Number
    lambda_m: Number

    @field_validator("rr_mlp")
    @classmethod
    def _as_many(cls, rates: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        wanted = len(info.data.get("rr_attn", rates))
        if len(rates) != wanted:
            raise ValueError(f"has {len(rates)} recovery rates, rr_attn {wanted}; both have one for each layer")
        return rates

    @field_validator("sources", "targets")
    @classmethod
    def _exist(cls, layers: ByComponent, info: ValidationInfo) -> ByComponent:
        count = len(info.data.get("rr_attn", ()))
        if count and (named := [*layers.attn, *layers.mlp]) and max(named) >= count:
            raise beyond(max(named), count)
        return layers

    @field_validator("targets")
    @classmethod
    def _receive(cls, targets: ByComponent, info: ValidationInfo) -> ByComponent:
        sources = info.data.get("sources")
        if sources is None:  # has been complained of
            return targets
        if not (sources.attn or sources.mlp):
            raise ValueError("without a source layer nothing is injected")
        for name in COMPONENTS:
            given, into = getattr(sources, name), getattr(targets, name)
            if bool(given) != bool(into):
                raise ValueError(f"{name} needs both sources and targets, or neither")
            if given and into[-1] <= given[0]:
                raise ValueError(
                    f"{name}: no target comes after layer {given[0]}, the first source, so nothing is injected"
                )
        return targets

    def component(self, name: Component) -> Part:
        rates, strength = (self.rr_attn, self.lambda_a) if name == "attn" else (self.rr_mlp, self.lambda_m)
        sources, targets = getattr(self.sources, name), getattr(self.targets, name)
        return Part(rates, strength, sources, tuple(layer for layer in targets if layer > sources[0]))

    @property
    def receiving(self) -> tuple[int, ...]:
        """The layers where something is injected, of either component, ascending."""
        return tuple(sorted({layer for name in COMPONENTS for layer in self.component(name).receiving}))


class RecipeMeta(Recipe, CommonMeta):
    """A stored recipe."""

    kind: Literal["recipe"]

    @property
    def edited_layers(self) -> tuple[int, ...]:
        sides = (self.sources.attn, self.sources.mlp, self.targets.attn, self.targets.mlp)
        return tuple(sorted({layer for side in sides for layer in side}))

    @field_validator("rr_attn")
    @classmethod
    def _for_every_layer(cls, rates: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        model = info.data.get("model")
        if model is not None and len(rates) != model.n_layers:
            raise ValueError(f"has {len(rates)} recovery rates; wanted: one for each of the model's {model.n_layers}")
        return rates
