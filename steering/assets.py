"""What an asset is: the frozen metadata of `asset.json`, by kind, and `Asset`, metadata with its tensors.

The fields that all kinds share are in `steering/asset_fields.py`, recipes in `steering/recipes.py`.

| kind | metadata | tensors (L = number of `layers`) |
|---|---|---|
| vector | site, layers | `vectors` [L, d], or [L, k, d] for a rank-k subspace |
| dictionary | site, layer, architecture, .. | `decoder` [m, d_out], `b_dec` [d_out], `encoder` [m, d] and others |
| neurons | neurons: (layer, index) pairs | none |
| recipe | rr_attn, rr_mlp, sources, targets, lambda_a, lambda_m | none |
| affine | site, layers | `R` [L, r, d], `A` [L, r, d], `b` [L, r]; x' = x + Rᵀ(Ax + b − Rx) |
| profile | steering: a request's `steering` object | none |
| baseline | counts, mean, deviation: [n_layers], of ln‖x‖ at `resid_post` | none |
| detector | features, hedges, threshold, and the mixture of `steering/mixture.py` | none |

Tensors are float32, float16 or bfloat16, finite, on the CPU; a dictionary's may stay on disk (`RowFile`), and its
labels are integers (`steering/labels.py`). d is d_model at the sites of that width; at `attn_z` and
`mlp_post` the width is the model's own, and is checked against the served model when a plan is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, get_args

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from steersman.steering.asset_fields import (
    CommonMeta,
    Count,
    FreeObject,
    Index,
    Layers,
    ModelRef,
    Shapes,
    canonical_json,
    expect_tensors,
    is_name,
)
from steersman.steering.detectors import BaselineMeta, DetectorMeta
from steersman.steering.errors import (
    InvalidRequest,
    LayerOutOfRange,
    NonFinite,
    SteeringError,
    UnknownField,
    WidthMismatch,
    join_path,
)
from steersman.steering.recipes import RecipeMeta
from steersman.steering.rows import RowFile
from steersman.steering.sites import Site

__all__ = [
    "DTYPES",
    "D_MODEL_SITES",
    "KINDS",
    "LABEL_DTYPES",
    "VERSION_LENGTH",
    "AffineMeta",
    "Asset",
    "AssetMeta",
    "BaselineMeta",
    "DetectorMeta",
    "DictionaryMeta",
    "ModelRef",
    "NeuronsMeta",
    "ProfileMeta",
    "RecipeMeta",
    "VectorMeta",
    "canonical_json",
    "content_sha256",
    "dump_metadata",
    "is_name",
    "parse_metadata",
    "tensor_specs",
    "validation_error",
]

Kind = Literal["vector", "dictionary", "neurons", "recipe", "affine", "profile", "baseline", "detector"]
Architecture = Literal["standard", "topk", "jumprelu", "gated", "matching_pursuit", "linear", "basis"]

D_MODEL_SITES: Final = frozenset(Site) - {Site.ATTN_Z, Site.MLP_POST}
DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
VERSION_LENGTH: Final = 12
LABEL_DTYPES: Final[dict[str, torch.dtype]] = {"labels": torch.uint8, "label_ends": torch.int64}
_ENCODER: Final[dict[str, tuple[str, ...]]] = {  # of a dictionary: what its encoder takes, a row or number per feature
    "standard": ("encoder", "b_enc"),
    "topk": ("encoder", "b_enc"),
    "jumprelu": ("encoder", "b_enc", "threshold"),
    "gated": ("encoder", "b_gate", "b_mag", "r_mag"),
    "linear": ("encoder", "b_enc"),
    "matching_pursuit": (),  # its decoder
    "basis": (),  # it has none
}


def _check_read_site(site: str) -> str:
    if site not in (*Site, "mlp_in"):
        raise ValueError(f"must be mlp_in or one of {', '.join(Site)}")
    return site


ReadSite = Annotated[str, AfterValidator(_check_read_site)]


class VectorMeta(CommonMeta):
    kind: Literal["vector"]
    site: Site = Site.RESID_POST
    layers: Layers

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return self.layers

    def check_tensors(self, shapes: Shapes) -> None:
        expect_tensors(shapes, ("vectors",))
        shape = shapes["vectors"]
        if len(shape) not in (2, 3) or shape[0] != len(self.layers) or not all(shape) or len(shape) == 3 > shape[2]:
            raise _bad_shape("vectors", shape, f"[{len(self.layers)}, d] or [{len(self.layers)}, k, d]")
        if len(shape) == 3 and shape[1] > shape[2]:
            raise _bad_shape("vectors", shape, "a subspace of at most d directions")
        _width(self, "vectors", shape[-1])


class DictionaryMeta(CommonMeta):
    """Features; what an architecture computes is in `steering/dictionaries.py`."""

    kind: Literal["dictionary"]
    site: Site = Site.RESID_POST  # where it writes, and, but for transcoders, reads
    layer: Index
    architecture: Architecture
    read_site: ReadSite | None = None  # of a transcoder: where it reads; mlp_in: what the MLP is fed
    k: Count | None = None  # of topk: how many features stay active
    apply_b_dec_to_input: bool = False
    normalize: Literal["none", "constant_norm_rescale", "layer_norm"] = "none"
    input_scale: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)] = 1.0  # the encoder sees it times x
    residual_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)] = 1e-2  # of matching_pursuit
    max_iterations: Count | None = None  # of matching_pursuit; absent: d
    stop_on_duplicate_support: bool = True  # of matching_pursuit

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @model_validator(mode="after")
    def _consistent(self) -> DictionaryMeta:
        if (self.architecture == "topk") != (self.k is not None):
            raise ValueError("k belongs to architecture topk, and topk needs it")
        if self.read_site is not None and self.apply_b_dec_to_input:
            raise ValueError("apply_b_dec_to_input is not for transcoders, whose b_dec belongs to what they write")
        if self.normalize != "none" and self.input_scale != 1:
            raise ValueError("input_scale goes with normalize none")
        return self

    def check_tensors(self, shapes: Shapes) -> None:
        encoder = _ENCODER[self.architecture]
        further = {"labels", "label_ends"} & set(shapes) | {"skip"} & set(shapes if self.read_site else ())
        expect_tensors(shapes, ("decoder", "b_dec", *encoder, *further))
        if len(shapes["decoder"]) != 2 or not all(shapes["decoder"]):
            raise _bad_shape("decoder", shapes["decoder"], "[m, d]")
        m, width = shapes["decoder"]
        _width(self, "decoder", width)
        d = shapes["encoder"][-1] if self.read_site and len(shapes.get("encoder", ())) == 2 else width
        if self.read_site not in (None, Site.ATTN_Z, Site.MLP_POST) and d != self.model.d_model:
            raise WidthMismatch(
                f"encoder is {d} wide; {self.read_site} is {self.model.d_model} wide", "tensors.encoder"
            )
        _expect(shapes, "b_dec", (width,))
        for name in encoder:
            _expect(shapes, name, (m, d) if name == "encoder" else (m,))
        if "skip" in further:
            _expect(shapes, "skip", (width, d))
        if {"labels", "label_ends"} & further:
            expect_tensors({k: v for k, v in shapes.items() if k in LABEL_DTYPES}, ("label_ends", "labels"))
            _expect(shapes, "label_ends", (m,))
            _expect(shapes, "labels", shapes["labels"][:1])


class NeuronsMeta(CommonMeta):
    kind: Literal["neurons"]
    neurons: Annotated[tuple[tuple[Index, Index], ...], Field(min_length=1)]  # (layer, index in mlp_post)
    d_ff: Count | None = None

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.neurons}))

    @model_validator(mode="after")
    def _distinct(self) -> NeuronsMeta:
        if len(set(self.neurons)) != len(self.neurons):
            raise ValueError("a neuron is named twice")
        if self.d_ff is not None and any(index >= self.d_ff for _, index in self.neurons):
            raise ValueError(f"a neuron's index is beyond d_ff = {self.d_ff}")
        return self


class AffineMeta(CommonMeta):
    kind: Literal["affine"]
    site: Site = Site.RESID_POST
    layers: Layers

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return self.layers

    def check_tensors(self, shapes: Shapes) -> None:
        expect_tensors(shapes, ("R", "A", "b"))
        shape = shapes["R"]
        if len(shape) != 3 or shape[0] != len(self.layers) or not all(shape) or shape[1] > shape[2]:
            raise _bad_shape("R", shape, f"[{len(self.layers)}, r, d] with r at most d")
        _width(self, "R", shape[2])
        _expect(shapes, "A", shape)
        _expect(shapes, "b", shape[:2])


class ProfileMeta(CommonMeta):
    kind: Literal["profile"]
    steering: FreeObject  # a request's `steering` object; its meaning is checked where requests are


AssetMeta = Annotated[
    VectorMeta | DictionaryMeta | NeuronsMeta | RecipeMeta | AffineMeta | ProfileMeta | BaselineMeta | DetectorMeta,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[AssetMeta] = TypeAdapter(AssetMeta)


def parse_metadata(value: Any) -> AssetMeta:
    """The metadata that a JSON object states; an `InvalidRequest` that names the bad field when it is not one."""
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise validation_error(error, skip=1) from error


def dump_metadata(meta: AssetMeta) -> dict[str, Any]:
    """The JSON object of `meta`, optional fields that are absent left out."""
    return {key: value for key, value in meta.model_dump(mode="json").items() if value is not None}


def validation_error(error: ValidationError, prefix: str = "", skip: int = 0) -> SteeringError:
    """Pydantic's first complaint as ours. `skip`: leading steps of its path that are union tags and not fields."""
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    path = "kind" if kind.startswith("union_tag") else ""
    for step in first["loc"][skip:]:
        path = join_path(path, f"[{step}]" if isinstance(step, int) else str(step))
    message = first["msg"].removeprefix("Value error, ")
    if error.error_count() > 1:
        message += f" (and {error.error_count() - 1} more)"
    cls: type[SteeringError] = {
        "extra_forbidden": UnknownField,
        "layer_out_of_range": LayerOutOfRange,
        "finite_number": NonFinite,
    }.get(kind, InvalidRequest)
    if kind == "extra_forbidden":
        message = f"unknown field '{first['loc'][-1]}'"
    return cls(message, join_path(prefix, path) or None)


