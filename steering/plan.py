"""A plan: all of a request's interventions and probes, resolved, checked and compiled.

It is what travels from the HTTP process to the engine's workers, once, as safetensors bytes, and is
identified by the SHA-256 of those bytes. It says nothing about any one prompt: which tokens a request
edits is its :class:`~steersman.steering.tokens.Selection`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save
from torch import Tensor

from steersman.kernels.program import Block, Reading, Rows
from steersman.steering.encoders import FeatureEncode
from steersman.steering.sites import ORDER, Site
from steersman.steering.spec import Tokens

_TOKENS: TypeAdapter[Tokens] = TypeAdapter(Tokens)
_VECTORS = ("bias", "threshold", "gain", "offset", "low", "high")
_FLAGS = ("relative", "only_if_active", "preserve_norm", "gate")


class Place(NamedTuple):
    """One site of one layer."""

    layer: int
    site: Site

    @property
    def name(self) -> str:
        """For messages."""
        return f"layer {self.layer} {self.site.value}"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts places as a forward pass reaches them."""
        return self.layer, ORDER[self.site]


@dataclass(frozen=True)
class Step:
    """One intervention as it will be done: for reports, not for the kernel."""

    op: str
    layers: tuple[int, ...]
    site: Site | None  # None: several, as `by_site` says
    tokens: Tokens
    assets: tuple[str, ...] = ()  # "name@version", or "inline"
    path: str = ""  # where it stands in the request
    gate: int = -1  # index into the plan's gates, -1: none
    by_site: tuple[tuple[Site, tuple[int, ...]], ...] = ()  # of one that works at several sites: its layers at each

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it edits."""
        if self.site is not None:
            return tuple(Place(layer, self.site) for layer in self.layers)
        return tuple(Place(layer, site) for site, layers in self.by_site for layer in layers)

    def about(self) -> dict[str, Any]:
        """What answers say of it before it is done."""
        out: dict[str, Any] = {"op": self.op, "layers": list(self.layers), "site": self.site and self.site.value}
        if self.by_site:
            out["sites"] = {site.value: list(layers) for site, layers in self.by_site}
        return {**out, "assets": list(self.assets)}


@dataclass(frozen=True)
class Activation:
    """A feature's activation from its direction·x: p = that + bias, where it is above threshold, else 0."""

    bias: float
    threshold: float | None  # None: p itself

    def __call__(self, dots: Tensor) -> Tensor:
        p = dots + self.bias
        return p if self.threshold is None else torch.where(p > self.threshold, p, 0)


@dataclass(frozen=True)
class GateRead:
    """A gate: a coordinate of one place, compared with bounds. Read before that place's own edits."""

    place: Place
    direction: Tensor | None  # [d] float32; unit, or a feature's encoder; None: ``encode`` reads
    measure: str  # "cosine" | "projection" | "feature"
    above: float | None
    below: float | None
    over: str  # "token" | "prompt_mean" | "last_prompt"
    hold: bool
    activation: Activation | None = None  # of measure "feature"
    encode: FeatureEncode | None = None  # of a feature that takes more than a product

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether tokens reused from the prefix cache would be missing from the decision."""
        return self.over == "prompt_mean" or (self.over == "token" and self.hold)

    @property
    def per_request(self) -> bool:
        return self.over != "token"

    @cached_property
    def reading(self) -> Reading:
        assert self.direction is not None
        bias, threshold = (self.activation.bias, self.activation.threshold) if self.activation else (0.0, None)
        return Reading(self.direction, self.measure == "cosine", bias, threshold, self.above, self.below)


@dataclass(frozen=True)
class ProbeRead:
    """One direction or feature read at one place, after that place's edits."""

    probe: int
    place: Place
    direction: Tensor | None  # [d] float32; unit, or a feature's encoder; None: ``encode`` reads
    activation: Activation | None = None  # of a feature
    encode: FeatureEncode | None = None  # of a feature that takes more than a product

    @cached_property
    def reading(self) -> Reading:
        assert self.direction is not None
        bias, threshold = (self.activation.bias, self.activation.threshold) if self.activation else (0.0, None)
        return Reading(self.direction, bias=bias, threshold=threshold)


