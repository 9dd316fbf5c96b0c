"""What makes a served model a robot policy: an adapter from observations to prompts, and from tokens to actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Picture = NDArray[np.uint8]
"""[height, width, 3], RGB."""


@dataclass(frozen=True)
class Observation:
    """What a robot sees and is told, checked: pictures within limits, numbers finite."""

    pictures: Mapping[str, Picture]  # by the client's names, in the client's order
    instruction: str
    state: Floats | None = None  # [dims], in the robot's units
    unnorm_key: str | None = None  # whose statistics the actions are scaled back by
    seed: int | None = None  # of the noise that a policy may begin from; None: another one each time


@dataclass(frozen=True)
class PolicyPrompt:
    token_ids: list[int]  # the images' places as the model's processor of vLLM wants them
    pictures: list[Picture]
    n_tokens: int  # to generate, greedily and exactly
    stop: tuple[int, ...] = ()  # ids that end it earlier


@dataclass(frozen=True)
class Decoded:
    actions: Floats  # [chunk, dims], in the robot's units
    moves: NDArray[np.bool_]  # [dims], which are motions: the rest (a gripper, as a rule) is absolute
    strays: int  # tokens that stand for no action, and were read as the nearest


class Policy(Protocol):
    """One policy that writes actions as tokens.

    Its methods may be called in any thread; they raise InvalidRequest naming the observation's field.
    """

    name: str  # a metric's label
    cameras: int  # how many pictures an observation must have
    reads_state: bool
    reads_seed: bool  # whether it begins from noise

    def prompt(self, observation: Observation) -> PolicyPrompt: ...

    def decode(self, token_ids: Sequence[int], observation: Observation) -> Decoded:
        """``token_ids``: what was generated, as many as the prompt asked for."""

    def token_values(self) -> dict[int, float]:
        """What each action token stands for, from -1 to 1, before it is scaled to the robot's units."""

    def metadata(self) -> dict[str, Any]:
        """What a client may want to know, as JSON; ``unnorm_keys`` has the dims of each key that there is."""


class FlowPolicy(Protocol):
    """One whose model puts out actions as numbers, by flow matching. Otherwise as :class:`Policy`."""

    name: str
    cameras: int
    reads_state: bool
    reads_seed: bool

    def prompt(self, observation: Observation) -> Any:
        """What the model's own engine takes."""

    def decode(self, output: Floats, observation: Observation) -> Decoded:
        """``output``: of the model, [chunk, dims] or wider."""

    def metadata(self) -> dict[str, Any]: ...