@dataclass(frozen=True, eq=False)
class Asset:
    """Metadata with its tensors, checked against each other. Shared by all who ask for it: never written to."""

    meta: AssetMeta
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # or a RowFile, which stays on disk
    sha256: str = ""  # of the content. Given by the store alone; otherwise the tensors are copied and hashed

    def __post_init__(self) -> None:
        if isinstance(self.tensors, RowFile):
            dtypes = {name: spec.dtype for name, spec in self.tensors.specs.items()}
        else:
            copy = not self.sha256
            own = {n: self.tensors[n].detach().to("cpu", copy=copy).contiguous() for n in sorted(self.tensors)}
            object.__setattr__(self, "tensors", own)
            dtypes = {name: tensor.dtype for name, tensor in own.items()}
        for name, dtype in dtypes.items():
            wanted = [LABEL_DTYPES[name]] if name in LABEL_DTYPES else [*DTYPES.values()]
            if dtype not in wanted:
                raise InvalidRequest(f"{name} is {dtype}; wanted: {', '.join(map(str, wanted))}", f"tensors.{name}")
        self.meta.check_tensors(self.shapes)
        if isinstance(self.tensors, RowFile) and self.sha256:
            return  # what is read of it is checked when it is read
        for name in self.tensors:
            if not all(torch.isfinite(part).all() for part in _parts(self.tensors, name)):
                raise NonFinite(f"{name} holds NaN or infinity", f"tensors.{name}")
        if "label_ends" in self.tensors:
            _check_label_ends(self.tensors["label_ends"], self.shapes["labels"][0])
        if not self.sha256:
            object.__setattr__(self, "sha256", content_sha256(dump_metadata(self.meta), self.tensors))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        if isinstance(self.tensors, RowFile):
            return {name: spec.shape for name, spec in self.tensors.specs.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def version(self) -> str:
        return self.sha256[:VERSION_LENGTH]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return 0 if isinstance(self.tensors, RowFile) else sum(tensor.nbytes for tensor in self.tensors.values())


def tensor_specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Each tensor's dtype and shape, as JSON."""
    specs = tensors.specs if isinstance(tensors, RowFile) else tensors
    return {n: {"dtype": str(s.dtype).removeprefix("torch."), "shape": [*s.shape]} for n, s in specs.items()}


def content_sha256(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the canonical metadata, then each tensor's bytes in the order of the names.

    The names, dtypes and shapes are hashed with the metadata, so no two contents share a byte stream.
    """
    specs = {name: [f"torch.{spec['dtype']}", spec["shape"]] for name, spec in tensor_specs(tensors).items()}
    digest = hashlib.sha256(canonical_json({"metadata": metadata, "tensors": specs}).encode())
    for name in sorted(tensors):
        for part in _parts(tensors, name):
            digest.update(part.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(tensors: Mapping[str, torch.Tensor], name: str) -> Iterator[torch.Tensor]:
    if isinstance(tensors, RowFile):
        yield from tensors.chunks(name)
    else:
        yield tensors[name]


def _check_label_ends(ends: torch.Tensor, length: int) -> None:
    """Each label ends where the one before it ends or later, the last one with the text."""
    steps = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
    if (steps < 0).any() or int(ends[-1]) != length:
        raise InvalidRequest(f"must not decrease, and end at {length}, the length of labels", "tensors.label_ends")


def _expect(shapes: Shapes, name: str, want: tuple[int, ...]) -> None:
    if shapes[name] != want:
        raise _bad_shape(name, shapes[name], str(list(want)))


def _bad_shape(name: str, shape: tuple[int, ...], want: str) -> InvalidRequest:
    return InvalidRequest(f"{name} has the shape {list(shape)}, wanted: {want}", f"tensors.{name}")


def _width(meta: VectorMeta | DictionaryMeta | AffineMeta, name: str, width: int) -> None:
    if meta.site in D_MODEL_SITES and width != meta.model.d_model:
        message = f"{name} is {width} wide; {meta.site.value} of {meta.model.id} is {meta.model.d_model} wide"
        raise WidthMismatch(message, f"tensors.{name}")


KINDS: Final[tuple[str, ...]] = get_args(Kind)
