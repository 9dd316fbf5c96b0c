"""What op ``patch`` puts in place of activations: the rows of a kept capture, and the tokens that they go to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steersman.steering.activations import CaptureFile
from steersman.steering.errors import InvalidRequest, NonFinite, OutOfRange, SiteUnsupported, WidthMismatch
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from steersman.steering.spec import Patch, Tokens, TokenSet


class Source:
    """The rows that a patch means. Raises errors that name the patch's field."""

    def __init__(self, capture: CaptureFile, given: Patch) -> None:
        self._capture = capture
        prompts: list[Any] = capture.about["prompts"]
        if given.prompt >= len(prompts):
            raise OutOfRange(f"prompt {given.prompt} does not exist: the capture has {len(prompts)}", "prompt")
        self._prompt = given.prompt
        self.site = _site(given.site, list(capture.about["sites"]))
        self.layers: tuple[int, ...] = tuple(capture.about["sites"][self.site.value])
        self._rows, positions = self._chosen(given, prompts[given.prompt])
        self.tokens: Tokens = _targets(given, positions)
        self.single = len(self._rows) == 1  # a row that goes to all of the tokens; else each to a position of its own

    @property
    def positions(self) -> tuple[int, ...]:
        """Where each of several rows goes."""
        assert isinstance(self.tokens, TokenSet)
        return tuple(self.tokens.positions or ())

    def rows(self, layer: int, width: int) -> Tensor:
        """[n, width] float32, what goes in at ``layer``."""
        rows = torch.from_numpy(self._capture.rows(Place(layer, self.site), self._prompt, self._rows))
        if rows.shape[1] != width:
            raise WidthMismatch(f"is {rows.shape[1]} wide; {self.site.value} is {width} wide at layer {layer}")
        if not torch.isfinite(rows).all():
            raise NonFinite(f"has NaN or infinity at layer {layer}")
        return rows

    def _chosen(self, given: Patch, prompt: dict[str, Any]) -> tuple[list[int], list[int] | None]:
        """Which rows of the prompt's, and the positions that they were captured at; None: they were reduced."""
        if self._capture.reduced:
            if given.source_positions is not None:
                raise InvalidRequest("the capture's tokens were reduced to one row", "source_positions")
            return [0], None
        known: list[int] = prompt["positions"]
        if given.source_positions is None:
            return list(range(len(known))), known
        rows, positions = [], []
        for i, position in enumerate(given.source_positions):
            at = position + len(prompt["token_ids"]) if position < 0 else position
            if at not in known:
                raise OutOfRange(
                    f"position {position} of prompt {given.prompt} was not captured", f"source_positions[{i}]"
                )
            rows.append(known.index(at))
            positions.append(at)
        return rows, positions


def _site(given: Site | None, captured: list[str]) -> Site:
    if given is None and len(captured) > 1:
        raise InvalidRequest(f"the capture has several sites; name one of {', '.join(captured)}", "site")
    site = Site(captured[0]) if given is None else given
    if site.value not in captured:
        raise SiteUnsupported(f"the capture has nothing of {site.value}; it has {', '.join(captured)}", "site")
    return site


def _targets(given: Patch, positions: list[int] | None) -> Tokens:
    """The tokens that the rows go to; of several, their positions in the order of the rows."""
    stated = "tokens" in given.model_fields_set
    if positions is None:
        return given.tokens
    if not stated:
        return _apart(positions, "source_positions")
    if len(positions) == 1:
        return given.tokens
    named = given.tokens.positions if isinstance(given.tokens, TokenSet) else None
    if named is None or given.tokens != TokenSet(positions=named):
        raise InvalidRequest(f"{len(positions)} rows go to as many positions: give tokens.positions alone", "tokens")
    if len(named) != len(positions):
        raise InvalidRequest(f"names {len(named)} positions for {len(positions)} captured rows", "tokens.positions")
    return _apart(named, "tokens.positions")


def _apart(positions: list[int], field: str) -> Tokens:
    if len(set(positions)) != len(positions):
        raise InvalidRequest("a position is named twice", field)
    return TokenSet(positions=positions)
