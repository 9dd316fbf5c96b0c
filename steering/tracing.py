"""Causal tracing: which component, at which layer, for which tokens carries an answer (FCCT, arXiv 2511.05923).

A question is run three ways: clean; corrupted, its picture or the embeddings of its subject noised; and patched, the
corrupted run with one component of one layer put back to the clean run's for one group of tokens. With P the
probability of the answer's first token

    RR = (P_patched − P_corrupted) / (P_clean − P_corrupted)

is how much of the answer comes back. The paper does not say what it does where the corruption hardly matters, which
makes RR a quotient of noises: here a question counts if P_clean − P_corrupted is at least ``least``.

The paper's seven groups, in the order of a prompt: the picture's tokens before, of and after the object, the words
before, of and after the object's name, and the last token. Rules where the paper gives none: of what is outside the box
or the name, *early* is what comes before its first token and *late* the rest; text before the picture is in no group,
because in a causal model no noise on the picture reaches it; the last token is in no other group.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from steersman.steering.recipes import SOURCES, TARGETS, ByComponent, best
from steersman.steering.sites import Site

Group = Literal["early_visual", "object_visual", "late_visual", "early_text", "object_text", "late_text", "last"]
GROUPS: Final[tuple[Group, ...]] = (
    "early_visual", "object_visual", "late_visual", "early_text", "object_text", "late_text", "last",
)  # fmt: skip
Component = Literal["attn", "mlp", "hidden"]
COMPONENTS: Final[dict[Component, Site]] = {
    "attn": Site.ATTN_OUT,
    "mlp": Site.MLP_OUT,
    "hidden": Site.RESID_POST,
}
"""The paper's a, m and h."""
LEAST: Final = 0.01  # of P_clean − P_corrupted
Picture = NDArray[np.uint8]  # [height, width, 3]
Rates = NDArray[np.float64]  # [layers], NaN where there is none


def groups_of(
    length: int, picture: Sequence[int] = (), boxed: Sequence[int] | None = None, named: Sequence[int] | None = None
) -> dict[Group, list[int]]:
    """The positions of each group in a prompt of so many tokens; groups without any are left out.

    picture: of its tokens, ascending. boxed: of those that show the object. named: of the object's name in the text;
    those before the picture or in it are ignored. Without a box, or a name, the groups that it divides are left out.
    """
    last = length - 1
    start = picture[-1] + 1 if len(picture) else 0
    text = [p for p in range(start, last) if p not in set(picture)]
    found: dict[Group, list[int]] = {"last": [last]}
    found["early_visual"], found["object_visual"], found["late_visual"] = _parts(picture, boxed)
    found["early_text"], found["object_text"], found["late_text"] = _parts(text, named)
    return {name: found[name] for name in GROUPS if found[name]}


def _parts(positions: Sequence[int], chosen: Sequence[int] | None) -> tuple[list[int], list[int], list[int]]:
    inside = sorted(set(positions) & set(chosen or ()))
    if not inside:
        return [], [], []
    outside = [p for p in positions if p not in set(inside)]
    return [p for p in outside if p < inside[0]], inside, [p for p in outside if p > inside[0]]


