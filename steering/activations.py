"""Captured activations, and the safetensors file that holds them.

Of every prompt the rows of its selected tokens, or one row where they were reduced, at every place; float32. In the
file a tensor is named ``{prompt}.{site}.{layer}``, [tokens, width], or ``{site}.{layer}``, [prompts, width], where
tokens were reduced. The header's entry ``capture`` is JSON: ``model``, ``sites`` (the layers of each), ``reduce``,
``plan`` (the id of the plan under which they were made, null without steering) and, for each of ``prompts``, its
``token_ids`` and the selected ``positions``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from steersman.steering.plan import Place
from steersman.steering.sites import Site

Floats = NDArray[np.float32]
Reduction = Literal["none", "mean", "last"]
"""What is kept of a prompt's selected tokens: each, their mean, or the last of them."""

HEADER = "capture"


@dataclass(frozen=True)
class CapturedPrompt:
    token_ids: list[int]  # of the whole prompt
    positions: list[int]  # the selected ones
    rows: Mapping[Place, Floats]  # [positions, width], or [width] where they were reduced


@dataclass(frozen=True)
class Captured:
    model: str
    places: list[Place]  # in the order of a forward pass
    prompts: list[CapturedPrompt]
    reduce: Reduction
    plan: str | None  # id of the plan under which they were made; None without steering

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for prompt in self.prompts for rows in prompt.rows.values())

    def stacked(self, place: Place) -> Floats:
        """[prompts, width] of reduced tokens."""
        assert self.reduce != "none", "prompts of different lengths cannot be stacked"
        return np.stack([prompt.rows[place] for prompt in self.prompts])


def nbytes(counts: Sequence[int], widths: Sequence[int], reduce: Reduction) -> int:
    """What a capture of ``counts`` tokens of each prompt at places of these ``widths`` takes."""
    return 4 * sum(widths) * (sum(counts) if reduce == "none" else len(counts))


def to_parts(captured: Captured) -> Iterator[bytes | memoryview]:
    """The file's bytes, a tensor at a time."""
    arrays = dict(_tensors(captured))
    header: dict[str, Any] = {"__metadata__": {HEADER: json.dumps(metadata(captured))}}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        yield np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data


def metadata(captured: Captured) -> dict[str, Any]:
    """What the header says."""
    sites: dict[str, list[int]] = {}
    for place in captured.places:
        sites.setdefault(place.site.value, []).append(place.layer)
    prompts = [{"token_ids": p.token_ids, "positions": p.positions} for p in captured.prompts]
    return {
        "model": captured.model, "sites": sites, "reduce": captured.reduce, "plan": captured.plan, "prompts": prompts,
    }  # fmt: skip


class CaptureFile:
    """Such a file, of which what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="numpy") as file:
            self.about: dict[str, Any] = json.loads(file.metadata()[HEADER])

    @property
    def reduced(self) -> bool:
        return bool(self.about["reduce"] != "none")

    def rows(self, place: Place, prompt: int, indices: Sequence[int]) -> Floats:
        """[n, width], some rows of a prompt; of one whose tokens were reduced there is one."""
        name = f"{place.site.value}.{place.layer}"
        with safe_open(self._path, framework="numpy") as file:
            if self.reduced:
                return np.asarray(file.get_slice(name)[prompt : prompt + 1], np.float32)
            low, high = min(indices), max(indices) + 1
            found = file.get_slice(f"{prompt}.{name}")[low:high]
        return np.asarray(found, np.float32)[[index - low for index in indices]]


def _tensors(captured: Captured) -> Iterator[tuple[str, Floats]]:
    if captured.reduce != "none":
        for place in captured.places:
            yield f"{place.site.value}.{place.layer}", captured.stacked(place)
        return
    for i, prompt in enumerate(captured.prompts):
        for place in captured.places:
            yield f"{i}.{place.site.value}.{place.layer}", prompt.rows[place]


def places_of(sites: Mapping[str, Sequence[int]]) -> list[Place]:
    """The places of a header's ``sites``, in the order of a forward pass."""
    return sorted((Place(layer, Site(site)) for site, layers in sites.items() for layer in layers), key=_order)


def _order(place: Place) -> tuple[int, int]:
    return place.order


def cut(data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[Floats]:
    """Arrays of these shapes that follow each other in ``data``."""
    out, at = [], 0
    for shape in shapes:
        size = math.prod(shape)
        out.append(np.frombuffer(data, "<f4", size, at).reshape(shape))
        at += 4 * size
    return out
