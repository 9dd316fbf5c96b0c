import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from steersman.server.engine import runner_v2
from steersman.server.engine.owners import Scheduled
from tests.server.engine.fakes import Recorder, arrival, assigned, calls, calls_if, config, parameters, steering, step

LOOK = "vLLM changed what server/engine/runner_v2.py relies on; see its docstring"
PADDING = 3


class Runner:
    """The parts of a model runner that the adapter touches, around vLLM's own batch."""

    def __init__(self, log: list[Any], num_speculative_steps: int = 0) -> None:
        self.vllm_config = config()
        self.device = torch.device("cpu")
        self.buffers = InputBuffers(8, 64, self.device)
        self.num_speculative_steps = num_speculative_steps
        self.computed: dict[str, int] = {}  # the scheduler's count, which takes drafts for accepted
        self.rejected: dict[str, int] = {}
        self.trimmed: dict[str, int] = {}  # drafts that adaptive verification took away on the device
        self.log = log
        self.fails = False

    def add_requests(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            self.computed[new.req_id] = new.num_computed_tokens

    def prepare_inputs(self, scheduler_output: Any, batch_desc: Any = None) -> InputBatch:
        asked = scheduler_output.num_scheduled_tokens
        ids = sorted(asked, key=asked.__getitem__)  # decodes first
        counts = np.array([asked[r] - self.trimmed.get(r, 0) for r in ids], dtype=np.int32)
        total = int(counts.sum())
        batch = InputBatch.make_dummy(len(ids), total + PADDING, self.buffers)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        batch.query_start_loc[:] = torch.from_numpy(bounds)
        for i, r in enumerate(ids):
            positions = torch.arange(counts[i]) + self.computed[r] - self.rejected.get(r, 0)
            batch.positions[bounds[i] : bounds[i + 1]] = positions
            batch.input_ids[bounds[i] : bounds[i + 1]] = positions.int() + 100
        upper = np.concatenate([[0], np.cumsum([asked[r] for r in ids])]).astype(np.int32)
        return dataclasses.replace(
            batch,
            req_ids=ids,
            num_scheduled_tokens=np.diff(upper),
            num_tokens=total,
            query_start_loc_np=upper,
            num_computed_tokens_np=np.array([self.computed[r] for r in ids], dtype=np.int32),
        )

    def execute_model(self, scheduler_output: Any, intermediate: Any = None, dummy_run: bool = False) -> str | None:
        if not dummy_run:
            self.add_requests(scheduler_output)
            if not scheduler_output.total_num_scheduled_tokens:
                return None
            self.prepare_inputs(scheduler_output, batch_desc=None)
        else:
            InputBatch.make_dummy(1, 1, self.buffers)
        self.log.append("forward")
        if self.fails:
            raise RuntimeError("out of memory")
        for r, n in scheduler_output.num_scheduled_tokens.items():
            if not dummy_run:
                self.computed[r] += n
        return "state"


def attached(**kwargs: Any) -> tuple[Runner, Recorder]:
    runtime = Recorder()
    runner = Runner(runtime.log, **kwargs)
    runner_v2.attach(runner, runtime)
    return runner, runtime


def test_rows_follow_the_batch_s_order_and_leave_padding_out() -> None:
    runner, runtime = attached()
    new = [arrival("a", steering(8)), arrival("b", None), arrival("c", steering(8))]
    assert runner.execute_model(step({"a": 8, "b": 3, "c": 5}, new)) == "state"
    first = [Scheduled("b", 0, 0, 3), Scheduled("c", 0, 3, 5), Scheduled("a", 0, 8, 8)]
    assert runtime.log == [first, "forward", "end"]
    runtime.log.clear()
    runner.execute_model(step({"a": 1, "c": 3}))
    assert runtime.log[0] == [Scheduled("a", 8, 0, 1), Scheduled("c", 5, 1, 3)]


def test_token_ids_are_what_the_rows_are_fed() -> None:
    runner, runtime = attached()
    runner.execute_model(step({"a": 2, "b": 3}, [arrival("b", None), arrival("a", steering(8))]))
    assert runtime.read is not None
    ids = runtime.read(1, 3)
    assert ids.tolist() == [101, 100, 101]
    assert ids.dtype == np.int64


def test_a_dummy_run_is_not_a_pass() -> None:
    runner, runtime = attached()
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    runtime.log.clear()
    runner.execute_model(step({"_dummy_req_0": 1}), dummy_run=True)
    assert runtime.log == ["forward", "end"]


def test_nothing_is_laid_out_for_an_unsteered_batch() -> None:
    runner, runtime = attached(num_speculative_steps=2)
    runner.execute_model(step({"a": 8, "b": 8}, [arrival("a", None), arrival("b", steering(8))]))
    runtime.log.clear()
    runner.execute_model(step({"a": 1}))
    assert runtime.log == [[], "forward", "end"]


def test_a_resumed_request_keeps_its_state() -> None:
    runner, runtime = attached()
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    state = runtime.requests["a"]
    preempted = step({"b": 8}, [arrival("b", None)])
    preempted.preempted_req_ids = {"a"}
    runner.execute_model(preempted)
    resumed = arrival("a", steering(8))
    resumed.prefill_token_ids = list(range(10))
    runner.execute_model(step({"a": 10, "b": 1}, [resumed]))
    assert runtime.requests["a"] is state
    assert runtime.log[-3] == [Scheduled("b", 8, 0, 1), Scheduled("a", 0, 1, 10)]


def test_an_id_that_is_finished_and_sent_again_is_another_request() -> None:
    runner, runtime = attached()
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    first = runtime.requests["a"]
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))], finished=["a"]))
    assert runtime.requests["a"] is not first


