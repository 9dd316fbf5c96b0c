"""From a request's ``steering`` object to a plan: profiles expanded, assets looked up, every number checked."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from steersman.kernels.program import NEVER, Block
from steersman.steering import dictionaries, lower, patches, spec
from steersman.steering.assets import Asset, DictionaryMeta
from steersman.steering.directions import Directions, Library, chosen_layers
from steersman.steering.encoders import FeatureEncode
from steersman.steering.errors import (
    GateOrder,
    InvalidRequest,
    SiteUnsupported,
    TooManyInterventions,
    WidthMismatch,
    located,
)
from steersman.steering.plan import Activation, GateRead, Injection, Place, Plan, ProbeRead, Restoration, Step
from steersman.steering.recipes import Recipe
from steersman.steering.references import key_of, references
from steersman.steering.sites import Site

_TOKENS: TypeAdapter[spec.Tokens] = TypeAdapter(spec.Tokens)
Make = Callable[..., Block]


class Resolver:
    """Builds plans for one served model, and remembers the most recent ones by what was asked.

    A stored asset's version never changes, so a remembered plan is good for as long as the names in the request
    still mean the same versions, which is looked up every time.
    """

    def __init__(self, library: Library, capacity: int = 512, capacity_bytes: int = 2**28) -> None:
        self.library = library
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = Lock()

    def resolve(self, steering: spec.Steering, default: spec.Steering | None = None) -> Plan:
        """The plan of ``steering`` after the server's ``default`` profile, unless the request leaves that out."""
        parts = self._expand(steering, default)
        assets = self._assets(parts)
        key = key_of(parts, assets)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = _Builder(self.library.pinned(assets)).build(parts)
        with self._lock:
            plan = self._plans.setdefault(key, plan)  # another thread may have been faster
            size = sum(p.nbytes for p in self._plans.values())
            while len(self._plans) > self.capacity or size > self.capacity_bytes:
                size -= self._plans.popitem(last=False)[1].nbytes
        return plan

    def names(self, steering: spec.Steering) -> set[str]:
        """References to every stored asset that ``steering`` needs, its profile and what that names included."""
        named = {ref for _, part in self._expand(steering, None) for _, ref in references(part)}
        return named | ({steering.profile} if steering.profile else set())

    def _expand(self, steering: spec.Steering, default: spec.Steering | None) -> list[tuple[str, spec.Steering]]:
        """(path, steering object) in the order in which they apply: default, profile, the request itself."""
        parts: list[tuple[str, spec.Steering]] = []
        if default is not None and steering.default:
            parts += self._with_profile("default", default)
        return parts + self._with_profile("steering", steering)

    def _with_profile(self, path: str, steering: spec.Steering) -> list[tuple[str, spec.Steering]]:
        if steering.profile is None:
            return [(path, steering)]
        with located(f"{path}.profile"):
            stored = self.library.profile(steering.profile)
            inner = spec.parse(stored.steering, "")
            if inner.profile is not None:
                raise InvalidRequest(f"profile {steering.profile} names another profile; profiles do not nest")
        return [(f"{path}.profile", inner), (path, steering)]

    def _assets(self, parts: Iterable[tuple[str, spec.Steering]]) -> dict[str, Asset]:
        """What the named assets mean now; unknown ones are reported where they are used."""
        out: dict[str, Asset] = {}
        for path, part in parts:
            for field, ref in references(part):
                if ref not in out:
                    with located(f"{path}.{field}"):
                        out[ref] = self.library.assets.get(ref)
            for i, given in enumerate(part.interventions):
                if isinstance(given, spec.Patch):
                    with located(f"{path}.interventions[{i}].capture"):
                        self.library.capture(given.capture)  # a remembered plan may be of one that is gone by now
        return out


