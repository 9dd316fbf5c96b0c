import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steersman.server.engine import runner_v1
from steersman.server.engine.owners import Scheduled
from tests.server.engine.fakes import Recorder, arrival, assigned, calls, config, parameters, steering, step

LOOK = "vLLM changed what server/engine/runner_v1.py relies on; see its docstring"


def real_batch() -> InputBatch:
    known = parameters(InputBatch.__init__)
    sizes: dict[str, Any] = {"block_sizes": [16], "kernel_block_sizes": [16], "max_num_blocks_per_req": [4]}
    return InputBatch(
        max_num_reqs=4, max_model_len=64, max_num_batched_tokens=64, device=torch.device("cpu"), vocab_size=100,
        **{name: value for name, value in sizes.items() if name in known},
    )  # fmt: skip


class Runner:
    """The parts of a model runner that the adapter touches, around vLLM's own batch."""

    def __init__(self, log: list[Any], use_async_spec_decode: bool = False) -> None:
        self.vllm_config = config()
        self.device = torch.device("cpu")
        self.input_batch = real_batch()
        self.use_async_spec_decode = use_async_spec_decode
        self.positions = torch.zeros(64, dtype=torch.int64)
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.int32))
        self.rejected: dict[str, int] = {}  # drafts of the last step that the host still takes for accepted
        self.log = log
        self.fails = False

    def _update_states(self, scheduler_output: Any) -> str:
        for request_id in scheduler_output.finished_req_ids:
            self.input_batch.remove_request(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            self.input_batch.remove_request(new.req_id)
            state = CachedRequestState(
                req_id=new.req_id, prompt_token_ids=new.prompt_token_ids, mm_features=[],
                sampling_params=SamplingParams(), generator=None, block_ids=([0],),
                num_computed_tokens=new.num_computed_tokens, output_token_ids=[],
            )  # fmt: skip
            self.input_batch.add_request(state)
        self.input_batch.condense()
        self.input_batch.refresh_metadata()
        return "corrections"

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        row = 0
        for i, request_id in enumerate(self.input_batch.req_ids):
            n = int(num_scheduled_tokens[i])
            start = int(self.input_batch.num_computed_tokens_cpu[i]) - self.rejected.get(request_id, 0)
            self.positions[row : row + n] = torch.arange(start, start + n)
            self.input_ids.gpu[row : row + n] = torch.arange(start, start + n, dtype=torch.int32) + 100
            row += n
        return "logits"

    def _model_forward(self, **kwargs: Any) -> str:
        self.log.append("forward")
        if self.fails:
            raise RuntimeError("out of memory")
        return "hidden"

    def execute(self, scheduler_output: Any) -> None:
        assert self._update_states(scheduler_output) == "corrections"
        if not scheduler_output.total_num_scheduled_tokens:
            return
        counts = np.array([scheduler_output.num_scheduled_tokens[r] for r in self.input_batch.req_ids], dtype=np.int32)
        assert self._prepare_inputs(scheduler_output, counts) == "logits"
        assert self._model_forward(input_ids=None) == "hidden"
        for i, n in enumerate(counts):
            self.input_batch.num_computed_tokens_cpu[i] += n


def attached(**kwargs: Any) -> tuple[Runner, Recorder]:
    runtime = Recorder()
    runner = Runner(runtime.log, **kwargs)
    runner_v1.attach(runner, runtime)
    return runner, runtime


def test_rows_follow_the_batch_s_order_and_positions() -> None:
    runner, runtime = attached()
    new = [arrival("a", steering(8)), arrival("b", None), arrival("c", steering(8))]
    runner.execute(step({"a": 8, "b": 3, "c": 5}, new))
    first = [Scheduled("a", 0, 0, 8), Scheduled("b", 0, 8, 3), Scheduled("c", 0, 11, 5)]
    assert runtime.log == [first, "forward", "end"]
    assert set(runtime.requests) == {"a", "c"}

    runtime.log.clear()
    runner.execute(step({"b": 5, "c": 3}, finished=["a"]))  # vLLM moves the last request into the free place
    assert runner.input_batch.req_ids == ["c", "b"]
    assert runtime.log[0] == [Scheduled("c", 5, 0, 3), Scheduled("b", 3, 3, 5)]
    assert set(runtime.requests) == {"c"}


def test_token_ids_are_what_the_rows_are_fed() -> None:
    runner, runtime = attached()
    runner.execute(step({"a": 4, "b": 3}, [arrival("b", None), arrival("a", steering(8))]))
    assert runtime.read is not None
    ids = runtime.read(3, 2)
    assert ids.tolist() == [100, 101]
    assert ids.dtype == np.int64


def test_an_id_that_is_finished_and_sent_again_is_another_request() -> None:
    runner, runtime = attached()
    runner.execute(step({"a": 8}, [arrival("a", steering(8, "first"))]))
    runner.execute(step({"a": 6}, [arrival("a", steering(6, "second"), range(6))], finished=["a"]))
    assert runtime.requests["a"].key == "second"
    assert runtime.log[-3] == [Scheduled("a", 0, 0, 6)]
    assert set(runtime.finished) == {"first"}


def test_the_next_part_of_a_streamed_prompt_replaces_the_request() -> None:
    runner, runtime = attached()
    runner.execute(step({"a": 8}, [arrival("a", steering(8))]))
    first = runtime.requests["a"]
    runner.execute(step({"a": 12}, [arrival("a", steering(12), range(12))]))
    assert runtime.requests["a"] is not first
    runner.execute(step({"a": 14}, [arrival("a", None, range(14))]))
    assert not runtime.requests


def test_steps_without_tokens_still_finish_requests() -> None:
    runner, runtime = attached()
    runner.execute(step({"a": 8}, [arrival("a", steering(8))]))
    runtime.log.clear()
    runner.execute(step(finished=["a"]))
    assert not runtime.requests
    assert runtime.log == []


def test_nothing_is_laid_out_for_an_unsteered_batch() -> None:
    runner, runtime = attached()
    runner.execute(step({"a": 8}, [arrival("a", None)]))
    assert runtime.log == [[], "forward", "end"]


def test_positions_come_from_the_device_when_the_host_only_guesses() -> None:
    runner, runtime = attached(use_async_spec_decode=True)
    runner.execute(step({"a": 8, "b": 8}, [arrival("a", steering(8)), arrival("b", steering(8))]))
    runner.execute(step({"a": 4, "b": 4}))
    runner.rejected = {"a": 2}
    runtime.log.clear()
    runner.execute(step({"a": 4, "b": 4}))
    assert runtime.log[0] == [Scheduled("a", 10, 0, 4), Scheduled("b", 12, 4, 4)]


def test_a_pass_that_fails_is_over() -> None:
    runner, runtime = attached()
    runner.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.execute(step({"a": 8}, [arrival("a", steering(8))]))
    assert runtime.log[-2:] == ["forward", "end"]


def test_contract_the_wrapped_methods_take_what_we_pass() -> None:
    assert parameters(GPUModelRunner._update_states)[:2] == ["self", "scheduler_output"], LOOK
    assert parameters(GPUModelRunner._prepare_inputs)[:3] == ["self", "scheduler_output", "num_scheduled_tokens"], LOOK
    assert callable(GPUModelRunner._model_forward), LOOK


def test_contract_a_step_updates_states_then_prepares_then_runs() -> None:
    made = calls(GPUModelRunner.execute_model)
    order = [made.index(name) for name in ("_update_states", "_prepare_inputs", "_model_forward")]
    assert order == sorted(order), LOOK
    assert [made.count(made[i]) for i in order] == [1, 1, 1], LOOK


def test_contract_only_a_step_runs_model_forward() -> None:
    for name, method in inspect.getmembers(GPUModelRunner, inspect.isfunction):
        if name != "execute_model" and method.__module__ == GPUModelRunner.__module__:
            assert "_model_forward" not in calls(method), f"{name} calls _model_forward: {LOOK}"
    assert "model" in calls(GPUModelRunner._dummy_run), LOOK


def test_contract_the_runner_and_its_batch_have_what_we_read() -> None:
    read = {"input_batch", "positions", "input_ids", "use_async_spec_decode", "vllm_config", "device"}
    assert read <= assigned(GPUModelRunner), f"{read - assigned(GPUModelRunner)}: {LOOK}"
    batch = real_batch()
    assert batch.req_ids == [], LOOK
    assert batch.num_computed_tokens_cpu.shape == (4,), LOOK


def test_a_step_is_planned_by_where_its_rows_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, runtime = attached()
    asked: list[Any] = []
    monkeypatch.setattr(runtime, "needs_host", lambda starts, rows: asked.append((starts, rows)))
    runner.execute(step({"a": 8, "b": 2}, [arrival("a", steering(8)), arrival("b", None)]))
    runner.execute(step({"a": 1, "b": 2}))
    assert asked == [({"a": 0, "b": 0}, 10), ({"a": 8, "b": 2}, 3)]
