"""The steered requests of a forward pass: which rows are whose, and what they are told when something fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from steersman.server.engine.captures import Capture
from steersman.server.engine.requests import Masks, RequestState
from steersman.steering.tokens import Ints

logger = logging.getLogger(__name__)


class Scheduled(NamedTuple):
    """The rows of one request in this step's batch."""

    request_id: str
    start: int  # absolute position of the first row
    row: int
    n: int


@dataclass
class Owner:
    """A steered request's rows in this step."""

    state: RequestState
    row: int
    count: int
    start: int
    masks: Masks  # [count] the interventions that select each row
    chosen: int  # all of these together
    gates: list[Tensor]  # [count] each, the request's gates in this pass
    on_device: bool = False  # whether the device does all that its plan asks

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)

    @property
    def capture(self) -> Capture | None:
        return self.state.capture


def own(state: RequestState, entry: Scheduled, token_ids: Callable[[int, int], Ints]) -> Owner:
    """The rows of ``entry``, a request's; ``token_ids(row, count)`` reads what they are fed."""
    _, start, row, count = entry
    selection = state.selection
    if start >= selection.prompt_length and state.constant is not None:
        masks, chosen = state.constant if count == 1 else state.constant.repeat(count), selection.generated
    else:
        masks = selection.masks(start, start + count, lambda: token_ids(row, count))
        chosen = int(np.bitwise_or.reduce(masks))
    gates = [g.at_start(start, count, selection.prompt_length) for g in state.gates]
    return Owner(state, row, count, start, masks, chosen, gates)


def fail(states: Iterable[RequestState], message: str) -> None:
    """To be called where an exception is handled: it becomes the requests' own, the first one of each is kept."""
    fresh = [state for state in states if state.error is None]
    if fresh:
        logger.exception(message)
    for state in fresh:
        state.error = message