class _Builder:
    """One plan in the making."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.model = library.model
        self.steps: list[Step] = []
        self.blocks: defaultdict[Place, list[Block]] = defaultdict(list)
        self.injections: list[Injection] = []
        self.restorations: list[Restoration] = []
        self.gates: list[GateRead] = []
        self.probes: list[ProbeRead] = []
        self.probe_names: list[str] = []
        self.warnings: list[str] = []

    def build(self, parts: list[tuple[str, spec.Steering]]) -> Plan:
        total = sum(len(p.interventions) for _, p in parts)
        if total > spec.MAX_INTERVENTIONS:
            raise TooManyInterventions(
                f"{total} interventions with those of the profiles; at most {spec.MAX_INTERVENTIONS}",
                "steering.interventions",
            )
        for path, part in parts:
            for i, intervention in enumerate(part.interventions):
                where = f"{path}.interventions[{i}]"
                with located(where):
                    self._intervention(intervention, where)
            for i, probe in enumerate(part.probes):
                with located(f"{path}.probes[{i}]"):
                    self._probe(probe)
        return Plan(
            steps=tuple(self.steps),
            blocks={place: tuple(blocks) for place, blocks in self.blocks.items()},
            injections=tuple(self.injections),
            restorations=tuple(self.restorations),
            gates=tuple(self.gates),
            probes=tuple(self.probes),
            probe_names=tuple(self.probe_names),
            warnings=tuple(self.warnings),
        )

    def _intervention(self, given: Any, path: str) -> None:
        if isinstance(given, spec.Inject):
            self._inject(given, path)
            return
        if isinstance(given, spec.Patch):
            with located("capture"):
                found = self.library.capture(given.capture)
            source = patches.Source(found, given)
            if not source.single:
                self._restore(given, source, path)
                return
            site, layers, assets, make = self._patch(given, source)
            selector = source.tokens
        else:
            site, layers, assets, tokens, make = getattr(self, f"_{given.op}")(given)
            selector = _tokens(given, tokens)
        places = self._places(site, layers)
        flags: dict[str, Any] = {"preserve_norm": given.preserve_norm}
        if given.when is not None:
            with located("when"):
                flags["gate"] = self._gate(given.when, [place for place, _ in places])
        for place, width in places:
            self.blocks[place].append(make(len(self.steps), place.layer, width, flags))
        gate = flags.get("gate", -1)
        self.steps.append(Step(given.op, tuple(layers), site, selector, tuple(assets), path, gate))

    def _places(self, site: Site, layers: Iterable[int]) -> list[tuple[Place, int]]:
        """The places, and how wide each is."""
        places = []
        for layer in layers:
            with located(self._blame(site, "layers")):
                width = self.model.width(site, layer)
            places.append((Place(layer, site), width))
        return places

    def _patch(self, given: spec.Patch, source: patches.Source) -> tuple[Any, ...]:
        """Of a single row."""
        layers, names, basis = self._patched(given, source)

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            with located("capture"):
                (row,) = source.rows(layer, width)
            with located("basis"):
                return lower.patch(i, row, None if basis is None else basis.at(layer, width), **flags)

        return source.site, layers, names, make

    def _patched(
        self, given: spec.Patch, source: patches.Source
    ) -> tuple[tuple[int, ...], list[str], Directions | None]:
        layers = self._layers(given.layers, source.layers, "capture")
        with located("basis"):
            basis = None if given.basis is None else self.library.vector(given.basis)
        return layers, [f"capture@{given.capture}", *([] if basis is None else [basis.name])], basis

    def _restore(self, given: spec.Patch, source: patches.Source, path: str) -> None:
        """A patch of several rows."""
        layers, names, basis = self._patched(given, source)
        places, index, gate = self._places(source.site, layers), len(self.steps), -1
        if given.when is not None:
            with located("when"):
                gate = self._gate(given.when, [place for place, _ in places])
        for place, width in places:
            with located("capture"):
                rows = source.rows(place.layer, width)
            with located("basis"):
                part = None if basis is None else lower.orthonormal(basis.at(place.layer, width))
            self.restorations.append(Restoration(index, place, source.positions, rows, part, given.preserve_norm, gate))
        self.steps.append(Step(given.op, tuple(layers), source.site, source.tokens, tuple(names), path, gate))

    def _inject(self, given: spec.Inject, path: str) -> None:
        name, recipe, scale, tokens = self._recipe(given.recipe)
        layers = self._layers(given.layers, recipe.receiving, "recipe")
        gate, index = -1, len(self.steps)
        with located("recipe"):
            made = lower.inject(index, recipe, layers, scale if given.scale is None else given.scale)
            for place in {place for i in made for place in (*i.read, *i.written)}:
                self.model.width(place.site, place.layer)
        if given.when is not None:
            with located("when"):
                gate = self._gate(given.when, sorted((p for i in made for p in i.written), key=lambda p: p.order))
        self.injections += [replace(i, gate=gate) for i in made]
        by_site = tuple((i.site, i.targets) for i in made)
        layers = tuple(sorted(layers))
        self.steps.append(Step(given.op, layers, None, _tokens(given, tokens), (name,), path, gate, by_site))

    def _recipe(self, given: str | spec.InlineRecipe) -> tuple[str, Recipe, float, object]:
        """Its name, the recipe, its recommended scale and its default tokens."""
        with located("recipe"):
            if isinstance(given, str):
                asset, meta = self.library.recipe(given)
                return asset.ref, meta, meta.recommended.scale if meta.recommended else 1.0, meta.tokens
            if (count := len(given.inline.rr_attn)) != self.model.n_layers:
                raise InvalidRequest(
                    f"has {count} recovery rates; the model has {self.model.n_layers} layers", "inline.rr_attn"
                )
            return "inline", given.inline, 1.0, None

    def _directed(self, given: spec.Directed) -> tuple[Directions, Site, tuple[int, ...]]:
        """The directions of a vector op, the site and the layers at which it works."""
        with located("vector"):
            found = self.library.vector(given.vector)
        if given.from_layer is not None:
            with located("from_layer"):
                vectors = found.at(given.from_layer, found.vectors.shape[-1])[None]
            found = Directions(found.name, found.site, (), vectors, found.scale, found.tokens)
            if given.layers is None:
                raise InvalidRequest("from_layer needs layers", "layers")
        return found, given.site or found.site or Site.RESID_POST, self._layers(given.layers, found.layers, "vector")

    def _layers(
        self, layers: spec.Layers | None, has: tuple[int, ...], owner: str, field: str = "layers"
    ) -> tuple[int, ...]:
        """The layers that ``field`` means. ``owner``: the field that says which layers there are."""
        with located(owner if has and layers in (None, "all") else field):
            return chosen_layers(layers, has, self.model.n_layers)

    def _blame(self, site: Site, layers: str) -> str:
        """The field that is wrong when a site does not exist at a layer."""
        return layers if self.model.sites.get(site) else "site"

    def _add(self, given: spec.Add) -> tuple[Any, ...]:
        found, site, layers = self._directed(given)
        scale = given.scale if given.scale is not None else (found.scale if found.scale is not None else 1.0)

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            with located("vector"):
                return lower.add(i, found.one(layer, width), scale, given.relative == "norm", **flags)

        return site, layers, [found.name], found.tokens, make

    def _ablate(self, given: spec.Ablate) -> tuple[Any, ...]:
        return self._along(given, lambda i, v, flags: lower.ablate(i, v, given.strength, **flags), subspace=True)

    def _clamp(self, given: spec.Clamp) -> tuple[Any, ...]:
        low, high = (given.min, given.max) if given.value is None else (given.value, given.value)
        return self._along(given, lambda i, v, flags: lower.clamp(i, v, low, high, **flags))

    def _multiply(self, given: spec.Multiply) -> tuple[Any, ...]:
        return self._along(given, lambda i, v, flags: lower.multiply(i, v, given.factor, **flags))

    def _along(
        self, given: spec.Directed, block: Callable[[int, torch.Tensor, dict[str, Any]], Block], subspace: bool = False
    ) -> tuple[Any, ...]:
        found, site, layers = self._directed(given)

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            with located("vector"):
                return block(i, found.at(layer, width) if subspace else found.one(layer, width), flags)

        return site, layers, [found.name], found.tokens, make

    def _rotate(self, given: spec.Rotate) -> tuple[Any, ...]:
        found, site, layers = self._directed(given)
        with located("toward"):
            toward = self.library.vector(given.toward)

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            with located("vector"):
                v = found.one(layer, width)
            with located("toward"):
                return lower.rotate(i, v, toward.one(layer, width), given.degrees, **flags)

        return site, layers, [found.name, toward.name], found.tokens, make

    def _feature(self, given: spec.Feature) -> tuple[Any, ...]:
        with located("dictionary"):
            asset, meta = self.library.dictionary(given.dictionary)
        with located("index"):
            dictionaries.check_indices(asset, given.indices)
        with located("dictionary"):
            write = dictionaries.writes(asset, given.indices)
        site, layers = self._of_dictionary(asset, meta, given.site, given.layers)
        reads, encode = None, None
        if given.mode != "add" or given.only_if_active:
            with located("only_if_active" if given.mode == "add" else "mode"):
                if dictionaries.takes_encode(meta):
                    encode = FeatureEncode.of(asset, given.indices)
                else:
                    reads = dictionaries.reads(asset, given.indices)
        relative = dictionaries.writes_by_norm(meta)

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            with located("dictionary"):
                _as_wide(asset, write.shape[1], width, layer)
            return lower.feature(
                i, write, reads, given.mode, given.values, given.only_if_active, relative, encode, **flags
            )

        return site, layers, [asset.ref], meta.tokens, make

    def _of_dictionary(
        self, asset: Asset, meta: DictionaryMeta, site: Site | None, layers: spec.Layers | None, field: str = "layers"
    ) -> tuple[Site, tuple[int, ...]]:
        """Where a dictionary works: nowhere but where it was made."""
        if site not in (None, meta.site):
            raise InvalidRequest(f"{asset.ref} belongs to {meta.site.value}; leave site out", "site")
        return meta.site, self._layers(layers, (meta.layer,), "dictionary", field)

    def _read_feature(
        self, ref: str, index: int, site: Site | None, layers: spec.Layers | None, field: str = "layers"
    ) -> tuple[str, Place, dict[str, Any]]:
        """A feature that is only read: its name, its place and how it is read there."""
        with located("dictionary"):
            asset, meta = self.library.dictionary(ref)
        site, (layer,) = self._of_dictionary(asset, meta, site, layers, field)
        with located("index"):
            dictionaries.check_indices(asset, [index])
        with located("dictionary"):
            width = self.model.width(site, layer)
            if dictionaries.takes_encode(meta):
                encode = FeatureEncode.of(asset, [index])
                _as_wide(asset, encode.width, width, layer)
                return f"{asset.ref}#{index}", Place(layer, site), {"direction": None, "encode": encode}
            reads = dictionaries.reads(asset, [index])
            _as_wide(asset, reads.direction.shape[1], width, layer)
        threshold = float(reads.threshold[0])
        activation = Activation(float(reads.bias[0]), None if threshold == NEVER else threshold)
        return f"{asset.ref}#{index}", Place(layer, site), {"direction": reads.direction[0], "activation": activation}

    def _neurons(self, given: spec.Neurons) -> tuple[Any, ...]:
        tokens: object = None
        if isinstance(given.neurons, str):
            with located("neurons"):
                name, pairs, tokens = self.library.neurons(given.neurons)
        else:
            name, pairs = "inline", tuple(given.neurons.inline)
        site = given.site or Site.MLP_POST
        by_layer = _by_layer(pairs)
        layers = self._layers(given.layers, tuple(sorted(by_layer)), "neurons")

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            with located("neurons"):
                _inside(by_layer[layer], width, "neuron", layer)
            return lower.neurons(i, torch.tensor(by_layer[layer]), width, given.mode, given.value, **flags)

        return site, layers, [name], tokens, make

    def _heads(self, given: spec.Heads) -> tuple[Any, ...]:
        by_layer = _by_layer(given.heads)
        layers = self._layers(given.layers, tuple(sorted(by_layer)), "heads")
        site = given.site or Site.ATTN_Z
        if site is not Site.ATTN_Z:
            raise InvalidRequest("heads are edited at attn_z", "site")
        found = None
        if given.vector is not None:
            with located("vector"):
                found = self.library.vector(given.vector)

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            d_head, rest = divmod(width, self.model.n_heads)  # not every layer's heads need be as wide
            with located("heads"):
                _inside(by_layer[layer], self.model.n_heads, "head", layer)
                if rest:
                    raise SiteUnsupported(f"layer {layer} does not have {self.model.n_heads} heads of the same width")
            if found is None:
                assert given.factor is not None
                return lower.heads_factor(i, by_layer[layer], d_head, width, given.factor, **flags)
            scale = given.scale if given.scale is not None else (found.scale if found.scale is not None else 1.0)
            with located("vector"):
                return lower.heads_add(i, by_layer[layer], d_head, found.one(layer, width), scale, **flags)

        return site, layers, [found.name] if found else [], found.tokens if found else None, make

    def _affine(self, given: spec.Affine) -> tuple[Any, ...]:
        with located("affine"):
            asset, meta = self.library.affine(given.affine)
        layers = self._layers(given.layers, meta.layers, "affine")

        def make(i: int, layer: int, width: int, flags: dict[str, Any]) -> Block:
            row = meta.layers.index(layer)
            r, a, b = (asset.tensors[name][row].float() for name in ("R", "A", "b"))
            with located("affine"):
                if r.shape[1] != width:
                    raise WidthMismatch(f"{asset.ref} is {r.shape[1]} wide, the site is {width} wide at layer {layer}")
            return lower.affine(i, r, a, b, given.strength, **flags)

        return given.site or meta.site, layers, [asset.ref], meta.tokens, make

    def _gate(self, given: spec.Gate, places: list[Place]) -> int:
        measure = given.measure
        if given.dictionary is not None:
            assert given.index is not None
            found = self._read_feature(given.dictionary, given.index, given.site, given.layer, "layer")
            measure, (_, place, read) = "feature", found
        else:
            assert given.vector is not None
            assert given.layer is not None
            with located("vector"):
                vector = self.library.vector(given.vector)
            place = Place(given.layer, given.site or vector.site or Site.RESID_POST)
            with located(self._blame(place.site, "layer")):
                width = self.model.width(place.site, place.layer)
            with located("vector"):
                read = {"direction": lower.unit(vector.one(place.layer, width))[0]}
        late = [p for p in places if p.order <= place.order]
        if given.over == "token" and late:
            raise GateOrder(
                f"reads layer {place.layer} {place.site.value}, which is not before the edit at "
                f"layer {late[0].layer} {late[0].site.value}; a token gate must read an earlier place",
                "layer",
            )
        self.gates.append(
            GateRead(
                place, **read, measure=measure,
                above=given.above, below=given.below, over=given.over, hold=given.hold,
            )
        )  # fmt: skip
        return len(self.gates) - 1

    def _probe(self, given: spec.Probe) -> None:
        if given.dictionary is not None:
            assert given.index is not None
            name, place, read = self._read_feature(given.dictionary, given.index, given.site, given.layers)
            self.probes.append(ProbeRead(len(self.probe_names), place, **read))
            self.probe_names.append(name)
            return
        assert given.vector is not None
        with located("vector"):
            found = self.library.vector(given.vector)
        site = given.site or found.site or Site.RESID_POST
        for layer in self._layers(given.layers, found.layers, "vector"):
            with located(self._blame(site, "layers")):
                width = self.model.width(site, layer)
            with located("vector"):
                direction = lower.unit(found.one(layer, width))[0]
            self.probes.append(ProbeRead(len(self.probe_names), Place(layer, site), direction))
        self.probe_names.append(found.name)


def _tokens(given: spec.Selecting, default: object) -> spec.Tokens:
    """What an intervention states, else its asset's ``default``, else the op's own."""
    return given.tokens if "tokens" in given.model_fields_set or default is None else _asset_tokens(default)


def _asset_tokens(value: object) -> spec.Tokens:
    try:
        return _TOKENS.validate_json(json.dumps(value))
    except ValidationError:
        raise InvalidRequest(
            "the asset's default tokens are not a selector; name tokens in the request", "tokens"
        ) from None


def _by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Indices by layer, each once: naming a unit twice does not edit it twice."""
    out: defaultdict[int, list[int]] = defaultdict(list)
    for layer, index in dict.fromkeys(pairs):
        out[layer].append(index)
    return dict(out)


def _as_wide(asset: Asset, own: int, width: int, layer: int) -> None:
    if own != width:
        raise WidthMismatch(f"{asset.ref} is {own} wide, the site is {width} wide at layer {layer}")


def _inside(indices: list[int], count: int, what: str, layer: int) -> None:
    if max(indices) >= count:
        raise InvalidRequest(f"{what} {max(indices)} does not exist: layer {layer} has {count}")