class Encoding(NamedTuple):
    """A dictionary's encode that a plan has made, and what for."""

    place: Place
    use: str  # "edit": of each token that it edits; "gate", "probe": of each that it reads
    encode: FeatureEncode


@dataclass(frozen=True)
class Injection:
    """Same-pass injection at one site: x at the targets moves along what the sources before it put out, then ‖x‖.

    y = x + Σ weight·x_k over the sources k before the target, and x′ = y·‖x‖/‖y‖. x_k is layer k's own activation of
    the same row, before any edit at that place.
    """

    intervention: int
    site: Site
    sources: tuple[tuple[int, float], ...]  # (layer, scale·λ·RR), ascending
    targets: tuple[int, ...]  # layers, each after the first source
    gate: int = -1  # index into the plan's gates, -1: always open

    @property
    def written(self) -> tuple[Place, ...]:
        return tuple(Place(layer, self.site) for layer in self.targets)

    @property
    def read(self) -> tuple[Place, ...]:
        return tuple(Place(layer, self.site) for layer, _ in self.sources)


@dataclass(frozen=True)
class Restoration:
    """Stored rows in place of an activation at one place, each at a position of its own: x′ = row.

    With a basis in its subspace alone, x′ = x + VᵀV(row − x).
    """

    intervention: int
    place: Place
    positions: tuple[int, ...]  # one for each row; negative ones count from the prompt's end
    rows: Tensor  # [n, width] float32
    basis: Tensor | None = None  # V [k, width], orthonormal
    preserve_norm: bool = False
    gate: int = -1  # index into the plan's gates, -1: always open


