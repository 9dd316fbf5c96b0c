"""Which tokens an intervention edits: selectors resolved against one request's prompt.

A token is edited where it is fed in, so position p < prompt length belongs to the prompt (its last
token yields the first generated one) and every later position is a generated token. For the prompt
everything is known when the request arrives, so its selection is a list of runs. For generated
positions a :class:`Rule` says what to do; it is a constant unless absolute positions or token ids are named.

The active interventions at one position are a bit mask, bit i for intervention i. Chunked prefill,
cache hits, preemption and speculation change when a position is computed, never its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from steersman.steering.errors import InvalidRequest
from steersman.steering.prompt_images import PromptImage, image_positions
from steersman.steering.spec import Tokens, TokenSet

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """What selectors may ask about a prompt. The finders are called only when a selector needs them."""

    token_ids: Sequence[int]
    find_text: Callable[[str], list[int]] | None = None  # substring -> positions of the tokens that overlap it
    find_role: Callable[[str], list[int]] | None = None  # role -> positions of its messages' contents
    images: Sequence[PromptImage] = ()

    @property
    def length(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Rule:
    """A selector on positions at or after the prompt's end."""

    base: bool
    positions: frozenset[int] = frozenset()
    ranges: tuple[tuple[int, int], ...] = ()
    token_ids: frozenset[int] = frozenset()
    exclude: Rule | None = None

    @property
    def constant(self) -> bool:
        named = self.positions or self.ranges or self.token_ids
        return not named and (self.exclude is None or self.exclude.constant)

    @property
    def always(self) -> bool:
        """The answer of a constant rule."""
        return self.base and not (self.exclude is not None and self.exclude.always)

    def mask(self, positions: Ints, token_ids: Callable[[], Ints]) -> Mask:
        """[n] bool for tokens at absolute ``positions``, whose ids ``token_ids()`` reads if they matter."""
        chosen = np.full(len(positions), self.base)
        if self.positions:
            chosen |= np.isin(positions, list(self.positions))
        for a, b in self.ranges:
            chosen |= (positions >= a) & (positions < b)
        if self.token_ids:
            chosen |= np.isin(token_ids(), list(self.token_ids))
        if self.exclude is not None:
            chosen &= ~self.exclude.mask(positions, token_ids)
        return chosen

    def to_json(self) -> dict[str, object]:
        out: dict[str, object] = {"base": self.base}
        if self.positions:
            out["positions"] = sorted(self.positions)
        if self.ranges:
            out["ranges"] = [list(r) for r in self.ranges]
        if self.token_ids:
            out["token_ids"] = sorted(self.token_ids)
        if self.exclude is not None:
            out["exclude"] = self.exclude.to_json()
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Rule:
        def ints(key: str) -> list[int]:
            value = data.get(key, [])
            assert isinstance(value, list)
            return value

        exclude, ranges = data.get("exclude"), data.get("ranges", [])
        assert isinstance(ranges, list)
        assert exclude is None or isinstance(exclude, Mapping)
        return cls(
            base=bool(data["base"]),
            positions=frozenset(ints("positions")),
            ranges=tuple((int(a), int(b)) for a, b in ranges),
            token_ids=frozenset(ints("token_ids")),
            exclude=None if exclude is None else cls.from_json(exclude),
        )


_SHORTHAND: dict[str, TokenSet] = {
    "all": TokenSet(prompt=True, generated=True),
    "prompt": TokenSet(prompt=True),
    "generated": TokenSet(generated=True),
    "last_prompt": TokenSet(last=1),
}


def expand(tokens: Tokens) -> TokenSet:
    """A selector's object form; one that only excludes means everything else."""
    if isinstance(tokens, str):
        return _SHORTHAND[tokens]
    if tokens.model_fields_set == {"exclude"}:
        return TokenSet(prompt=True, generated=True, exclude=tokens.exclude)
    return tokens


def select(tokens: Tokens, prompt: Prompt, path: str = "tokens") -> tuple[Mask, Rule]:
    """The selected prompt positions, [prompt.length] bool, and the rule for what is generated."""
    chosen = expand(tokens)
    mask = np.full(prompt.length, chosen.prompt)
    positions = [p + prompt.length if p < 0 else p for p in chosen.positions or ()]
    ranges = [_absolute(r, prompt.length, f"{path}.ranges[{i}]") for i, r in enumerate(chosen.ranges or ())]
    inside = [p for p in positions if 0 <= p < prompt.length]
    mask[inside] = True
    for a, b in ranges:
        mask[max(a, 0) : max(b, 0)] = True
    if chosen.last:
        mask[-chosen.last :] = True
    if chosen.token_ids:
        mask |= np.isin(np.asarray(prompt.token_ids), chosen.token_ids)
    if chosen.image is not False:
        mask[image_positions(chosen, prompt.images, path)] = True
    for text in [chosen.text] if isinstance(chosen.text, str) else chosen.text or ():
        mask[_found(prompt.find_text, text, f"{path}.text")] = True
    for role in chosen.roles or ():
        mask[_found(prompt.find_role, role, f"{path}.roles")] = True
    exclude: Rule | None = None
    if chosen.exclude is not None:
        excluded, exclude = select(chosen.exclude, prompt, f"{path}.exclude")
        mask &= ~excluded
    rule = Rule(
        base=chosen.generated,
        positions=frozenset(p for p in positions if p >= prompt.length),
        ranges=tuple((a, b) for a, b in ranges if b > prompt.length),
        token_ids=frozenset(chosen.token_ids or ()),
        exclude=exclude,
    )
    return mask, rule


