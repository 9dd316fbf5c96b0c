import importlib
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode

from steersman.server.engine.batch import EDIT_OP, any_steered, note_requests, refuse, rows, starts
from steersman.server.engine.monitor import Monitor
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from tests.server.engine.fakes import arrival, config, step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_rows_are_cut_at_the_bounds() -> None:
    assert rows(["a", "b"], [0, 2, 5], [7, 0]) == [Scheduled("a", 7, 0, 2), Scheduled("b", 0, 2, 3)]
    with pytest.raises(ValueError):
        rows(["a", "b"], [0, 2], [7, 0])


def test_the_scheduler_says_where_each_request_goes_on() -> None:
    out = step({"new": 4, "old": 1, "unknown": 1}, [arrival("new", None)])
    out.scheduled_new_reqs[0].num_computed_tokens = 16
    out.scheduled_cached_reqs.req_ids = ["old"]
    out.scheduled_cached_reqs.num_computed_tokens = [9]
    assert starts(out) == {"new": 16, "old": 9, "unknown": 0}


def test_rows_are_told_when_statistics_are_due() -> None:
    runtime = Runtime()
    assert not any_steered(runtime, ["a"])
    runtime.monitor = Monitor(1, 2)
    assert not any_steered(runtime, ["a"])
    runtime.begin([], lambda *_: np.zeros(0, np.int64))
    assert any_steered(runtime, ["a"])
    runtime.begin([], lambda *_: np.zeros(0, np.int64), replayed=True)  # its turn has passed
    assert not any_steered(runtime, ["a"])


def test_statistics_know_how_long_prompts_are() -> None:
    runtime = Runtime()
    runtime.monitor = monitor = Monitor(1, 1)
    embedded = arrival("e", None)
    embedded.prompt_token_ids, embedded.prompt_embeds = None, torch.zeros(5, 2)
    note_requests(runtime, step(new=[arrival("a", None, range(3)), arrival("b", None, range(4)), embedded]))
    note_requests(runtime, step(new=[arrival("a", None, range(9))], finished=["b", "a"]))  # an id that is used again
    assert monitor._prompts == {"a": 9, "e": 5}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_ubatching": True}, "dual batch overlap"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"enable_sp": True}, "sequence parallelism"),
        ({"kv_sharing_fast_prefill": True}, "fast prefill"),
    ],
)
def test_refuses_settings_under_which_rows_are_elsewhere(changes: dict[str, Any], reason: str) -> None:
    refuse(config(), CPU)
    with pytest.raises(RuntimeError, match=reason):
        refuse(config(**changes), CPU)


@pytest.mark.parametrize("mode", [m for m in CUDAGraphMode if m != CUDAGraphMode.NONE])
def test_refuses_graphs_that_would_swallow_the_edits(mode: CUDAGraphMode) -> None:
    with pytest.raises(RuntimeError, match="CUDA graphs"):
        refuse(config(cudagraph_mode=mode), CUDA)
    refuse(config(cudagraph_mode=mode), CPU)
    refuse(config(cudagraph_mode=CUDAGraphMode.NONE), CUDA)
    split = config(cudagraph_mode=CUDAGraphMode.PIECEWISE)
    split.compilation_config.splitting_ops = ["vllm::unified_attention_with_output", EDIT_OP]
    refuse(split, CUDA)


def test_contract_vllm_s_settings_have_these_names() -> None:
    refuse(VllmConfig(), CPU)  # an AttributeError here: see server/engine/batch.py, `refuse`


def test_the_op_to_split_at_is_the_one_in_the_layers() -> None:
    importlib.import_module("steersman.server.engine.hooks")
    namespace, name = EDIT_OP.split("::")
    assert hasattr(getattr(torch.ops, namespace), name)
