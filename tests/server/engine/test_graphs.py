"""Graphs are kept by level, in vLLM's own classes. Nothing is captured here: the graphs are strings."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from steersman.server.engine import graphs
from steersman.steering.sites import Site
from tests.server.engine.fakes import assigned, calls, parameters

LOOK = "vLLM changed what server/engine/graphs.py relies on; see its docstring"
ALL = frozenset(Site)
POST = frozenset({Site.RESID_POST})
NONE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.FULL


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> Iterator[graphs.Levels]:
    for owner, name in (
        (CUDAGraphWrapper, "concrete_cudagraph_entries"),
        (BreakableCUDAGraphWrapper, "entries"),
        (CudaGraphManager, "graphs"),
    ):
        monkeypatch.setattr(owner, name, None, raising=False)  # put back, that is taken away, afterwards
    monkeypatch.setattr(graphs, "levels", graphs.levels)
    return graphs.use(ALL)


# -- which level ------------------------------------------------------------------------------------


def test_a_step_replays_the_smallest_level_that_launches_at_its_sites() -> None:
    levels = graphs.Levels(ALL)
    assert levels.sites == (frozenset(), POST, ALL)
    for sites, level in ((frozenset(), 0), (POST, 1), (frozenset({Site.MLP_POST}), 2), (ALL, 2)):
        levels.choose(sites)
        assert levels.current == level
    levels.rest()
    assert levels.current == 0


@pytest.mark.parametrize(
    ("hooked", "want"),
    [
        (POST, (frozenset(), POST)),
        (frozenset({Site.ATTN_Z}), (frozenset(), frozenset({Site.ATTN_Z}))),
        (frozenset(), (frozenset(),)),
    ],
)
def test_levels_that_would_be_the_same_are_one(hooked: frozenset[Site], want: Any) -> None:
    assert graphs.Levels(hooked).sites == want


# -- graphs by level --------------------------------------------------------------------------------


def made(owner: type, name: str) -> Any:
    """An instance whose constructor has assigned the dict, as vLLM's does."""
    found = owner.__new__(owner)
    setattr(found, name, {})
    return found


KEPT = [
    (CUDAGraphWrapper, "concrete_cudagraph_entries"),
    (BreakableCUDAGraphWrapper, "entries"),
    (CudaGraphManager, "graphs"),
    (ModelCudaGraphManager, "graphs"),
]


@pytest.mark.parametrize(("owner", "name"), KEPT)
def test_each_level_has_its_own_graphs(levels: graphs.Levels, owner: type, name: str) -> None:
    one, other = made(owner, name), made(owner, name)
    for level in range(3):
        with levels.at(level):
            assert not getattr(one, name)
            getattr(one, name)["shape"] = f"graph {level}"
    for level in range(3):
        with levels.at(level):
            assert getattr(one, name) == {"shape": f"graph {level}"}
            assert not getattr(other, name)
    getattr(one, name).clear()  # vLLM forgets its graphs outside of any step
    for level in range(3):
        with levels.at(level):
            assert not getattr(one, name)
    setattr(other, name, {"shape": "new"})
    assert getattr(other, name) == {"shape": "new"}
    with levels.at(1):
        assert not getattr(other, name)


def test_graphs_that_were_kept_before_stay() -> None:
    class Owner:
        def __init__(self) -> None:
            self.kept = {"shape": "early"}

    owner = Owner()
    Owner.kept = graphs.ByLevel("kept")  # type: ignore[assignment]
    assert owner.kept == {"shape": "early"}
    with pytest.raises(AttributeError, match="kept"):
        _ = Owner.__new__(Owner).kept


@pytest.mark.parametrize(("owner", "name"), KEPT[:3])
def test_contract_graphs_are_in_these_dicts(owner: type, name: str) -> None:
    assert name in assigned(owner), LOOK
    assert f"self.{name}: dict[" in inspect.getsource(owner.__init__), LOOK
    assert f"self.{name}.clear()" in inspect.getsource(owner) or owner is CudaGraphManager, LOOK


# -- capturing --------------------------------------------------------------------------------------


class Log:
    def __init__(self) -> None:
        self.entries: list[Any] = []

    @contextmanager
    def capturing(self, sites: frozenset[Site]) -> Iterator[None]:
        self.entries.append(sites)
        yield
        self.entries.append("end")


def test_every_graph_is_captured_at_every_level(levels: graphs.Levels) -> None:
    log = Log()

    def capture(shapes: list[int], mode: str) -> str:
        log.entries.append((levels.current, shapes, mode))
        return "done"

    assert graphs.at_every_level(capture, log.capturing)([1, 2], mode="full") == "done"
    assert log.entries == [
        ALL, (2, [1, 2], "full"), "end", POST, (1, [1, 2], "full"), "end", frozenset(), (0, [1, 2], "full"), "end",
    ]  # fmt: skip
    assert levels.current == 0


