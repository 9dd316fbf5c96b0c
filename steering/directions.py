"""Looking up what a request names: directions of stored or inline vectors, checked against the served model."""

from __future__ import annotations

import base64
import binascii
import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from steersman.steering.activations import CaptureFile
from steersman.steering.assets import (
    AffineMeta,
    Asset,
    BaselineMeta,
    DetectorMeta,
    DictionaryMeta,
    ModelRef,
    NeuronsMeta,
    ProfileMeta,
    RecipeMeta,
    VectorMeta,
)
from steersman.steering.errors import (
    AssetKindMismatch,
    InlineMalformed,
    InvalidRequest,
    LayerMissing,
    LayerOutOfRange,
    ModelMismatch,
    NonFinite,
    UnknownCapture,
    WidthMismatch,
)
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.spec import Inline, InlineVector, Layers, Vector

MAX_INLINE_BYTES = 64 * 2**20
MAX_RANK = 256  # of an inline subspace, whose basis is computed within the request
M = TypeVar(
    "M", VectorMeta, DictionaryMeta, NeuronsMeta, AffineMeta, ProfileMeta, RecipeMeta, BaselineMeta, DetectorMeta
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Assets(Protocol):
    """Where assets come from; :class:`steersman.steering.store.Store` is one."""

    def get(self, ref: str) -> Asset: ...


class Captures(Protocol):
    """Where kept captures come from. Raises UnknownCapture."""

    def open(self, capture_id: str) -> CaptureFile: ...


@dataclass(frozen=True)
class Directions:
    """One direction [k, d] for each of some layers, or for whichever layer is asked for."""

    name: str  # "name@version", or "inline"
    site: Site | None
    layers: tuple[int, ...]  # () : the same one at any layer
    vectors: Tensor  # [n_layers, k, d], or [1, k, d] for any layer
    scale: float | None = None  # recommended
    tokens: object = None  # default selection

    def at(self, layer: int, width: int) -> Tensor:
        """[k, d] float32 at ``layer``, which must be as wide as the site."""
        if not self.layers:
            found = self.vectors[0]
        elif layer in self.layers:
            found = self.vectors[self.layers.index(layer)]
        else:
            raise LayerMissing(f"{self.name} has nothing for layer {layer}; it has {_spell(self.layers)}")
        if found.shape[-1] != width:
            raise WidthMismatch(f"{self.name} is {found.shape[-1]} wide, the site is {width} wide at layer {layer}")
        return found.float()

    def one(self, layer: int, width: int) -> Tensor:
        """[d]: the same where only a single direction makes sense."""
        found = self.at(layer, width)
        if found.shape[0] != 1:
            raise InvalidRequest(f"{self.name} is a subspace of {found.shape[0]} directions; this needs one direction")
        return found[0]


@dataclass(frozen=True)
class _Pinned:
    found: Mapping[str, Asset]

    def get(self, ref: str) -> Asset:
        return self.found[ref]


class Library:
    """Assets as plans need them. ``any_model`` lets assets of other models pass where their sizes fit."""

    def __init__(
        self,
        assets: Assets,
        model: ModelInfo,
        *,
        aliases: tuple[str, ...] = (),
        any_model: bool = False,
        captures: Captures | None = None,
    ) -> None:
        self.assets = assets
        self.captures = captures
        self.model = model
        self.any_model = any_model
        self._names = {_last(n) for n in (model.name, *aliases)}

    def pinned(self, assets: Mapping[str, Asset]) -> Library:
        """The same for references that have been looked up, so that they mean one version while a plan is built."""
        library = copy.copy(self)
        library.assets = _Pinned(assets)
        return library

    def vector(self, ref: Vector) -> Directions:
        """The directions that a stored or inline vector gives."""
        if isinstance(ref, Inline):
            return _inline(ref.inline)
        asset, meta = self.asset(ref, VectorMeta)
        vectors = asset.tensors["vectors"]
        scale = meta.recommended.scale if meta.recommended else None
        stacked = vectors if vectors.dim() == 3 else vectors[:, None, :]
        return Directions(asset.ref, meta.site, meta.layers, stacked, scale, meta.tokens)

    def neurons(self, ref: str) -> tuple[str, tuple[tuple[int, int], ...], object]:
        """The asset's ref, its (layer, index) pairs and its default tokens."""
        asset, meta = self.asset(ref, NeuronsMeta)
        return asset.ref, meta.neurons, meta.tokens

    def dictionary(self, ref: str) -> tuple[Asset, DictionaryMeta]:
        return self.asset(ref, DictionaryMeta)

    def affine(self, ref: str) -> tuple[Asset, AffineMeta]:
        return self.asset(ref, AffineMeta)

    def recipe(self, ref: str) -> tuple[Asset, RecipeMeta]:
        return self.asset(ref, RecipeMeta)

    def baseline(self, ref: str) -> BaselineMeta:
        return self.asset(ref, BaselineMeta)[1]

    def detector(self, ref: str) -> tuple[str, DetectorMeta]:
        """The asset's ref and metadata."""
        asset, meta = self.asset(ref, DetectorMeta)
        return asset.ref, meta

    def capture(self, capture_id: str) -> CaptureFile:
        """A kept capture of the served model."""
        if self.captures is None:
            raise UnknownCapture("no captures are kept here")
        found = self.captures.open(capture_id)
        if not self.any_model and _last(found.about["model"]) not in self._names:
            raise ModelMismatch(f"the capture is of {found.about['model']}; this server runs {self.model.name}")
        return found

    def profile(self, ref: str) -> ProfileMeta:
        return self.asset(ref, ProfileMeta)[1]

    def asset(self, ref: str, kind: type[M]) -> tuple[Asset, M]:
        """A stored asset of one kind that fits the served model."""
        asset = self.assets.get(ref)
        if not isinstance(asset.meta, kind):
            wanted = kind.__name__.removesuffix("Meta").lower()
            raise AssetKindMismatch(f"{asset.ref} is of kind {asset.meta.kind}; wanted: {wanted}")
        self._check_model(asset.ref, asset.meta.model)
        return asset, asset.meta

    def _check_model(self, ref: str, made_for: ModelRef) -> None:
        model = self.model
        if (made_for.n_layers, made_for.d_model) != (model.n_layers, model.d_model):
            raise ModelMismatch(
                f"{ref} was made for {made_for.id} ({made_for.n_layers} layers, d_model {made_for.d_model}); "
                f"this server runs {model.name} ({model.n_layers} layers, d_model {model.d_model})"
            )
        if self.any_model:
            return
        prints = {made_for.fingerprint, model.fingerprint}
        if None not in prints and len(prints) == 2:
            raise ModelMismatch(f"{ref} was made for other weights of {made_for.id} than this server runs")
        if _last(made_for.id) not in self._names:
            raise ModelMismatch(
                f"{ref} was made for {made_for.id}; this server runs {model.name}. "
                "Start it with --steering-any-model to use assets of other models of the same size"
            )


def chosen_layers(layers: Layers | None, has: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """The layers that a request means. ``has``: what the asset has, () if it can be used at any layer."""
    if layers is None or layers == "all":
        if not has and layers is None:
            raise InvalidRequest("name the layers: this vector belongs to no particular layer")
        wanted = has or tuple(range(n_layers))
    elif isinstance(layers, int):
        wanted = (layers,)
    elif isinstance(layers, str):
        match = re.fullmatch(r"(\d+)-(\d+)", layers)
        assert match, "the spec admits nothing else"
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise InvalidRequest(f'"{layers}" ends before it begins')
        wanted = (first, last) if last >= n_layers else tuple(range(first, last + 1))
    else:
        wanted = tuple(layers)
    if max(wanted) >= n_layers:
        raise LayerOutOfRange(f"layer {max(wanted)} does not exist: the model has layers 0 to {n_layers - 1}")
    if len(set(wanted)) != len(wanted):
        raise InvalidRequest("a layer is named twice")
    for layer in wanted:
        if has and layer not in has:
            raise LayerMissing(f"the asset has nothing for layer {layer}; it has {_spell(has)}")
    return wanted


def _inline(given: InlineVector) -> Directions:
    dtype = _DTYPES[given.dtype]
    size = dtype.itemsize
    count = int(np.prod(given.shape, dtype=object))
    if count == 0:
        raise InlineMalformed("the shape has a zero", "inline.shape")
    if len(given.shape) == 3 and given.shape[1] > MAX_RANK:
        raise InlineMalformed(f"an inline subspace has at most {MAX_RANK} directions", "inline.shape")
    if count * size > MAX_INLINE_BYTES:
        raise InlineMalformed(f"inline vectors hold at most {MAX_INLINE_BYTES >> 20} MiB", "inline.shape")
    try:
        data = base64.b64decode(given.data, validate=True)
    except (binascii.Error, ValueError):
        raise InlineMalformed("is not base64", "inline.data") from None
    if len(data) != count * size:
        wanted = f"{given.shape} of {given.dtype} takes {count * size} bytes"
        raise InlineMalformed(f"holds {len(data)} bytes; {wanted}", "inline.data")
    vectors = torch.frombuffer(bytearray(data), dtype=dtype).reshape(given.shape).float()
    if not torch.isfinite(vectors).all():
        raise NonFinite("holds NaN or infinity", "inline.data")
    if vectors.abs().max() > 1e18:
        raise NonFinite("holds numbers beyond 1e18, whose squares overflow", "inline.data")
    layers = tuple(given.layers or ())
    if len(given.shape) == 1:
        if given.layers is not None:
            raise InlineMalformed("shape [d] goes without layers; name them in the intervention", "inline.layers")
        return Directions("inline", given.site, (), vectors[None, None])
    if len(layers) != given.shape[0] or len(set(layers)) != len(layers):
        raise InlineMalformed(f"needs {given.shape[0]} different layers, one per row of shape", "inline.layers")
    stacked = vectors if vectors.dim() == 3 else vectors[:, None, :]
    return Directions("inline", given.site, layers, stacked)


def _last(name: str) -> str:
    """A model's name without its organisation or folder, in lower case."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _spell(layers: tuple[int, ...]) -> str:
    """[3, 4, 5, 9] as "layers 3-5, 9"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