@dataclass(frozen=True)
class Plan:
    steps: tuple[Step, ...]
    blocks: Mapping[Place, tuple[Block, ...]]  # in request order
    injections: tuple[Injection, ...] = field(default=(), kw_only=True)
    restorations: tuple[Restoration, ...] = field(default=(), kw_only=True)
    gates: tuple[GateRead, ...] = ()
    probes: tuple[ProbeRead, ...] = ()
    probe_names: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the content, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def edits_id(self) -> str:
        """The same without what is only read: plans that agree in it make the same KV cache."""
        if not self.probes:
            return self.id
        return replace(self, probes=(), probe_names=()).id

    @cached_property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        rows = [r for blocks in self.blocks.values() for b in blocks for r in (b.write, b.read) if r is not None]
        kept = [r.dense if r.dense is not None else r.columns for r in rows]
        kept += [g.direction for g in self.gates] + [p.direction for p in self.probes]
        kept += [t for r in self.restorations for t in (r.rows, r.basis)]
        return sum(t.nbytes for t in kept if t is not None)

    def activated(self, probes: Sequence[int], dots: Tensor) -> Tensor:
        """[n, k] the values of some of the plan's ``probes`` from their dot products, which are overwritten."""
        for column, probe in enumerate(probes):
            activation = self.probes[probe].activation
            if activation is not None:
                dots[:, column] = activation(dots[:, column])
        return dots

    @cached_property
    def encodes(self) -> tuple[Encoding, ...]:
        """The encodes that it makes, in the order of a pass."""
        found = [Encoding(g.place, "gate", g.encode) for g in self.gates if g.encode is not None]
        for place, blocks in self.blocks.items():
            found += [Encoding(place, "edit", b.encode) for b in blocks if isinstance(b.encode, FeatureEncode)]
        found += [Encoding(place, "probe", encode) for place, all_ in self.probe_encodes.items() for _, encode in all_]
        return tuple(sorted(found, key=lambda e: e.place.order))

    @cached_property
    def probe_encodes(self) -> dict[Place, list[tuple[list[int], FeatureEncode]]]:
        """At each place whose probes encode: (which of the probes, their encode), one for each dictionary."""
        found: dict[Place, dict[str, tuple[list[int], FeatureEncode]]] = {}
        for column, probe in enumerate(self.probes):
            if (encode := probe.encode) is not None:
                at = found.setdefault(probe.place, {})
                columns, known = at.get(encode.sha256, ([], None))
                at[encode.sha256] = [*columns, column], encode if known is None else known.plus(encode)
        return {place: list(at.values()) for place, at in found.items()}

    @property
    def selectors(self) -> list[Tokens]:
        return [step.tokens for step in self.steps]

    @property
    def places(self) -> set[Place]:
        """Every place that is edited or read."""
        read = {g.place for g in self.gates} | {p.place for p in self.probes}
        return self.edited | read | {place for i in self.injections for place in i.read}

    @property
    def edited(self) -> set[Place]:
        """Every place that is edited."""
        written = {place for i in self.injections for place in i.written} | {r.place for r in self.restorations}
        return set(self.blocks) | written

    @property
    def from_end(self) -> bool:
        """Whether what a selected token gets depends on where its prompt ends."""
        return any(position < 0 for r in self.restorations for position in r.positions)

    def to_bytes(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        names: dict[tuple[str, bytes], str] = {}

        def put(tensor: Tensor) -> str:
            tensor = tensor.contiguous()
            key = (f"{tensor.dtype}{tuple(tensor.shape)}", tensor.numpy().tobytes())
            if key not in names:
                names[key] = f"t{len(names)}"
                tensors[names[key]] = tensor
            return names[key]

        header = {
            "steps": [
                [
                    s.op,
                    list(s.layers),
                    s.site and s.site.value,
                    _selector(s.tokens),
                    list(s.assets),
                    s.path,
                    s.gate,
                    [[site.value, list(layers)] for site, layers in s.by_site],
                ]
                for s in self.steps
            ],
            "injections": [
                [i.intervention, i.site.value, [list(s) for s in i.sources], list(i.targets), i.gate]
                for i in self.injections
            ],
            "restorations": [
                [
                    r.intervention,
                    *_flat(r.place),
                    list(r.positions),
                    put(r.rows),
                    None if r.basis is None else put(r.basis),
                    r.preserve_norm,
                    r.gate,
                ]
                for r in self.restorations
            ],
            "blocks": [
                [place.layer, place.site.value, [_pack_block(b, put) for b in self.blocks[place]]]
                for place in sorted(self.blocks, key=lambda p: p.order)
            ],
            "gates": [
                [*_flat(g.place), _pack_read(g, put), g.measure, g.above, g.below, g.over, g.hold] for g in self.gates
            ],
            "probes": [[p.probe, *_flat(p.place), _pack_read(p, put)] for p in self.probes],
            "probe_names": list(self.probe_names),
        }
        if not tensors:
            put(torch.zeros(1))  # safetensors wants at least one
        data: bytes = save(tensors, {"plan": json.dumps(header, sort_keys=True, separators=(",", ":"))})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["plan"])
        tensors = load(data)
        plan = cls(
            steps=tuple(_unpack_step(step) for step in header["steps"]),
            injections=tuple(
                Injection(i, Site(site), tuple((k, w) for k, w in sources), tuple(targets), gate)
                for i, site, sources, targets, gate in header["injections"]
            ),
            restorations=tuple(
                Restoration(
                    i, Place(layer, Site(site)), tuple(at), tensors[rows], basis and tensors[basis], preserve, gate
                )
                for i, layer, site, at, rows, basis, preserve, gate in header["restorations"]
            ),
            blocks={
                Place(layer, Site(site)): tuple(_unpack_block(b, tensors) for b in blocks)
                for layer, site, blocks in header["blocks"]
            },
            gates=tuple(_unpack_gate(gate, tensors) for gate in header["gates"]),
            probes=tuple(
                ProbeRead(i, Place(layer, Site(site)), **_unpack_read(read, tensors))
                for i, layer, site, read in header["probes"]
            ),
            probe_names=tuple(header["probe_names"]),
        )
        plan.__dict__["id"] = hashlib.sha256(data).hexdigest()
        return plan


