"""A checkpoint as neurons see it: each layer's way down from the MLP, and the unembedding, read a part at a time.

Column i of W_down is what neuron i writes into the residual stream. Parameters are found by structure and by the names
that families give them, not by architecture:

- the embedding is a matrix [V, d_model] named `embed_tokens`, `wte`, `embed_in` and the like;
- the decoder's layers are the numbered stack beside it, whatever prefix both have (`language_model.model.` in OpenVLA
  and LLaVA, whose vision towers have stacks of their own elsewhere);
- in each layer W_down is the one matrix named `down_proj`, `fc2`, `dense_4h_to_h`, `c_proj` of the MLP and the like. It
  is [d_model, d_ff], or [d_ff, d_model] where linear layers are kept transposed (GPT-2's `Conv1D`);
- the unembedding is `lm_head`, `embed_out` or `output` where the checkpoint has one, else the embedding (tied).

Mixtures of experts are refused at their layers: a neuron there belongs to an expert, and no server steers it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor

from steersman.steering.errors import InvalidRequest, LayerOutOfRange, SiteUnsupported, UploadMalformed

EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"})
HEADS: Final = frozenset({"lm_head", "embed_out", "output"})
DOWN: Final = frozenset({"down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2"})
NORMS: Final = frozenset({"norm", "ln_f", "final_layer_norm", "final_layernorm"})
_TRANSPOSED: Final = frozenset({"gpt2", "openai-gpt", "imagegpt"})  # their linear layers are Conv1D
_ONE_PLUS: Final = ("gemma", "gemma2", "gemma3", "gemma3_text", "paligemma")  # norms whose gain is 1 + weight
_TEXT: Final = ("text_config", "llm_config", "language_config")
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_STACKED: Final = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<inner>.+)")
_EXPERTS: Final = re.compile(r"(^|[._])experts?([._]|$)")


@dataclass(frozen=True)
class FinalNorm:
    """The norm before the unembedding, less what is the same for all neurons."""

    gain: Tensor  # [d_model] float32
    centred: bool  # a LayerNorm, which takes the mean out first

    def __call__(self, vectors: Tensor) -> Tensor:
        """[n, d_model] to the same; a LayerNorm's bias, which moves all logits alike, is left out."""
        x = vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors
        size = x.square().mean(-1, keepdim=True).sqrt()
        return x / size.clamp_min(1e-20) * self.gain.to(x.device)