def test_contract_v1_captures_and_dispatches_by_these() -> None:
    assert "_capture_cudagraphs" in calls(RunnerV1.capture_model), LOOK
    for caller in (RunnerV1._capture_cudagraphs, RunnerV1.profile_cudagraph_memory):
        assert "_warmup_and_capture" in calls(caller), LOOK
    assert "valid_modes" in parameters(CudagraphDispatcher.dispatch), LOOK
    assert "cudagraph_dispatcher" in assigned(RunnerV1), LOOK
    steps = calls(RunnerV1.execute_model)
    order = ["_prepare_inputs", "_determine_batch_execution_and_padding", "_model_forward"]
    assert [s for s in steps if s in order] == order, LOOK
    assert "cudagraph_dispatcher.dispatch" in calls(RunnerV1._determine_batch_execution_and_padding), LOOK


def test_contract_v2_captures_and_dispatches_by_these() -> None:
    assert "cudagraph_manager.capture" in calls(RunnerV2.capture_model), LOOK
    assert "capture_model(profile_only=True)" in inspect.getsource(cudagraph_utils.profile_cudagraph_memory), LOOK
    assert "self._capture_mem_samples.append(" in inspect.getsource(CudaGraphManager.capture), LOOK
    source = inspect.getsource(RunnerV2.execute_model)
    order = [source.index(s) for s in ("self.add_requests(", "dispatch_cg_and_sync_dp(", "self.prepare_inputs(")]
    assert order == sorted(order), LOOK
    assert "self._graphs_captured and" in inspect.getsource(CudaGraphManager.dispatch), LOOK
    assert "self.cudagraph_manager = ModelCudaGraphManager(" in inspect.getsource(RunnerV2.initialize_kv_cache), LOOK


# -- dispatching ------------------------------------------------------------------------------------


class Dispatcher:
    """As V1's: modes that are not valid are not chosen."""

    def dispatch(self, num_tokens: int, valid_modes: Any = None) -> tuple[CUDAGraphMode, int]:
        return (NONE if valid_modes == {NONE} else FULL), num_tokens


class RunnerOne:
    def __init__(self) -> None:
        self.cudagraph_dispatcher = Dispatcher()
        self.captured: list[tuple[int, str]] = []

    def _warmup_and_capture(self, shape: str, cudagraph_runtime_mode: CUDAGraphMode) -> None:
        self.captured.append((graphs.levels.current, shape))


def test_v1_captures_a_shape_at_every_level_also_to_measure_its_memory(levels: graphs.Levels) -> None:
    runner = RunnerOne()
    graphs.attach_v1(runner, Log().capturing)
    for shape in ("large", "small"):
        runner._warmup_and_capture(shape, cudagraph_runtime_mode=FULL)
    assert runner.captured == [(level, shape) for shape in ("large", "small") for level in (2, 1, 0)]


def test_v1_runs_a_step_that_needs_the_host_without_a_graph(levels: graphs.Levels) -> None:
    runner = RunnerOne()
    graphs.attach_v1(runner, Log().capturing)
    for eager, want in ((False, FULL), (True, NONE), (False, FULL)):
        levels.eager = eager
        assert runner.cudagraph_dispatcher.dispatch(7) == (want, 7)
        assert levels.replays is (want == FULL)


class Manager:
    _graphs_captured = True
    _capture_mem_samples: list[int] | None = None

    def __init__(self) -> None:
        self.captured: list[int] = []

    def capture(self) -> None:
        self.captured.append(graphs.levels.current)
        if self._capture_mem_samples is not None:
            self._capture_mem_samples += [100 * graphs.levels.current, 10 + graphs.levels.current]

    def dispatch(self, num_tokens: int) -> Any:
        class Shape:
            cg_mode = FULL if self._graphs_captured else NONE

        return Shape


class RunnerTwo:
    cudagraph_manager: Manager | None = None

    def initialize_kv_cache(self) -> None:
        self.cudagraph_manager = Manager()


def test_v2_runs_a_step_that_needs_the_host_without_a_graph(levels: graphs.Levels) -> None:
    runner = RunnerTwo()
    graphs.attach_v2(runner, Log().capturing)
    for _ in range(2):  # vLLM makes one to measure memory, and another one
        runner.initialize_kv_cache()
        manager = runner.cudagraph_manager
        assert manager is not None
        manager.capture()
        assert manager.captured == [2, 1, 0]
        for eager, want in ((False, FULL), (True, NONE), (False, FULL)):
            levels.eager = eager
            assert manager.dispatch(7).cg_mode == want
            assert levels.replays is (want == FULL)
            assert manager._graphs_captured


def test_v2_takes_what_a_shape_needs_at_all_levels_for_its_memory(levels: graphs.Levels) -> None:
    runner, samples = RunnerTwo(), list[int]()
    graphs.attach_v2(runner, Log().capturing)
    runner.initialize_kv_cache()
    manager = runner.cudagraph_manager
    assert manager is not None
    manager._capture_mem_samples = samples  # vLLM keeps the list itself
    manager.capture()
    assert samples == [300, 33]
    assert cudagraph_utils._extrapolate_full_graph_memory(samples, 5) >= 300 + 4 * 33
