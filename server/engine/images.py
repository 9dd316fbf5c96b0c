"""A prompt's images: the positions of their tokens, and the sizes in which they were sent.

The contract with vLLM: ``request.mm_features`` has an entry for each image, in the prompt's order, with ``modality``
``image``, the ``mm_hash`` of its content and ``mm_position``: ``offset``, ``length`` and ``is_embed``, a mask of the
positions that take an embedding (None: all). Its ``data`` may be missing and never tells the size that was sent. That
goes through ``BaseMultiModalProcessor.apply(inputs, ...)``, in the same process: ``inputs.mm_data_items`` has the
images as ``ImageProcessorItems`` with ``get_image_size(i)``, None in place of an image that is cached, and the
result's ``mm_hashes["image"][i]`` is the i-th image's hash, which covers ``inputs.hf_processor_mm_kwargs`` too.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

from steersman.server.engine.image_models import Sent, layout_of, read_options
from steersman.steering.errors import InvalidRequest
from steersman.steering.image_grids import Layout
from steersman.steering.prompt_images import PromptImage

REMEMBERED = 65_536  # images; vLLM keeps far fewer of them processed


class Seen:
    """The images that came last, by their hash. Images are processed in several threads."""

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self.capacity = capacity
        self._sent: OrderedDict[str, Sent] = OrderedDict()
        self._lock = Lock()

    def note(self, info: Any, inputs: Any, hashes: Mapping[str, Sequence[str]]) -> None:
        """Remembers the images of one prompt. An image whose size cannot be read is refused when a box is asked for."""
        items = inputs.mm_data_items.get("image")
        for i, mm_hash in enumerate(hashes.get("image", ())):
            sent = None
            with suppress(Exception):  # a request without steering comes this way too, and must not fail here
                size = items.get_image_size(i)
                sent = Sent((int(size.width), int(size.height)), info, read_options(inputs.hf_processor_mm_kwargs))
            with self._lock:
                if sent is not None:
                    self._sent[mm_hash] = sent
                if mm_hash in self._sent:
                    self._sent.move_to_end(mm_hash)
                while len(self._sent) > self.capacity:
                    self._sent.popitem(last=False)

    def get(self, mm_hash: str | None) -> Sent:
        with self._lock:
            sent = self._sent.get(mm_hash or "")
        if sent is None:
            raise InvalidRequest("the size of this image is not known: it was not processed here; use patches")
        return sent


SEEN = Seen()


def patch() -> None:
    """Makes vLLM's image processing note what it is given. Does nothing the second time."""
    from vllm.multimodal.processing import BaseMultiModalProcessor

    if not hasattr(BaseMultiModalProcessor.apply, "__wrapped__"):
        BaseMultiModalProcessor.apply = _wrap_apply(BaseMultiModalProcessor.apply, SEEN)


def _wrap_apply(original: Any, seen: Seen) -> Any:
    @functools.wraps(original)
    def apply(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, inputs, *args, **kwargs)
        seen.note(self.info, inputs, result["mm_hashes"])
        return result

    return apply


def prompt_images(features: Sequence[Any] | None, seen: Seen = SEEN) -> list[PromptImage]:
    """The images of a prompt, in its order. Only positions that take an embedding are theirs, no marks between them."""
    out = []
    for feature in features or ():
        if feature.modality == "image":
            positions = _positions(feature.mm_position)
            out.append(PromptImage(positions, functools.partial(_layout, feature.mm_hash, len(positions), seen)))
    return out


def _positions(place: Any) -> Sequence[int]:
    every = range(place.offset, place.offset + place.length)
    if place.is_embed is None:
        return every
    return [p for p, embedded in zip(every, place.is_embed.tolist(), strict=True) if embedded]


def _layout(mm_hash: str | None, count: int, seen: Seen) -> Layout:
    sent = seen.get(mm_hash)
    layout = layout_of(sent)
    if layout.count != count:
        raise InvalidRequest(f"the image has {count} tokens where its size makes {layout.count}; use patches")
    return layout
