"""The adapter for vLLM's model runner V1 (``v1/worker/gpu_model_runner.py``; CPU's is a subclass).

The contract: a step calls ``_update_states(scheduler_output)`` once, which takes requests in and out, and then, if it
has tokens, ``_prepare_inputs(scheduler_output, num_scheduled_tokens)``, which lays out the batch: request i of
``input_batch.req_ids`` has ``num_scheduled_tokens[i]`` rows, in order, at consecutive positions from
``input_batch.num_computed_tokens_cpu[i]``, fed with ``input_ids.gpu``; then ``_model_forward``, which runs the model
or replays its CUDA graph, and which dummy runs, captures and drafters do not call.

What the host knows (0.26, 0.32, 0.33): without speculation, everything but the ids of tokens just sampled, which are
read from the device. Where speculation meets asynchronous scheduling (``use_async_spec_decode``),
``num_computed_tokens_cpu`` takes the last step's drafts for accepted until after this step's forward pass;
``positions`` on the device is right, so it is read, at the price of waiting for the last step, and only while a
request in the batch is steered. ``positions`` counts tokens, also for models with M-RoPE.

Between the two the step's graph is chosen, or that it has none (:mod:`steersman.server.engine.graphs`), by
``cudagraph_dispatcher.dispatch``.

A preempted request stays known to the runner and comes back among the cached ones, so that our state stays too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.server.engine import batch as shared
from steersman.server.engine import graphs
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.steering.tokens import Ints


def attach(runner: Any, runtime: Runtime) -> None:
    """Makes ``runner`` tell ``runtime`` what each forward pass computes."""
    shared.refuse(runner.vllm_config, runner.device, runtime.device is not None)
    if runtime.device is not None:
        graphs.attach_v1(runner, runtime.capturing)
    update_states, prepare_inputs, model_forward = (
        runner._update_states, runner._prepare_inputs, runner._model_forward,
    )  # fmt: skip
    batch: list[Scheduled] = []

    def _update_states(scheduler_output: Any, *rest: Any, **kwargs: Any) -> Any:
        shared.note_requests(runtime, scheduler_output)
        return update_states(scheduler_output, *rest, **kwargs)

    def _prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any, *rest: Any, **kwargs: Any) -> Any:
        out = prepare_inputs(scheduler_output, num_scheduled_tokens, *rest, **kwargs)
        steered = shared.any_steered(runtime, runner.input_batch.req_ids)
        positions = runner.positions if runner.use_async_spec_decode else None
        batch[:] = rows(runner.input_batch, num_scheduled_tokens, positions) if steered else []
        starts = {entry.request_id: entry.start for entry in batch}
        graphs.levels.eager = steered and runtime.needs_host(starts, sum(entry.n for entry in batch))
        return out

    def _model_forward(*args: Any, **kwargs: Any) -> Any:
        shared.begin(runtime, batch, token_ids)
        try:
            return model_forward(*args, **kwargs)
        finally:
            shared.end(runtime)

    def token_ids(row: int, count: int) -> Ints:
        return shared.on_host(runner.input_ids.gpu[row : row + count])

    runner._update_states = _update_states
    runner._prepare_inputs = _prepare_inputs
    runner._model_forward = _model_forward


def rows(input_batch: Any, num_scheduled_tokens: Any, positions: Any = None) -> list[Scheduled]:
    """The batch's rows, request by request; their positions from the device's ``positions`` where they are given."""
    request_ids = input_batch.req_ids
    bounds = np.concatenate([[0], np.cumsum(num_scheduled_tokens)])
    if positions is None:
        starts = input_batch.num_computed_tokens_cpu[: len(request_ids)]
    else:
        starts = shared.on_host(positions[bounds[:-1]])
    return shared.rows(request_ids, bounds, starts)
