"""The limit on how large an edit may be beside the stream: --steering-max-relative-norm and --steering-dosage.

The size of an edit is ‖Δx‖/‖x‖ of one intervention at one token and place, x being the stream before any edit of that
place. Beyond the limit

* ``warn`` makes the edit and says so in the answer;
* ``refuse`` fails the request. The tokens up to the end of the response have been computed by then, so a stream has
  sent them and ends in an error;
* ``cap`` scales the intervention's Δx down to the limit before the next intervention of that place sees the stream.

Every token is measured. A row is capped or not by its own numbers alone, so its bits do not depend on the batch: the
fast kernel edits all rows, and those where something was too large are put back and done again one intervention
after another. Plans stay off a GPU's tables while there is a limit, where passes inside a graph are not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.kernels.reference import Reduce
from steersman.server.engine.carry import Carried
from steersman.server.engine.chain import in_turn
from steersman.server.engine.layout import Work
from steersman.server.engine.sizes import Measured, each

WARN, CAP, REFUSE = ACTIONS = ("warn", "cap", "refuse")

ROUNDING = 1e-4


@dataclass(frozen=True)
class Dosage:
    limit: float  # largest ‖Δx‖/‖x‖
    action: str

    @property
    def bound(self) -> float:
        """What is beyond the limit also when an edit asks for just that: sizes are rounded."""
        return self.limit * (1 + ROUNDING)

    def apply(
        self,
        work: Work,
        x: Tensor,
        residual: Tensor | None,
        gates: Tensor | None,
        reduce: Reduce | None,
        carried: Carried | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Does ``work`` to ``x`` [T, d] in place, within the limit if it is to be kept.

        Returns [rows, n_blocks] ‖Δx‖/‖x‖ as done, and as they would have been without a limit.
        """
        if self.action != CAP:
            asked = work.apply(x, residual, gates, True, reduce, carried)
            assert asked is not None
            return asked, asked
        rows = torch.from_numpy(work.rows).to(x.device)
        before = x[rows]
        asked = work.apply(x, residual, gates, True, reduce, carried)
        assert asked is not None
        over = (asked > self.bound).any(1)
        if not bool(over.any()):
            return asked, asked
        done = asked.clone()
        for group, mine in work.slices():
            chosen = torch.nonzero(over[mine]).flatten()
            if len(chosen):
                picked = rows[mine][chosen.to(x.device)]
                own = before[mine][chosen.to(x.device)].float()
                stream = own if residual is None else own + residual[picked].float()
                theirs = None if gates is None else gates[mine][chosen].to(x.device)
                carry = {i: total[chosen.to(x.device)] for i, total in group.carry(carried, x.device).items()}
                change, sizes = in_turn(stream, group.program, theirs, reduce, carry, self.limit)
                x[picked] = (own + change).to(x.dtype)
                done[chosen + mine.start, : sizes.shape[1]] = sizes.cpu()
        return done, asked

    def note(self, asked: Sequence[Measured], owners: Sequence[Any]) -> None:
        """Tells each request what was over the limit in a pass. ``owners``: all of its, with state, row and count."""
        ends = np.array([o.row + o.count for o in owners])
        for sized in each(asked):
            over = ~(sized.values <= self.bound)  # NaN is no size that anybody asked for
            if not over.any():
                continue
            whose = np.searchsorted(ends, sized.rows[over], side="right")
            for i in np.unique(whose):
                worst = float(sized.values[over][whose == i].max())
                owners[i].state.overdosed(sized.intervention, sized.place.layer, int((whose == i).sum()), worst)
