"""Teaches the vision tower to say what each patch shows, before the language model is trained.

A projected patch is compared with the word embeddings of the colours and of the shapes, as CLIP compares an image with
texts, so that the language model finds in an image the words that it reads in a question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from steersman.clients.lvlm import vocabulary
from steersman.clients.lvlm.model import SHAPE
from steersman.clients.lvlm.scenes import COLOURS, KINDS, SHAPES, Scene, draw
from steersman.clients.small_llava import look

LEAST = 0.1  # of a patch, what an object covers at least to be what the patch shows
SHARP = 10.0  # of the comparison, by cosines


def shown(scenes: Sequence[Scene]) -> Tensor:
    """The kind that each patch shows, [scenes, patches]; as many as there are kinds stands for none."""
    seen = torch.stack([torch.from_numpy(s.shown) for s in scenes]).long()
    n, side, patch = len(scenes), SHAPE.size // SHAPE.patch, SHAPE.patch
    cells = seen.reshape(n, side, patch, side, patch).permute(0, 1, 3, 2, 4).reshape(n, side * side, -1)
    counts = torch.stack([(cells == kind).sum(-1) for kind in range(len(KINDS))], dim=-1)
    most, which = counts.max(-1)
    return torch.where(most >= LEAST * patch * patch, which, len(KINDS))


class Naming(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The loss of naming the patches' colours and shapes. ``nothing``: two embeddings for a patch without an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        width = SHAPE.width
        self.nothing = nn.Parameter(torch.randn(2, width, generator=torch.Generator().manual_seed(0)))
        self.sharp = nn.Parameter(torch.tensor(SHARP))

    def logits(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Of colours and of shapes, the last for none: [n, patches, 5] each."""
        found = look(self.model, pictures)
        words = self.model.get_input_embeddings().weight
        out = []
        for i, names in enumerate((COLOURS, SHAPES)):
            rows = torch.cat([words[[vocabulary.ids(name)[0] for name in names]], self.nothing[i : i + 1]])
            out.append(self.sharp * nn.functional.cosine_similarity(found[:, :, None], rows[None, None], dim=-1))
        return out[0], out[1]

    def forward(self, pictures: Tensor, kinds: Tensor) -> Tensor:
        colours, shapes = self.logits(pictures)
        none = kinds == len(KINDS)
        loss = nn.functional.cross_entropy(colours.flatten(0, 1), torch.where(none, 4, kinds // 4).flatten())
        return loss + nn.functional.cross_entropy(shapes.flatten(0, 1), torch.where(none, 4, kinds % 4).flatten())


def batch(seed: int, step: int, n: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, 1, size, size, 3] of a step of training, and the kinds that their patches show."""
    scenes = [draw(seed, step * n + i) for i in range(n)]
    return torch.from_numpy(np.stack([s.picture for s in scenes]))[:, None], shown(scenes)


@torch.no_grad()
def right(naming: Naming, pictures: Tensor, kinds: Tensor) -> dict[str, float]:
    """Of the patches that show an object, the shares whose colour, and whose colour and shape are named."""
    colours, shapes = (each.argmax(-1) for each in naming.logits(pictures))
    some = kinds < len(KINDS)
    colour = (colours == kinds // 4)[some]
    both = colour & (shapes == kinds % 4)[some]
    return {"colours": float(colour.float().mean()), "kinds": float(both.float().mean())}