def test_the_next_part_of_a_streamed_prompt_replaces_the_request() -> None:
    runner, runtime = attached()
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    runner.execute_model(step({"a": 12}, [arrival("a", steering(12), range(12))]))
    assert runtime.requests["a"].selection.prompt_length == 12


def test_steps_without_tokens_still_finish_requests() -> None:
    runner, runtime = attached()
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    assert runner.execute_model(step(finished=["a"])) is None
    assert not runtime.requests


def test_positions_and_rows_come_from_the_device_when_drafts_are_in_flight() -> None:
    runner, runtime = attached(num_speculative_steps=3)
    runner.execute_model(step({"a": 8, "b": 8}, [arrival("a", steering(8)), arrival("b", steering(8))]))
    runner.execute_model(step({"a": 4, "b": 4}))
    runner.rejected = {"a": 2}
    runner.trimmed = {"a": 1}
    runtime.log.clear()
    runner.execute_model(step({"a": 4, "b": 4}))
    assert runtime.log[0] == [Scheduled("a", 10, 0, 3), Scheduled("b", 12, 3, 4)]


def test_a_pass_that_fails_is_over() -> None:
    runner, runtime = attached()
    runner.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    assert runtime.log[-2:] == ["forward", "end"]


def test_contract_the_wrapped_methods_take_what_we_pass() -> None:
    assert parameters(GPUModelRunner.add_requests) == ["self", "scheduler_output"], LOOK
    assert parameters(GPUModelRunner.prepare_inputs)[:2] == ["self", "scheduler_output"], LOOK
    assert "dummy_run" in parameters(GPUModelRunner.execute_model), LOOK


def test_contract_a_step_drops_then_adds_then_prepares_then_runs() -> None:
    made = calls(GPUModelRunner.execute_model)
    names = ("finish_requests", "add_requests", "prepare_inputs", "cudagraph_manager.run_fullgraph", "model")
    order = [made.index(name) for name in names]
    assert order == sorted(order), LOOK
    assert [made.count(name) for name in names] == [1] * len(names), LOOK


def test_contract_a_dummy_run_and_a_capture_prepare_nothing() -> None:
    assert {"add_requests", "prepare_inputs"} <= set(calls_if(GPUModelRunner.execute_model, "not dummy_run")), LOOK
    assert "execute_model" in calls(GPUModelRunner._dummy_run), LOOK
    for method in (GPUModelRunner._dummy_run, GPUModelRunner.capture_model, GPUModelRunner.sample_tokens):
        assert not {"add_requests", "prepare_inputs"} & set(calls(method)), LOOK


def test_contract_the_runner_and_its_batch_have_what_we_read() -> None:
    read = {"num_speculative_steps", "vllm_config", "device"}
    assert read <= assigned(GPUModelRunner), f"{read - assigned(GPUModelRunner)}: {LOOK}"
    wanted = {"req_ids", "query_start_loc", "query_start_loc_np", "num_computed_tokens_np", "positions", "input_ids"}
    assert wanted <= {f.name for f in dataclasses.fields(InputBatch)}, LOOK


def test_contract_the_scheduler_sends_what_we_read() -> None:
    sent = {f.name for f in dataclasses.fields(SchedulerOutput)}
    assert {"scheduled_new_reqs", "finished_req_ids", "preempted_req_ids", "num_scheduled_tokens"} <= sent, LOOK
    assert {"req_id", "sampling_params"} <= {f.name for f in dataclasses.fields(NewRequestData)}, LOOK


def test_a_step_is_planned_by_where_the_scheduler_has_each_request_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, runtime = attached()
    asked: list[Any] = []
    monkeypatch.setattr(runtime, "needs_host", lambda starts, rows: asked.append((starts, rows)))
    runner.execute_model(step({"a": 8}, [arrival("a", steering(8))]))
    later = step({"a": 1})
    later.scheduled_cached_reqs.req_ids, later.scheduled_cached_reqs.num_computed_tokens = ["a"], [8]
    runner.execute_model(later)
    assert asked == [({"a": 0}, 8), ({"a": 8}, 1)]
