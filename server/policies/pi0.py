"""π0 (arXiv 2410.24164): actions by flow matching, not as tokens; computed by :mod:`steersman.server.pi0`.

As openpi (https://github.com/Physical-Intelligence/openpi) and Transformers' processor make its input: every camera's
picture resized into a square with black borders, their places before BOS, the instruction and a newline; the state as
numbers, padded with zeros. Actions are the first numbers of each of the chunk's tokens. Both are scaled by mean and
standard deviation.

Described in the checkpoint's ``config.json``::

    "steersman_policy": {
      "type": "pi0",
      "cameras": 2,             # default 1
      "norm_stats": {"droid": {"action": {"mean": [..], "std": [..]}, "proprio": {"mean": [..], "std": [..]}}}
    }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steersman.server.policies.instructions import encoded
from steersman.server.policies.policy import Decoded, Floats, Observation, Picture
from steersman.server.policies.statistics import NormStats, moments
from steersman.steering.errors import ActionsMalformed, InvalidRequest
from steersman.steering.image_grids import inside, inside_of
from steersman.steering.prompt_images import PromptImage

LONGEST = 48  # tokens of text; openpi cuts what is longer


class Description(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["pi0"]
    cameras: int = Field(1, ge=1)
    norm_stats: Any


@dataclass(frozen=True)
class Pi0Prompt:
    """One observation, as the model takes it."""

    token_ids: Sequence[int]  # the pictures' places and the text
    pixels: Tensor  # [cameras, 3, edge, edge] float32, from -1 to 1
    state: Tensor  # [max_state_dim] float32
    noise: Tensor  # [chunk, max_action_dim] float32, what the first step begins from
    images: Sequence[PromptImage]


class Pi0:
    name = "pi0"
    reads_state = True
    reads_seed = True

    def __init__(self, config: Any, about: Any, tokenizer: Any) -> None:
        """``config``: Transformers' ``PI0Config``; ``about``: the checkpoint's ``steersman_policy``.

        Raises ValueError where the description is missing or wrong.
        """
        described = Description.model_validate(about)
        self.tokenizer = tokenizer
        self.cameras = described.cameras
        self.stats = NormStats.read(described.norm_stats, moments)
        self.chunk: int = config.chunk_size
        self.widths: tuple[int, int] = config.max_action_dim, config.max_state_dim
        vision = config.vlm_config.vision_config
        self.edge: int = vision.image_size
        self.patch: int = vision.patch_size
        self.image_token: int = config.vlm_config.image_token_id
        for key, stats in self.stats.actions.items():
            if key not in self.stats.states:
                raise ValueError(f"norm_stats of {key} have no 'proprio', which scales the state")
            for name, dims, most in zip(
                ("action", "proprio"), (stats.dims, self.stats.states[key].dims), self.widths, strict=True
            ):
                if dims > most:
                    raise ValueError(f"norm_stats.{key}.{name} has {dims} dimensions, the model {most}")

    def prompt(self, observation: Observation) -> Pi0Prompt:
        stats = self.stats.states[self.stats.key(observation.unnorm_key)]
        if observation.state is None or observation.state.shape != (stats.dims,):
            raise InvalidRequest(f"must be {stats.dims} numbers, as the statistics have", "state")
        state = torch.zeros(self.widths[1])
        state[: stats.dims] = torch.from_numpy(stats.normalise(observation.state))
        instruction = observation.instruction.strip().replace("_", " ").replace("\n", " ")
        text = encoded(self.tokenizer, f"{instruction}\n", instruction)
        if text[:1] != [self.tokenizer.bos_token_id]:
            text = [self.tokenizer.bos_token_id, *text]
        if len(text) > LONGEST:
            raise InvalidRequest(f"is {len(text)} tokens long; this policy reads {LONGEST}", "instruction")
        pictures = list(observation.pictures.values())
        each = (self.edge // self.patch) ** 2
        images = [
            PromptImage(range(i * each, (i + 1) * each), partial(inside, p.shape[1::-1], self.edge, self.patch))
            for i, p in enumerate(pictures)
        ]
        return Pi0Prompt(
            token_ids=[self.image_token] * (each * len(pictures)) + text,
            pixels=torch.stack([self._pixels(picture) for picture in pictures]),
            state=state,
            noise=self._noise(observation.seed),
            images=images,
        )

    def decode(self, output: Floats, observation: Observation) -> Decoded:
        stats = self.stats.actions[self.stats.key(observation.unnorm_key)]
        if not np.isfinite(output).all():
            raise ActionsMalformed("the model's actions are not finite numbers; steer it less")
        return Decoded(stats.unnormalise(output[:, : stats.dims]), stats.mask, 0)

    def metadata(self) -> dict[str, Any]:
        return {"unnorm_keys": {key: stats.dims for key, stats in self.stats.actions.items()}, "chunk": self.chunk}

    def _pixels(self, picture: Picture) -> Tensor:
        """[3, edge, edge]"""
        image = Image.fromarray(picture)
        (width, height), (left, top) = inside_of(image.size, self.edge)
        square = Image.new("RGB", (self.edge, self.edge))
        square.paste(image.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        return torch.from_numpy(np.asarray(square, np.float32).transpose(2, 0, 1) / 127.5 - 1)

    def _noise(self, seed: int | None) -> Tensor:
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return torch.randn(self.chunk, self.widths[0], generator=generator)
