"""Norms that a pass's edits are fused with: which of its places, and which kernel makes the norm.

:mod:`steersman.server.engine.norms` finds them, and says what holds where one is fused.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from steersman.kernels.norms import DEFINED, Form
from steersman.kernels.tables import Tables
from steersman.steering.plan import Place


class NormKernel(Protocol):
    """``kernels.triton_edit.edit_and_norm`` or ``kernels.cuda_edit.edit_and_norm``; see there."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        entries: Tensor,
        tables: Tables,
        place: int,
        *,
        norms: Tensor | None = None,
        squares: Tensor | None = None,
        form: Form = DEFINED,
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class FusedNorm:
    """A norm that the kernel can make, with the edit of one of ``places``."""

    index: int
    module: Any  # vLLM's
    places: tuple[Place, ...]
    weight: Tensor | None  # [d]
    eps: float
    form: Form
    always: bool  # whether the kernel makes it in all passes


@dataclass
class Fusion:
    norms: list[FusedNorm] = field(default_factory=list)

    def split(
        self, wanted: Collection[Place], on_device: Container[Place], host: Iterable[Container[Place]]
    ) -> tuple[frozenset[Place], dict[int, Place]]:
        """What of a pass's places is left to the hooks between its layers, and the place edited with each norm.

        host: places that the host edits or reads; they are not fused. Only the last one before a norm can be.
        """
        fused: dict[int, Place] = {}
        elsewhere = list(host)
        for norm in self.norms:
            last = next((place for place in reversed(norm.places) if place in wanted), None)
            if last is not None and last in on_device and not any(last in places for places in elsewhere):
                fused[norm.index] = last
        return frozenset(wanted).difference(fused.values()), fused