class Checkpoint:
    """A folder of safetensors, of which nothing but headers is read before it is asked for.

    A file is opened for each read: the pages of one that stays open stay in memory, in the end those of all layers.
    """

    def __init__(self, folder: str | Path) -> None:
        """`folder` is a Hugging Face model's. Raises `InvalidRequest` (`model`) where it is none that can be read."""
        self.folder = Path(folder)
        self.config = _config(self.folder)
        self._files: dict[str, Path] = {}  # by tensor
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in _paths(self.folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    self._files[name], self._dtypes[name] = path, part.get_dtype()
                    self._shapes[name] = tuple(part.get_shape())
        self.embedding = self._embedding()
        self.d_model = self._shapes[self.embedding][1]
        self._down, self._experts = self._layers()
        self.n_layers = len(self._down) + len(self._experts)
        self.head = self._head()

    @property
    def name(self) -> str:
        """The model's name, as the server that serves this folder tells it."""
        return Path(os.path.abspath(self.folder)).name

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding; there may be more of them than tokens."""
        return self._shapes[self.head][0]

    @property
    def pattern(self) -> str:
        """The name of W_down, with `*` for the layer."""
        match = _STACKED.fullmatch(next(iter(self._down.values())))
        assert match, "it was found by this pattern"
        return f"{match['stack']}.*.{match['inner']}"

    def widths(self, layers: tuple[int, ...] | None = None) -> dict[int, int]:
        """Layer to d_ff, of `layers` or of all; refused where a layer is a mixture of experts."""
        wanted = tuple(range(self.n_layers)) if layers is None else layers
        if not wanted or len(set(wanted)) != len(wanted):
            raise InvalidRequest("name at least one layer, each once", "layers")
        if beyond := [layer for layer in wanted if not 0 <= layer < self.n_layers]:
            raise LayerOutOfRange(f"layer {beyond[0]} does not exist: there are 0 to {self.n_layers - 1}", "layers")
        if mixed := [layer for layer in wanted if layer in self._experts]:
            dense = ", ".join(map(str, self._down))
            raise SiteUnsupported(
                f"layers {', '.join(map(str, mixed))} are mixtures of experts, whose neurons no server steers; "
                + (f"name those that are not: {dense}" if dense else "this model has no other layers"),
                "layers",
            )
        return {layer: self._d_ff(self._down[layer]) for layer in sorted(wanted)}

    def down(self, layer: int) -> Tensor:
        """[d_ff, d_model] in the file's dtype: row i is what neuron i writes. A view of the file where it can be."""
        name = self._down[layer]
        weight = self._read(name)
        return weight if self._is_transposed(name) else weight.T

    def unembedding(self, start: int, stop: int) -> Tensor:
        """[stop − start, d_model] float32, the unembedding's rows of those token ids."""
        with _opened(self._files[self.head]) as file:
            rows: Tensor = file.get_slice(self.head)[start:stop]
        return rows.float()

    def final_norm(self) -> FinalNorm:
        """The norm before the unembedding; `InvalidRequest` where it is not known how it computes."""
        parent = _parent(self.embedding)
        found = [n for n in self._shapes if n.endswith(".weight") and _parent(n) == parent and _last(n) in NORMS]
        text = _text(self.config)
        kinds = {
            kind
            for kind, keys in (("rms", ("rms_norm_eps",)), ("layer", ("layer_norm_eps", "layer_norm_epsilon")))
            if any(key in text for key in keys)
        }
        if len(found) != 1 or len(kinds) != 1:
            raise InvalidRequest("it cannot be told what this model's final norm computes; project without it", "norm")
        gain = self._read(found[0]).float()
        if str(text.get("model_type", self.config.get("model_type"))) in _ONE_PLUS:
            gain = gain + 1
        return FinalNorm(gain, centred=kinds == {"layer"})

    def _read(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _embedding(self) -> str:
        found = [n for n, s in self._shapes.items() if n.endswith(".weight") and _last(n) in EMBEDDINGS and len(s) == 2]
        beside = {match["stack"].rpartition(".")[0] for n in self._shapes if (match := _STACKED.fullmatch(n))}
        found = [name for name in found if _parent(name) in beside]
        if len(found) != 1:
            names = ", ".join(found) or "none"
            raise InvalidRequest(f"wanted is one token embedding beside the decoder's layers; found: {names}", "model")
        return found[0]

    def _layers(self) -> tuple[dict[int, str], frozenset[int]]:
        """W_down's name by layer, and the layers that are mixtures of experts."""
        parent, down, experts, seen = _parent(self.embedding), dict[int, list[str]](), set[int](), set[int]()
        for name, shape in self._shapes.items():
            match = _STACKED.fullmatch(name)
            if not match or match["stack"].rpartition(".")[0] != parent:
                continue
            layer, inner = int(match["layer"]), match["inner"]
            seen.add(layer)
            if _EXPERTS.search(inner):
                experts.add(layer)
            elif (
                inner.endswith(".weight")
                and _last(inner) in DOWN
                and "att" not in inner
                and len(shape) == 2
                and self.d_model in shape
            ):
                down.setdefault(layer, []).append(name)
        if seen != set(range(len(seen))):
            raise InvalidRequest(f"the layers that the checkpoint holds are {sorted(seen)}, not 0 to n", "model")
        for layer in sorted(seen - experts):
            if len(down.get(layer, ())) != 1:
                names = ", ".join(down.get(layer, ())) or "none"
                raise InvalidRequest(f"layer {layer} should have one matrix W_down; found: {names}", "model")
        for name in [down[layer][0] for layer in sorted(seen - experts)] + [self.embedding]:
            self._check_dtype(name)
        return {layer: down[layer][0] for layer in sorted(seen - experts)}, frozenset(experts)

    def _head(self) -> str:
        wanted = [n for n, s in self._shapes.items() if n.endswith(".weight") and _last(n) in HEADS]
        found = [n for n in wanted if self._shapes[n][1:] == (self.d_model,) and not _STACKED.fullmatch(n)]
        if len(found) > 1:
            raise InvalidRequest(f"wanted is one unembedding; found: {', '.join(found)}", "model")
        if found:
            self._check_dtype(found[0])
            return found[0]
        if _text(self.config).get("tie_word_embeddings") is False:
            raise InvalidRequest("its config says that the unembedding is not the embedding, but has none", "model")
        return self.embedding

    def _check_dtype(self, name: str) -> None:
        if self._dtypes[name] not in _FLOATS:
            raise InvalidRequest(
                f"{name} is {self._dtypes[name]}: quantised; give the checkpoint that it was made from", "model"
            )

    def _is_transposed(self, name: str) -> bool:
        """Whether a row, and not a column, is a neuron."""
        rows, columns = self._shapes[name]
        if rows == columns:
            return str(_text(self.config).get("model_type")) in _TRANSPOSED
        return columns == self.d_model

    def _d_ff(self, name: str) -> int:
        return self._shapes[name][0 if self._is_transposed(name) else 1]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InvalidRequest(f"{folder} is no model's folder: it has no config.json", "model")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}", "model") from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path} must be a JSON object", "model")
    for part in (config, _text(config)):
        if part.get("quantization_config"):
            raise InvalidRequest("the checkpoint is quantised; give the one that it was made from", "model")
    return config


def _paths(folder: Path) -> list[Path]:
    """The model's files. Where there is an index it says which: a folder may hold a second copy."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            paths = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{index} is no index of a model's files: {error!r}", "model") from error
    elif (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InvalidRequest(f"{folder} has no .safetensors; pickles (.bin, .pt) are not opened", "model")
    return paths


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except OSError:
        raise
    except Exception as error:  # the reader documents no list of what it raises
        raise UploadMalformed(f"{path} is not a safetensors file: {error}", "model") from error


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    return next((config[key] for key in _TEXT if isinstance(config.get(key), Mapping)), config)


def _last(name: str) -> str:
    """`down_proj` of `model.layers.3.mlp.down_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _parent(name: str) -> str:
    """`model` of `model.embed_tokens.weight`, "" of `wte.weight`."""
    return name.removesuffix(".weight").rpartition(".")[0]
