"""Labels of neurons: a projection with the words of its tokens, in one file, and the search for neurons by words.

The file is safetensors: the tensors of :class:`Projection`, the vocabulary's texts as two tensors (as the labels of
dictionaries are kept), and under the key `steersman_neurons` of the header a JSON object with the model and how the
labels were made. Nothing in it runs when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.errors import InvalidRequest, LayerMissing, OutOfRange, UploadMalformed
from steersman.steering.labels import pack
from steersman.steering.neurons_projection import Projection

HEADER: Final = "steersman_neurons"
Match = Literal["token", "part"]
Rank = Literal["z", "probability", "count"]
Neuron = tuple[int, int]  # (layer, index in mlp_post)


@dataclass(frozen=True)
class Found:
    neuron: Neuron
    score: float  # in the unit of the rank
    words: tuple[str, ...]  # the tokens that matched, the largest logit first


@dataclass(frozen=True)
class NeuronLabels:
    """`widths` has the labelled layers in ascending order; neurons are numbered through them in the tensors' rows."""

    about: Mapping[str, Any]  # {"model": {"id", "n_layers", "d_model"}, ...}: what the labels were made from, and how
    widths: Mapping[int, int]  # layer -> d_ff
    projection: Projection
    vocabulary: Sequence[str]  # a text for each token id

    def __post_init__(self) -> None:
        count = sum(self.widths.values())
        for field in fields(Projection):
            tensor = getattr(self.projection, field.name)
            if len(tensor) != count or tensor.shape[1:] != self.projection.tokens.shape[1:][: tensor.dim() - 1]:
                raise UploadMalformed(f"{field.name} is {[*tensor.shape]} for {count} neurons", "labels")
        tokens = self.projection.tokens
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.vocabulary):
            raise UploadMalformed("tokens names tokens beyond the vocabulary", "labels")

    @cached_property
    def starts(self) -> dict[int, int]:
        """The first row of each layer."""
        starts, at = {}, 0
        for layer, width in self.widths.items():
            starts[layer] = at
            at += width
        return starts

    @property
    def d_ff(self) -> int | None:
        """The width of every layer, None where they differ."""
        widths = set(self.widths.values())
        return widths.pop() if len(widths) == 1 else None

    def row(self, neuron: Neuron) -> int:
        layer, index = neuron
        if layer not in self.widths:
            raise LayerMissing(f"layer {layer} is not labelled; labelled are {', '.join(map(str, self.widths))}")
        if not 0 <= index < self.widths[layer]:
            raise OutOfRange(f"layer {layer} has neurons 0 to {self.widths[layer] - 1}, not {index}")
        return self.starts[layer] + index

    def neuron(self, row: int) -> Neuron:
        layer = max(layer for layer, start in self.starts.items() if start <= row)
        return layer, row - self.starts[layer]

    def rows(self, layers: Sequence[int] | None = None) -> Tensor:
        """The rows of some layers' neurons, of all without `layers`."""
        wanted = self.widths if layers is None else layers
        return torch.cat([torch.arange(self.widths[layer]) + self.row((layer, 0)) for layer in wanted])

    def words(self, neuron: Neuron) -> list[str]:
        """Its tokens, the largest logit first."""
        return [self.vocabulary[token] for token in self.projection.tokens[self.row(neuron)].tolist()]

    @cached_property
    def z(self) -> Tensor:
        """[n, k] by how many standard deviations each logit stands above the neuron's mean over the vocabulary."""
        p = self.projection
        return (p.logits - p.mean[:, None]) / p.deviation.clamp_min(1e-20)[:, None]

    def search(
        self, words: Sequence[str], *, match: Match = "token", rank: Rank = "z", layers: Sequence[int] | None = None
    ) -> list[Found]:
        """Neurons that have a matching token among theirs, the best first.

        match: `token`, a token that is the word but for case and spaces at its ends; `part`, one that contains it.
        rank: by the sum over matching tokens of their z-scores (how much they stand out), of their probabilities (how
        strongly the neuron writes them; it grows with the column's length), or by their number, and then by z.
        """
        hit = torch.zeros(len(self.vocabulary), dtype=torch.bool)
        hit[self.matching(words, match)] = True
        p, rows = self.projection, self.rows(layers)
        hits = hit[p.tokens[rows].long()]  # [rows, k]
        z = (self.z[rows] * hits).sum(1)
        if rank == "z":
            score = z
        elif rank == "probability":
            score = ((p.logits[rows] - p.logsumexp[rows][:, None]).exp() * hits).sum(1)
        else:
            score = hits.sum(1).float()
        by_z = torch.argsort(z, descending=True, stable=True)
        order = by_z[torch.argsort(score[by_z], descending=True, stable=True)]
        out = []
        for i in order[hits.any(1)[order]].tolist():
            row = int(rows[i])
            found = tuple(self.vocabulary[token] for token in p.tokens[row][hits[i]].tolist())
            out.append(Found(self.neuron(row), float(score[i]), found))
        return out

    def matching(self, words: Sequence[str], match: Match) -> list[int]:
        """The ids of the tokens that match any of the words."""
        wanted = [word.strip().casefold() for word in words]
        if not wanted or not all(wanted):
            raise InvalidRequest("needs words to look for", "words")
        texts = [text.strip().casefold() for text in self.vocabulary]
        if match == "token":
            found = [i for i, text in enumerate(texts) if text in wanted]
            if not found:
                raise InvalidRequest(f"no token is {' or '.join(map(repr, wanted))}; look for a part of one", "words")
            return found
        return [i for i, text in enumerate(texts) if any(word in text for word in wanted)]

    def write(self, path: str | Path) -> None:
        tensors = {field.name: getattr(self.projection, field.name) for field in fields(Projection)}
        texts = pack(dict(enumerate(self.vocabulary)), len(self.vocabulary))
        about = {**self.about, "widths": [[layer, width] for layer, width in self.widths.items()]}
        Path(path).write_bytes(safetensors.torch.save({**tensors, **texts}, {HEADER: json.dumps(about)}))

    @classmethod
    def read(cls, path: str | Path) -> NeuronLabels:
        """`UploadMalformed` where the file is not one that `write` made."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            widths = {int(layer): int(width) for layer, width in about.pop("widths")}
            projection = Projection(*(tensors[field.name] for field in fields(Projection)))
            data, ends = tensors["labels"].numpy().tobytes(), tensors["label_ends"].tolist()
        except OSError:
            raise
        except Exception as error:  # the reader documents no list of what it raises
            raise UploadMalformed(f"{path} is no file of neuron labels: {error!r}", "labels") from error
        vocabulary = [data[a:b].decode("utf-8", "replace") for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        return cls(about, widths, projection, vocabulary)


def neurons_asset(
    name: str, neurons: Sequence[Neuron], model: Mapping[str, Any], d_ff: int | None, **about: Any
) -> Asset:
    """A set of neurons to be stored. `about`: `description`, `source`, `provenance` and other fields of an asset."""
    fields = {"d_ff": d_ff} if d_ff is not None else {}
    pairs = tuple((int(layer), int(index)) for layer, index in neurons)
    return Asset(
        parse_metadata({"name": name, "kind": "neurons", "model": dict(model), "neurons": pairs, **fields, **about})
    )
