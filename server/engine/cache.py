"""Prefix caching that stays exact: KV computed under steering is reused only where the edits are the same.

The contract with vLLM: a block's hash covers its parent's hash, its tokens and the extra keys that
``kv_cache_utils.generate_block_hash_extra_keys(request, start, end, mm_index)`` returns as
``(keys or None, mm_index)``; the modules named in ``IMPORTERS`` bound that function by name. Keys are tagged tuples
(vLLM's events take ``key[1]`` of each).

Our key says which plan edits the block's tokens and which of its interventions edit which token. Blocks
without an edited token get none: before the first edit they are shared with everybody, after it their
parent's hash tells them apart. Where a gate decides once per request, or a restoration counts from the
prompt's end, it depends on where the prompt ends, so that is part of the key.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman.server.engine.wire import args_of
from steersman.steering.tokens import Selection

OWNER = "vllm.v1.core.kv_cache_utils"
NAME = "generate_block_hash_extra_keys"
IMPORTERS = ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")


def patch() -> None:
    """Adds our key to vLLM's extra keys. Does nothing the second time."""
    owner = importlib.import_module(OWNER)
    original = getattr(owner, NAME)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def with_steering(request: Any, start: int, end: int, mm_index: int) -> Any:
        keys, mm_index = original(request, start, end, mm_index)
        ours = block_key(request, start, end)
        return (keys if ours is None else (*(keys or ()), ours)), mm_index

    setattr(owner, NAME, with_steering)
    for name in IMPORTERS:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # this vLLM has no such module
        if getattr(module, NAME, None) is original:
            setattr(module, NAME, with_steering)


def _selection(request: Any, args: Mapping[str, Any]) -> Selection:
    """The request's selection, read once; a streamed prompt's next part brings other parameters."""
    known = getattr(request, "_steersman", None)
    if known is None or known[0] is not args:
        known = request._steersman = (args, Selection.from_json(args["selection"]))
    found: Selection = known[1]
    return found


def block_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of the block of tokens from ``start`` to ``end``; None when nothing edits it."""
    args = args_of(request.sampling_params)
    if args is None:
        return None
    selection = _selection(request, args)
    masks = selection.masks(start, end, lambda: np.asarray(request.all_token_ids[start:end], dtype=np.int64))
    if not masks.any():
        return None
    pattern = hashlib.sha256(masks.tobytes()).hexdigest()[:16]
    decides = f":{selection.prompt_length}" if args["decides"] else ""
    return "steersman", f"{args['edits']}:{pattern}{decides}"