def constant_block(intervention: int, vector: Tensor, **flags: Any) -> Block:
    """A block that adds ``vector`` [d]."""
    return linear_block(intervention, Rows(len(vector), dense=vector[None].float()), None, offset=1.0, **flags)


def linear_block(
    intervention: int,
    write: Rows,
    read: Rows | None,
    *,
    bias: Tensor | float = 0.0,
    gain: Tensor | float = 1.0,
    offset: Tensor | float = 0.0,
    low: float = float("-inf"),
    high: float = float("inf"),
    **flags: Any,
) -> Block:
    """A block without an activation function; numbers stand for all its rows."""

    def row(value: Tensor | float) -> Tensor:
        return value.float() if isinstance(value, Tensor) else torch.full((write.count,), value)

    return Block(
        intervention=intervention,
        write=write,
        read=read,
        bias=row(bias),
        threshold=row(float("-inf")),
        gain=row(gain),
        offset=row(offset),
        low=row(low),
        high=row(high),
        **flags,
    )


def _selector(tokens: Tokens) -> object:
    """As JSON, only what was stated: a selector that states nothing but ``exclude`` has a meaning of its own."""
    return _TOKENS.dump_python(tokens, mode="json", exclude_unset=True)


def _flat(place: Place) -> tuple[int, str]:
    return place.layer, place.site.value


def _unpack_step(data: list[Any]) -> Step:
    op, layers, site, tokens, assets, path, gate, by_site = data
    selector = _TOKENS.validate_json(json.dumps(tokens))
    places = tuple((Site(s), tuple(at)) for s, at in by_site)
    return Step(op, tuple(layers), site and Site(site), selector, tuple(assets), path, gate, places)


def _pack_read(read: GateRead | ProbeRead, put: Any) -> dict[str, Any]:
    """How a number is read off a place."""
    if read.encode is not None:
        return {"encode": read.encode.to_json()}
    activation = None if read.activation is None else [read.activation.bias, read.activation.threshold]
    return {"direction": put(read.direction), "activation": activation}


def _unpack_read(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "encode" in data:
        return {"direction": None, "encode": FeatureEncode.from_json(data["encode"])}
    activation = None if data["activation"] is None else Activation(*data["activation"])
    return {"direction": tensors[data["direction"]], "activation": activation}


def _unpack_gate(data: list[Any], tensors: Mapping[str, Tensor]) -> GateRead:
    layer, site, read, *condition = data
    names = ("measure", "above", "below", "over", "hold")
    parts = dict(zip(names, condition, strict=True))
    return GateRead(Place(layer, Site(site)), **_unpack_read(read, tensors), **parts)


def _pack_rows(rows: Rows | None, put: Any) -> list[Any] | None:
    if rows is None:
        return None
    if rows.dense is not None:
        return ["dense", rows.width, put(rows.dense)]
    return ["columns", rows.width, put(rows.columns)]


def _unpack_rows(data: list[Any] | None, tensors: Mapping[str, Tensor]) -> Rows | None:
    return None if data is None else Rows(data[1], **{data[0]: tensors[data[2]]})


def _pack_block(b: Block, put: Any) -> list[Any]:
    vectors = [put(getattr(b, name)) for name in _VECTORS]
    return [
        b.intervention,
        _pack_rows(b.write, put),
        _pack_rows(b.read, put),
        vectors,
        [int(getattr(b, f)) for f in _FLAGS],
        b.encode.to_json() if isinstance(b.encode, FeatureEncode) else None,
    ]


def _unpack_block(data: list[Any], tensors: Mapping[str, Tensor]) -> Block:
    intervention, write, read, vectors, flags, encode = data
    rows = _unpack_rows(write, tensors)
    assert rows is not None
    *switches, gate = flags
    return Block(
        intervention=intervention,
        write=rows,
        read=_unpack_rows(read, tensors),
        **{name: tensors[t] for name, t in zip(_VECTORS, vectors, strict=True)},
        **{name: bool(value) for name, value in zip(_FLAGS, switches, strict=False)},
        gate=gate,
        encode=FeatureEncode.from_json(encode) if encode else None,
    )