def _absolute(bounds: tuple[int, int], length: int, path: str) -> tuple[int, int]:
    a, b = (p + length if p < 0 else p for p in bounds)
    if a > b:
        raise InvalidRequest(f"the range [{bounds[0]}, {bounds[1]}) ends before it begins", param=path)
    return a, b


def _found(finder: Callable[[str], list[int]] | None, what: str, path: str) -> list[int]:
    if finder is None:
        raise InvalidRequest("this request has no text or messages to search; use positions instead", param=path)
    return finder(what)


@dataclass(frozen=True)
class Selection:
    """The masks of all of a plan's interventions over one request, as sent to the engine."""

    prompt_length: int
    runs: tuple[tuple[int, int, int], ...]  # (start, end, mask) over the prompt, masks of 0 left out
    generated: int  # mask of the interventions whose rule is constantly true
    rules: Mapping[int, Rule] = field(default_factory=dict)  # intervention -> rule that is not constant

    @classmethod
    def build(cls, selectors: Sequence[Tokens], prompt: Prompt, paths: Sequence[str]) -> Selection:
        """``selectors[i]`` is intervention i's; ``paths[i]`` names it in errors."""
        bits = np.zeros(prompt.length, dtype=np.uint64)
        generated, rules = 0, {}
        for i, (tokens, path) in enumerate(zip(selectors, paths, strict=True)):
            mask, rule = select(tokens, prompt, path)
            bits[mask] |= np.uint64(1 << i)
            if not rule.constant:
                rules[i] = rule
            elif rule.always:
                generated |= 1 << i
        return cls(prompt.length, _runs(bits), generated, rules)

    @property
    def first(self) -> int:
        """The first position that may be edited."""
        if self.runs:
            return self.runs[0][0]
        return self.prompt_length

    @property
    def anything(self) -> bool:
        return bool(self.runs or self.generated or self.rules)

    def masks(self, start: int, end: int, token_ids: Callable[[], Ints]) -> NDArray[np.uint64]:
        """[end − start] bit masks of the positions from ``start`` to ``end``.

        ``token_ids()`` gives the ids of exactly these tokens; called only for rules that need them.
        """
        out = np.zeros(end - start, dtype=np.uint64)
        if start < self.prompt_length:
            for a, b, mask in self.runs:
                if a < end and b > start:
                    out[max(a, start) - start : min(b, end) - start] = mask
        tail = max(self.prompt_length, start)
        if tail < end:
            out[tail - start :] = self.generated
            for i, rule in self.rules.items():
                chosen = rule.mask(np.arange(tail, end), lambda: token_ids()[tail - start :])
                out[tail - start :][chosen] |= np.uint64(1 << i)
        return out

    def count(self, intervention: int, total: int, token_ids: Callable[[], Ints]) -> int:
        """How many of the positions from 0 to ``total`` the intervention edits."""
        bit = np.uint64(1 << intervention)
        return int(((self.masks(0, total, token_ids) & bit) != 0).sum())

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_length": self.prompt_length,
            "runs": [list(r) for r in self.runs],
            "generated": self.generated,
            "rules": {str(i): r.to_json() for i, r in self.rules.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Selection:
        runs, rules = data["runs"], data["rules"]
        assert isinstance(runs, list)
        assert isinstance(rules, Mapping)
        return cls(
            prompt_length=int(str(data["prompt_length"])),
            runs=tuple((int(a), int(b), int(m)) for a, b, m in runs),
            generated=int(str(data["generated"])),
            rules={int(i): Rule.from_json(r) for i, r in rules.items()},
        )


def _runs(bits: NDArray[np.uint64]) -> tuple[tuple[int, int, int], ...]:
    """Maximal runs of equal non-zero values."""
    if not len(bits):
        return ()
    edges = [0, *(np.flatnonzero(np.diff(bits)) + 1).tolist(), len(bits)]
    return tuple((a, b, int(bits[a])) for a, b in pairwise(edges) if bits[a])
