"""CUDA graphs for steered steps: each of vLLM's graphs is captured once per *level*; a step replays that of its level.

A level is a set of sites at which the graph launches the edit kernel. Level 0 launches nothing, so an unsteered step
replays exactly what stock vLLM would; the next edits the stream where most plans do (``resid_post``); the last, every
hooked site. A graph does not hold a plan: the kernel looks up what each row gets in buffers that stay where they are
(:mod:`steersman.kernels.tables`), so any plan runs in any graph of its level. A step that needs the host in the
middle of a pass (see :mod:`steersman.server.engine.device`) runs without a graph.

The contract with vLLM (0.26, 0.32, 0.33): captured graphs are kept in dicts that only their owners read and write, by
batch shape: ``CUDAGraphWrapper.concrete_cudagraph_entries`` (V1's full and both runners' piecewise graphs),
``BreakableCUDAGraphWrapper.entries`` and V2's ``CudaGraphManager.graphs``. Those attributes become one dict per level.
A graph of the model is captured inside ``runner._warmup_and_capture`` (V1), all of them inside
``ModelCudaGraphManager.capture`` (V2), which may be called again as long as the dicts are empty. vLLM measures the
memory that graphs need by the same calls: V1 by what one call takes, V2 (from 0.32) by what ``capture`` notes in
``_capture_mem_samples``, a number for each shape in turn, so that the levels' numbers are added up to one.
``CudagraphDispatcher.dispatch(valid_modes={NONE})`` (V1), and ``dispatch`` while ``_graphs_captured`` is false (V2),
make a step run without a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from steersman.steering.sites import Site


class Levels:
    """The levels that graphs are captured at, and which one applies now."""

    def __init__(self, hooked: frozenset[Site] = frozenset()) -> None:
        common = frozenset({Site.RESID_POST}) & hooked
        steps = [frozenset[Site](), common, hooked]
        self.sites = tuple(sorted(set(steps), key=len))
        self.current = 0
        self.eager = False  # whether this step must run without a graph
        self.replays = False  # whether it has one

    def choose(self, sites: Iterable[Site]) -> None:
        """The smallest level that launches at all of ``sites``."""
        needed = frozenset(sites)
        self.current = next(i for i, level in enumerate(self.sites) if needed <= level)

    def rest(self) -> None:
        self.current, self.eager, self.replays = 0, False, False

    @contextmanager
    def at(self, level: int) -> Iterator[frozenset[Site]]:
        """The sites of ``level``, for as long as it applies."""
        before, self.current = self.current, level
        try:
            yield self.sites[level]
        finally:
            self.current = before


levels = Levels()
"""This process's, set by :func:`use`: a worker process holds one model that is steered."""


def use(hooked: frozenset[Site]) -> Levels:
    """Makes vLLM keep its graphs by level. To be called before any graph is captured."""
    global levels
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    levels = Levels(hooked)
    for owner, name in (
        (CUDAGraphWrapper, "concrete_cudagraph_entries"),
        (BreakableCUDAGraphWrapper, "entries"),
        (CudaGraphManager, "graphs"),
    ):
        if not isinstance(owner.__dict__.get(name), ByLevel):
            setattr(owner, name, ByLevel(name))
    return levels


class _Graphs(dict[Any, Any]):
    """The graphs of level 0, with those of the others, which go when they do."""

    def __init__(self, content: dict[Any, Any]) -> None:
        super().__init__(content)
        self.others: dict[int, dict[Any, Any]] = {}

    def clear(self) -> None:
        super().clear()
        self.others.clear()


class ByLevel:
    """A dict attribute that is another dict at each level. What is assigned to it is that of level 0."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        try:
            graphs = owner.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None
        if not isinstance(graphs, _Graphs):  # assigned before this descriptor was there
            graphs = owner.__dict__[self.name] = _Graphs(graphs)
        return graphs if not levels.current else graphs.others.setdefault(levels.current, {})

    def __set__(self, owner: Any, value: dict[Any, Any]) -> None:
        owner.__dict__[self.name] = _Graphs(value)


Capturing = Callable[[frozenset[Site]], Any]
"""``capturing(sites)``: a context in which every pass launches the edit kernel at these sites."""


def at_every_level(capture: Callable[..., Any], capturing: Capturing) -> Callable[..., Any]:
    """``capture``, called once for each level, the last ones first: they need the most memory."""

    @functools.wraps(capture)
    def every(*args: Any, **kwargs: Any) -> Any:
        out = None
        for level in reversed(range(len(levels.sites))):
            with levels.at(level) as sites, capturing(sites):
                out = capture(*args, **kwargs)
        return out

    return every


def attach_v1(runner: Any, capturing: Capturing) -> None:
    from vllm.config import CUDAGraphMode

    runner._warmup_and_capture = at_every_level(runner._warmup_and_capture, capturing)
    dispatcher = runner.cudagraph_dispatcher
    dispatch = dispatcher.dispatch

    @functools.wraps(dispatch)
    def without_graph_if_needed(*args: Any, **kwargs: Any) -> Any:
        if levels.eager:
            kwargs["valid_modes"] = {CUDAGraphMode.NONE}
        mode, shape = dispatch(*args, **kwargs)
        levels.replays = mode != CUDAGraphMode.NONE
        return mode, shape

    dispatcher.dispatch = without_graph_if_needed


def attach_v2(runner: Any, capturing: Capturing) -> None:
    """The manager is made, and made anew, when the KV cache is: it is taken hold of then."""
    initialize = runner.initialize_kv_cache

    @functools.wraps(initialize)
    def initialize_and_attach(*args: Any, **kwargs: Any) -> Any:
        out = initialize(*args, **kwargs)
        if (manager := runner.cudagraph_manager) is not None:
            _attach_manager(manager, capturing)
        return out

    runner.initialize_kv_cache = initialize_and_attach


def _attach_manager(manager: Any, capturing: Capturing) -> None:
    from vllm.config import CUDAGraphMode

    capture = at_every_level(manager.capture, capturing)
    dispatch = manager.dispatch

    @functools.wraps(capture)
    def capture_and_add_up(*args: Any, **kwargs: Any) -> Any:
        out = capture(*args, **kwargs)
        if samples := getattr(manager, "_capture_mem_samples", None):  # since 0.32, and only while memory is measured
            shapes = len(samples) // len(levels.sites)
            samples[:] = [sum(samples[i::shapes]) for i in range(shapes)]
        return out

    manager.capture = capture_and_add_up

    @functools.wraps(dispatch)
    def without_graph_if_needed(*args: Any, **kwargs: Any) -> Any:
        captured = manager._graphs_captured
        manager._graphs_captured = captured and not levels.eager
        try:
            shape = dispatch(*args, **kwargs)
        finally:
            manager._graphs_captured = captured
        levels.replays = shape.cg_mode != CUDAGraphMode.NONE
        return shape

    manager.dispatch = without_graph_if_needed