def noised(picture: Picture, sigma: float, seed: int) -> Picture:
    """Gaussian noise of standard deviation ``sigma``, in the 255 steps of a colour, on every pixel and channel.

    Rounded and cut to 0 .. 255. The noise is decided by ``seed`` and the picture, not by which question comes when.
    """
    random = np.random.default_rng([seed, zlib.crc32(picture.tobytes())])
    noisy = picture + random.normal(0.0, sigma, picture.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def embedding_noise(count: int, width: int, sigma: float, seed: int) -> NDArray[np.float32]:
    """[count, width] Gaussian noise for the embeddings of as many tokens."""
    return np.random.default_rng(seed).normal(0.0, sigma, (count, width)).astype(np.float32)


def window(layer: int, width: int, layers: Sequence[int]) -> list[int]:
    """Those of ``layers`` that a window of ``width`` layers around ``layer`` covers; at the ends it is cut."""
    low = layer - (width - 1) // 2
    return [each for each in layers if low <= each < low + width]


def recovery(patched: float, corrupted: float, clean: float, least: float = LEAST) -> float:
    """RR, NaN where the corruption lowers the answer's probability by less than ``least``."""
    lost = clean - corrupted
    return (patched - corrupted) / lost if lost >= least and lost > 0 else math.nan


@dataclass(frozen=True)
class Traced:
    """One question's probabilities."""

    clean: float
    corrupted: float
    patched: Mapping[Component, Mapping[Group, Sequence[float | None]]]  # [layers]; None: not run there

    def rates(self, component: Component, group: Group, least: float) -> Rates:
        """[layers] RR."""
        values = self.patched.get(component, {}).get(group, ())
        return np.array(
            [math.nan if p is None else recovery(p, self.corrupted, self.clean, least) for p in values], float
        )


@dataclass(frozen=True)
class Table:
    """Mean recovery rates of several questions."""

    rates: Mapping[Component, Mapping[Group, Rates]]  # [layers] each
    counts: Mapping[Component, Mapping[Group, int]]  # questions that each is the mean of
    questions: int
    used: int  # of these, whose corruption matters

    @classmethod
    def of(cls, questions: Iterable[Traced], least: float = LEAST) -> Table:
        """A question's group that it lacks, such as an object's without a box, is left out of that group's mean."""
        every = list(questions)
        rates: dict[Component, dict[Group, Rates]] = {}
        counts: dict[Component, dict[Group, int]] = {}
        for component in COMPONENTS:
            for group in GROUPS:
                found = [q.rates(component, group, least) for q in every]
                rows = [row for row in found if np.isfinite(row).any()]
                if rows:
                    rates.setdefault(component, {})[group] = _means(rows)
                    counts.setdefault(component, {})[group] = len(rows)
        used = sum(math.isfinite(recovery(q.clean, q.corrupted, q.clean, least)) for q in every)
        return cls(rates, counts, len(every), used)


def _means(rows: Sequence[Rates]) -> Rates:
    columns = [[v for v in column if math.isfinite(v)] for column in zip(*rows, strict=True)]
    return np.array([fmean(column) if column else math.nan for column in columns])


def ranked(rates: Rates, count: int) -> tuple[int, ...]:
    """The ``count`` layers of the highest rates, ascending; those without a rate come last and are never taken."""
    known = np.where(np.isfinite(rates), rates, -math.inf)
    return tuple(layer for layer in best(known.tolist(), count) if math.isfinite(rates[layer]))


def recipe(
    table: Table, lambda_a: float, lambda_m: float, sources: int = SOURCES, targets: int = TARGETS
) -> dict[str, object]:
    """The fields of an IRI recipe that come of tracing: rates at the last token, and the layers that they rank first.

    Attention and MLP are ranked separately. Raises ValueError where the table has no rates of the last token.
    """
    parts = {name: table.rates.get(name, {}).get("last") for name in ("attn", "mlp")}
    missing = [name for name, rates in parts.items() if rates is None or not np.isfinite(rates).any()]
    if missing:
        raise ValueError(f"a recipe needs the recovery rates of {' and '.join(missing)} at the last token")
    known = {name: rates for name, rates in parts.items() if rates is not None}
    chosen = {
        field: ByComponent(**{name: ranked(rates, count) for name, rates in known.items()}).model_dump(mode="json")
        for field, count in (("sources", sources), ("targets", targets))
    }
    numbers = {f"rr_{name}": [0.0 if math.isnan(v) else float(v) for v in rates] for name, rates in known.items()}
    return {**numbers, **chosen, "lambda_a": lambda_a, "lambda_m": lambda_m}


def fall(ablated: float, clean: float) -> float:
    """How much of the answer's probability is lost, as a share of it; negative where it grows."""
    return (clean - ablated) / clean if clean > 0 else math.nan


@dataclass(frozen=True)
class Ablated:
    """One question's probabilities with single parts of the model taken out, in the order of the units."""

    clean: float
    right: bool  # whether the clean run's likeliest token is the answer's
    without: Sequence[float]  # [units]
    stays: Sequence[bool]  # [units] whether the likeliest token is still the answer's
    set: str = ""


@dataclass(frozen=True)
class Falls:
    """Means over the questions of a set that the clean run answers rightly."""

    probability: Rates  # [units] mean share of the answer's probability that is lost
    accuracy: Rates  # [units] share of them that are no longer answered rightly
    questions: int
    used: int  # of these, answered rightly

    @classmethod
    def of(cls, questions: Iterable[Ablated]) -> dict[str, Falls]:
        """By set, in the order in which they come."""
        by_set: dict[str, list[Ablated]] = {}
        for question in questions:
            by_set.setdefault(question.set, []).append(question)
        return {name: cls._of(found) for name, found in by_set.items()}

    @classmethod
    def _of(cls, questions: Sequence[Ablated]) -> Falls:
        used = [q for q in questions if q.right]
        units = len(questions[0].without)
        lost = np.array([[fall(p, q.clean) for p in q.without] for q in used]).reshape(-1, units)
        wrong = np.array([[not stays for stays in q.stays] for q in used], float).reshape(-1, units)
        nothing = np.full(units, math.nan)
        probability, accuracy = (rows.mean(0) if len(used) else nothing for rows in (lost, wrong))
        return cls(probability, accuracy, len(questions), len(used))
