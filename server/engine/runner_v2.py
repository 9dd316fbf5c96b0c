"""The adapter for vLLM's model runner V2 (``v1/worker/gpu/model_runner.py``; CPU's is a subclass).

The contract: a step that is not a dummy run calls ``add_requests(scheduler_output)`` once, after it has
dropped what finished or was preempted, and then, if it has tokens,
``prepare_inputs(scheduler_output, ...)``, which returns an ``InputBatch`` whose request i of ``req_ids`` has the
rows from ``query_start_loc[i]`` to ``query_start_loc[i + 1]``, consecutive positions from
``num_computed_tokens_np[i]``, and the tokens ``input_ids``; rows from ``num_tokens`` on are padding. All this is
inside ``execute_model``, which runs the model as well: by calling it, or by replaying a full CUDA graph,
when no Python of the model runs. So a pass begins when the inputs are prepared, while buffers that a graph reads
can still be filled, and ends with ``execute_model``. Dummy runs go through ``execute_model`` without
``prepare_inputs``, captures through neither, and a drafter runs in ``sample_tokens``.

What the host knows (0.26, 0.32, 0.33): without speculation, everything, also under asynchronous scheduling; of
generated tokens it knows the position before it knows the id, so ids are read from the device. With
speculation, ``num_computed_tokens_np`` and ``seq_lens_cpu_upper_bound`` take the drafts of steps in flight for
accepted: upper bounds once a request has had drafts, exact before, and always exact under synchronous scheduling.
With adaptive verification (from 0.32) ``query_start_loc_np`` and ``num_scheduled_tokens`` are not the rows
either, as drafts are dealt out on the device. The device's ``query_start_loc`` and ``positions`` are always
exact, so with speculation both are read from there, at the price of waiting for the last step, and
only while a request in the batch is steered. ``positions`` counts tokens, also for models with M-RoPE, which
keep their own.

Which graph a step replays, or that it has none (:mod:`steersman.server.engine.graphs`), is decided after
``add_requests`` and before ``prepare_inputs``, by ``cudagraph_manager.dispatch``. What is known of positions then is
the scheduler's ``num_computed_tokens``: exact for the prompt's, as drafts come after it.

A preempted request is dropped and comes back as a new one, perhaps in another slot and with its output as part
of its prefill. We keep no slots: its state stays under its id until it finishes.
"""

from __future__ import annotations

from typing import Any

from steersman.server.engine import batch as shared
from steersman.server.engine import graphs
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.steering.tokens import Ints


def attach(runner: Any, runtime: Runtime) -> None:
    """Makes ``runner`` tell ``runtime`` what each forward pass computes."""
    shared.refuse(runner.vllm_config, runner.device, runtime.device is not None)
    if runtime.device is not None:
        graphs.attach_v2(runner, runtime.capturing)
    add_requests, prepare_inputs, execute_model = (
        runner.add_requests, runner.prepare_inputs, runner.execute_model,
    )  # fmt: skip

    def _add_requests(scheduler_output: Any, *rest: Any, **kwargs: Any) -> Any:
        shared.note_requests(runtime, scheduler_output)
        starts = shared.starts(scheduler_output) if runtime.requests else {}
        graphs.levels.eager = runtime.needs_host(starts, scheduler_output.total_num_scheduled_tokens)
        return add_requests(scheduler_output, *rest, **kwargs)

    def _prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(*args, **kwargs)

        def token_ids(row: int, count: int) -> Ints:
            return shared.on_host(batch.input_ids[row : row + count])

        steered = shared.any_steered(runtime, batch.req_ids)
        shared.begin(runtime, rows(batch, runner.num_speculative_steps > 0) if steered else [], token_ids)
        return batch

    def _execute_model(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute_model(*args, **kwargs)
        finally:
            shared.end(runtime)

    runner.add_requests = _add_requests
    runner.prepare_inputs = _prepare_inputs
    runner.execute_model = _execute_model


def rows(batch: Any, speculates: bool) -> list[Scheduled]:
    """The batch's rows, request by request; read from the device where the host has only bounds."""
    count = len(batch.req_ids)
    if not speculates:
        return shared.rows(batch.req_ids, batch.query_start_loc_np[: count + 1], batch.num_computed_tokens_np)
    bounds = batch.query_start_loc[: count + 1]
    starts = batch.positions[bounds[:-1].long()]
    return shared.rows(batch.req_ids, shared.on_host(bounds), shared.on_host(starts))
