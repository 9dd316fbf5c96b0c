"""What the model of scenes learns from: an image with several questions and a caption, in one sequence.

The texts of an image do not see each other, and each starts at the position after the image, so that every one is
computed as if it alone followed the image, which is computed once. Half of the questions are of an object that is
there, the others of any that is not, as in visual instruction data: an object that usually comes with those of a scene
is asked for where it is far more often than where it is not, and that is what misleads the model later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from steersman.clients.lvlm import scenes, vocabulary
from steersman.clients.lvlm.model import SHAPE
from steersman.clients.lvlm.scenes import KINDS, Scene
from steersman.clients.small_llava import BOS, EOS, IMAGE, PAD, look

QUESTIONS = 8  # of an image
CAPTIONS = 0.5  # weight of a caption's tokens beside the answers
TRAIN = 0  # the seed's part of the scenes that are learnt from
_PREFIX = [BOS, *[IMAGE] * SHAPE.patches]
_ASKED = [*vocabulary.ids(vocabulary.question(0)), *vocabulary.ids(vocabulary.REPLY)]
_CAPTION = [*vocabulary.ids(vocabulary.CAPTION), *vocabulary.ids(vocabulary.REPLY)]
_LONGEST = len(vocabulary.ids(vocabulary.caption(range(5))))


@dataclass(frozen=True)
class Batch:
    pictures: Tensor  # uint8 [n, 1, size, size, 3]
    ids: Tensor  # [n, length]
    wanted: Tensor  # [n, length], the token after each; PAD where nothing is learnt
    scenes: list[Scene]


@cache
def layout() -> tuple[Tensor, Tensor]:
    """The positions [1, length], and which tokens see which, [1, 1, length, length] (query, key)."""
    lengths = [len(_ASKED) + 1] * QUESTIONS + [len(_CAPTION) + _LONGEST]
    start = len(_PREFIX)
    part = torch.cat([torch.full((n,), i) for i, n in enumerate([start, *lengths])])
    positions = torch.cat([torch.arange(start), *(torch.arange(start, start + n) for n in lengths)])
    sees = ((part[:, None] == part[None]) | (part[None] == 0)).tril()
    return positions[None], sees[None, None]


def batch(seed: int, step: int, n: int) -> Batch:
    """The ``n`` scenes of a step of training, with what is asked of them."""
    drawn = [scenes.draw(seed, step * n + i) for i in range(n)]
    rng = np.random.default_rng([seed, step, 1])
    rows = [_row(scene, rng) for scene in drawn]
    pictures = torch.from_numpy(np.stack([s.picture for s in drawn]))[:, None]
    return Batch(pictures, torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), drawn)


def _row(scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    given, wanted = list(_PREFIX), [PAD] * len(_PREFIX)
    absent = [k for k in range(len(KINDS)) if k not in scene.kinds]
    for _ in range(QUESTIONS):
        there = rng.random() < 0.5
        kind = int(rng.choice(scene.kinds if there else absent))
        answer = vocabulary.ids(vocabulary.YES if there else vocabulary.NO)
        asked = [*vocabulary.ids(vocabulary.question(kind)), *vocabulary.ids(vocabulary.REPLY)]
        given += asked + answer
        wanted += [PAD] * (len(asked) - 1) + [*answer, EOS]
    said = vocabulary.ids(vocabulary.caption(scene.kinds))
    rest = [PAD] * (_LONGEST - len(said))
    given += [*_CAPTION, *said, *rest]
    wanted += [PAD] * (len(_CAPTION) - 1) + [*said, EOS, *rest]
    return given, wanted


def logits(model: torch.nn.Module, lesson: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [k, words] at the k tokens that something is learnt at, what is wanted [k], and their places [k, 2]."""
    positions, sees = layout()
    embedded = model.get_input_embeddings()(lesson.ids)
    embedded = embedded.masked_scatter((lesson.ids == IMAGE)[..., None], look(model, lesson.pictures))
    llama = model.model.language_model
    out = llama(
        inputs_embeds=embedded,
        attention_mask=sees.expand(len(embedded), -1, -1, -1),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    places = lesson.wanted.nonzero()
    return model.lm_head(out[tuple(places.T)]), lesson.wanted[tuple(places.T)], places


def loss(model: torch.nn.Module, lesson: Batch) -> Tensor:
    found, wanted, places = logits(model, lesson)
    each = torch.nn.functional.cross_entropy(found, wanted, reduction="none")
    captions = places[:, 1] >= len(_PREFIX) + QUESTIONS * (len(_ASKED) + 1)
    return each[~captions].mean() + CAPTIONS * each[captions].mean()


@torch.no_grad()
def right(model: torch.nn.Module, lesson: Batch) -> dict[str, float]:
    """The shares of right answers where it is yes and where it is no, and of right tokens of captions."""
    found, wanted, places = logits(model, lesson)
    hit = found.argmax(-1) == wanted
    captions = places[:, 1] >= len(_PREFIX) + QUESTIONS * (len(_ASKED) + 1)
    chosen = {name: wanted == vocabulary.ids(name)[0] for name in (vocabulary.YES, vocabulary.NO)}
    return {name: float(hit[rows].float().mean()) for name, rows in (*chosen.items(), ("captions", captions))}
