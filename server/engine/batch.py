"""What the adapters of vLLM's two model runners share: requests in and out, rows, and what cannot be steered.

An adapter's ``attach(runner, runtime)`` wraps three of the runner's methods: where requests enter and leave
(:func:`note_requests`), where the batch is laid out (:func:`rows`), and around the model's forward pass
(``runtime.begin`` before it, ``runtime.end`` after it, also when it raises). Dummy runs and graph captures
must reach neither.

The contract with vLLM: ``SchedulerOutput.finished_req_ids``, ``.scheduled_new_reqs[i]`` with ``req_id``,
``sampling_params``, ``num_computed_tokens`` and ``prompt_token_ids`` or ``prompt_embeds``, and
``.scheduled_cached_reqs`` with ``req_ids`` and ``num_computed_tokens`` of the others. An id that is finished and new
is first finished. A new id that is known already is a request resumed after preemption (V2 only; its parameters are the
same) or the next part of a streamed prompt (its parameters are others). The settings that :func:`refuse` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.server.engine import graphs
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.requests import RequestState
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import args_of
from steersman.steering.tokens import Ints, Selection

EDIT_OP = "steersman::edit"


def note_requests(runtime: Runtime, scheduler_output: Any) -> None:
    """Requests that left and entered the batch since the last step."""
    for request_id in scheduler_output.finished_req_ids:
        runtime.remove_request(request_id)
        if runtime.monitor is not None:
            runtime.monitor.leave(request_id)
    for new in scheduler_output.scheduled_new_reqs:
        args = args_of(new.sampling_params)
        known = runtime.requests.get(new.req_id)
        if known is not None and not _is_same(known, args):
            runtime.remove_request(new.req_id)
        if args is not None:
            runtime.add_request(new.req_id, args)  # a resumed request keeps its state
        if runtime.monitor is not None:
            prompt = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
            runtime.monitor.enter(new.req_id, len(prompt))


def _is_same(state: RequestState, args: Mapping[str, Any] | None) -> bool:
    return (
        args is not None and state.key == str(args["key"]) and state.selection == Selection.from_json(args["selection"])
    )


def begin(runtime: Runtime, batch: Sequence[Scheduled], token_ids: Callable[[int, int], Ints]) -> None:
    """The pass over ``batch`` is about to run, with the graphs of the level that its edits need."""
    runtime.begin(batch, token_ids, replayed=graphs.levels.replays)
    graphs.levels.choose(runtime.device.sites if runtime.device is not None else ())


def end(runtime: Runtime) -> None:
    """The pass is over; what runs outside of one, such as a dummy batch, is stock vLLM's."""
    runtime.end()
    graphs.levels.rest()


def any_steered(runtime: Runtime, request_ids: Iterable[str]) -> bool:
    """Whether the coming pass's rows must be told: a request in it is steered, or statistics are due."""
    if runtime.monitor is not None and runtime.monitor.due:
        return True
    return bool(runtime.requests) and any(r in runtime.requests for r in request_ids)


def starts(scheduler_output: Any) -> dict[str, int]:
    """By request of the coming pass, the position from which the scheduler has it computed; 0 where it does not say."""
    cached = scheduler_output.scheduled_cached_reqs
    known = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    known |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    return {request_id: known.get(request_id, 0) for request_id in scheduler_output.num_scheduled_tokens}


def rows(request_ids: Sequence[str], bounds: Sequence[int] | Ints, starts: Sequence[int] | Ints) -> list[Scheduled]:
    """Request i has the rows from ``bounds[i]`` to ``bounds[i + 1]``, at consecutive positions from ``starts[i]``."""
    return [
        Scheduled(request_id, int(start), int(a), int(b) - int(a))
        for request_id, start, (a, b) in zip(request_ids, starts, pairwise(bounds), strict=True)
    ]


def on_host(tensor: Tensor) -> Ints:
    """A copy, int64, after everything that is queued on the device so far."""
    return tensor.cpu().numpy().astype(np.int64)  # type: ignore[no-any-return]


def refuse(config: Any, device: torch.device, capturable: bool = False) -> None:
    """Raises if the layers would not see the batch's rows as they are laid out here, or would not call us.

    capturable: the edits are made by a kernel that may be part of a CUDA graph.
    """
    parallel, compilation = config.parallel_config, config.compilation_config
    reasons = []
    if parallel.use_ubatching:
        reasons.append("dual batch overlap: a layer sees a part of the batch")
    if parallel.prefill_context_parallel_size > 1:
        reasons.append("prefill context parallelism: ranks hold different tokens")
    if getattr(compilation.pass_config, "enable_sp", False):  # 0.32 no longer has it
        reasons.append("sequence parallelism: ranks hold different tokens")
    if config.cache_config.kv_sharing_fast_prefill:
        reasons.append("fast prefill: later layers see a part of the batch")
    if device.type != "cpu" and not capturable and _captures_edits(compilation):
        reasons.append(
            "CUDA graphs that contain the edits, as there is no kernel for this device: use eager mode, or "
            f"piecewise graphs split at {EDIT_OP}"
        )
    if reasons:
        raise RuntimeError(f"steering does not work with {'; '.join(reasons)}")


def _captures_edits(compilation: Any) -> bool:
    """A captured graph replays the edits of the batch that it was captured with: none."""
    mode = compilation.cudagraph_mode
    if mode is None or not mode:
        return False
    return bool(mode.has_full_cudagraphs()) or EDIT_OP not in (compilation.splitting_ops or ())
