"""Captured rows are what the layers computed, however the prompt was cut up and whoever else was in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.server.engine import captures
from steersman.server.engine.captures import Capture, Wanted
from steersman.server.engine.device import DevicePlans
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.resident import Shard
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import make_args
from steersman.steering.plan import Place, Plan
from steersman.steering.tokens import Ints, Prompt, Selection
from tests.kernels import table_reader
from tests.server.engine.plans import plan
from tests.server.engine.test_tensor_parallel import HALF, WAIT, Ranks, activations
from tests.server.engine.test_tensor_parallel import POST as POST_1
from tests.server.engine.test_tensor_parallel import Z as Z_1
from tests.server.engine.toy import POST, PRE, Piece, Toy, alone
from tests.steering.library import LAYERS, D, plan_of

IDS = [3, 5, 9, 4, 1, 12, 2, 20, 6, 5, 9, 1]
P = len(IDS)
EVERYWHERE = tuple(Place(layer, site) for layer in range(LAYERS) for site in (PRE, POST))
SOME = (Place(0, PRE), Place(2, POST), Place(3, PRE))


class Watched(Runtime):
    """Keeps the stream at every place after its edits: what a capture must find there."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[Place, Tensor] = {}

    def begin(self, batch: Sequence[Scheduled], token_ids: Callable[[int, int], Ints], replayed: bool = False) -> None:
        super().begin(batch, token_ids, replayed)
        self.wanted, self.live = EVERYWHERE, True

    def apply(self, place: Place, x: Tensor, residual: Tensor | None = None) -> None:
        super().apply(place, x, residual)
        self.streams[place] = x.float() if residual is None else x.float() + residual.float()


def truth(its_plan: Plan | None, ids: Sequence[int] = tuple(IDS), **toy: Any) -> dict[Place, Tensor]:
    """The streams of the whole prompt in one pass, captured by nobody."""
    runtime = Watched()
    made = Toy(runtime, **toy)
    made.add("r", its_plan, ids)
    made.run(Piece("r", 0, ids))
    return runtime.streams


@cache
def truth_of(kind: str | None) -> dict[Place, Tensor]:
    return truth(None if kind is None else plan(kind))


def enter(runtime: Runtime, wanted: Wanted, its_plan: Plan | None = None, name: str = "r") -> None:
    steered = its_plan or plan_of()
    runtime.plans.add(steered.to_bytes(), "http")
    selection = Selection.build(steered.selectors, Prompt(IDS), [s.path for s in steered.steps])
    runtime.add_request(name, make_args(steered, selection, name, capture=wanted))


def capture_of(runtime: Runtime, name: str = "r") -> Capture:
    state = runtime.captured(name)
    assert state is not None
    assert state.error is None
    assert state.capture is not None
    return state.capture


def found(capture: Capture, piece: int = 1 << 20) -> dict[Place, np.ndarray[Any, Any]]:
    """What the HTTP process gets, in pieces of so many bytes."""
    told = capture.manifest()
    size = sum(4 * int(np.prod(shape)) for _, _, *shape in told)
    data = b"".join(capture.read(at, at + piece) for at in range(0, size, piece))
    assert len(data) == size
    out, at = {}, 0
    for layer, site, *shape in told:
        n = int(np.prod(shape))
        out[Place(layer, site)] = np.frombuffer(data, "<f4", n, at).reshape(shape)
        at += 4 * n
    return out


def check(capture: Capture, streams: dict[Place, Tensor], wanted: Wanted, piece: int = 1 << 20) -> None:
    got = found(capture, piece)
    assert set(got) == set(wanted.places)
    for place, rows in got.items():
        own = streams[place][list(wanted.positions)]
        if wanted.mean:
            np.testing.assert_allclose(rows, own.double().mean(0).numpy(), rtol=2e-7, atol=1e-7)
        else:
            assert np.array_equal(rows, own.numpy()), place


# -- how the prompt is computed -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    positions=st.sets(st.integers(0, P - 1), min_size=1),
    cuts=st.sets(st.integers(1, P - 1), max_size=4),
    preempted=st.lists(st.integers(1, P), max_size=2),
    mean=st.booleans(),
    block=st.integers(1, 5),
    kind=st.sampled_from([None, "reads", "norm", "token-gate"]),
)
def test_chunks_and_preemptions_change_nothing(
    positions: set[int], cuts: set[int], preempted: list[int], mean: bool, block: int, kind: str | None
) -> None:
    its_plan = None if kind is None else plan(kind)
    wanted = Wanted(SOME, tuple(sorted(positions)), mean)
    toy = Toy(Runtime())
    enter(toy.runtime, wanted, its_plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captures, "BLOCK", block)
        for stop in [*preempted, P]:  # each time from the prompt's start
            edges = [0, *sorted(c for c in cuts if c < stop), stop]
            for a, b in pairwise(edges):
                toy.run(Piece("r", a, IDS[a:b]))
    check(capture_of(toy.runtime), truth_of(kind), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_the_stream_is_the_sum_in_float32(dtype: torch.dtype, split: bool) -> None:
    wanted = Wanted(EVERYWHERE, tuple(range(P)))
    toy = Toy(Runtime(), dtype, split)
    enter(toy.runtime, wanted, plan("reads"))
    toy.run(Piece("r", 0, IDS))
    for piece in (1, 7, 64):
        check(capture_of(toy.runtime), truth(plan("reads"), dtype=dtype, split=split), wanted, piece)


def test_others_in_the_batch_are_neither_read_nor_changed() -> None:
    wanted, other = Wanted(EVERYWHERE, (1, 2, 7)), Wanted(SOME, (0, P - 1), True)
    toy = Toy(Runtime(), split=True)
    enter(toy.runtime, wanted, name="bare")
    enter(toy.runtime, other, plan("add"), name="steered")
    toy.add("edited", plan("norm"), IDS)
    out = toy.run(
        Piece("plain", 0, IDS), Piece("steered", 0, IDS), Piece("edited", 0, IDS), Piece("bare", 0, IDS[:5])
    )  # fmt: skip
    toy.run(Piece("bare", 5, IDS[5:]), Piece("plain", P, [5]))
    toy.runtime.remove_request("bare")
    check(capture_of(toy.runtime, "bare"), truth(None, split=True), wanted)
    check(capture_of(toy.runtime, "steered"), truth(plan("add"), split=True), other)
    assert torch.equal(out["plain"], alone(None, IDS, P, split=True))
    assert torch.equal(out["edited"], alone(plan("norm"), IDS, P, split=True))
    assert torch.equal(out["steered"], alone(plan("add"), IDS, P, split=True))


# -- what cannot be given -------------------------------------------------------------------------------


def test_a_prompt_that_was_not_computed_here_is_an_error() -> None:
    wanted = Wanted(SOME, (2, 3, 9))
    toy = Toy(Runtime())
    enter(toy.runtime, wanted)
    toy.run(Piece("r", 4, IDS[4:]))  # its first four tokens came from a cache
    state = toy.runtime.captured("r")
    assert state is not None
    assert state.error == "capturing activations failed: position 2 of a captured prompt was not computed here"


@pytest.mark.parametrize("mean", [False, True])
def test_a_part_is_not_given_for_the_whole(mean: bool) -> None:
    toy = Toy(Runtime())
    enter(toy.runtime, Wanted(SOME, (2, 3, 9), mean))
    toy.run(Piece("r", 0, IDS[:4]))
    with pytest.raises(LookupError, match="of 3 positions 2 were computed"):
        capture_of(toy.runtime).manifest()


def test_without_its_plan_nothing_is_captured() -> None:
    runtime = Runtime()
    selection = Selection.build([], Prompt(IDS), [])
    runtime.add_request("r", make_args(plan_of(), selection, "r", capture=Wanted(SOME, (0,))))
    Toy(runtime).run(Piece("r", 0, IDS))
    state = runtime.captured("r")
    assert state is not None
    assert state.capture is not None
    assert "not resident" in str(state.error)
    assert state.capture.manifest() == []
    assert runtime.captured("unknown") is None


def test_a_pass_that_captures_needs_the_host() -> None:
    runtime = Runtime()
    rows, cpu = 2 * P, torch.device("cpu")
    runtime.use_device(DevicePlans(table_reader.edit, list(EVERYWHERE), {}, cpu, rows=rows, plans=2, nbytes=2**16))
    toy = Toy(runtime)
    toy.add("edited", plan("add"), IDS)
    enter(runtime, Wanted(SOME, (0,)), plan("add"), name="r")
    assert runtime.needs_host({"r": 0}, 1)
    assert not runtime.needs_host({"edited": 0}, 1)
    toy.run(Piece("edited", 0, IDS), Piece("r", 0, IDS))
    check(capture_of(runtime), truth(plan("add")), Wanted(SOME, (0,)))
    runtime.begin([Scheduled("r", 0, 0, P)], lambda row, count: np.asarray(IDS[:count]), replayed=True)
    runtime.end()
    state = runtime.captured("r")
    assert state is not None
    assert "has been given a graph" in str(state.error)


# -- ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [[0, 2], [3]])
def test_two_ranks_put_their_parts_together(starts: Sequence[int]) -> None:
    """Also where the prompt's start is missing: then no rank waits for the other."""
    inputs = {place: activations(place, seed)[:5] for seed, place in enumerate((Z_1, POST_1))}
    wanted, ranks, runtimes = Wanted((Z_1, POST_1), (0, 3, 4)), Ranks(), [Runtime(), Runtime()]

    def run(rank: int) -> None:
        runtime = runtimes[rank]
        runtime.reduce, runtime.keeps = ranks.reduce(rank), rank == 0
        shards = {place: Shard(rank * half, (rank + 1) * half, 2 * half) for place, half in HALF.items()}
        runtime.shard(shards)
        enter(runtime, wanted)
        for a, b in zip(starts, [*starts[1:], 5], strict=True):
            runtime.begin([Scheduled("r", a, 0, b - a)], lambda row, count: np.zeros(count, np.int64))
            for place, x in inputs.items():
                part = x[:, shards[place].start : shards[place].stop] if place in shards else x
                runtime.apply(place, part[a:b].clone())
            runtime.end()

    threads = [Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WAIT)
    assert not any(thread.is_alive() for thread in threads)
    states = [runtime.captured("r") for runtime in runtimes]
    assert all(state is not None and bool(state.error) == (starts == [3]) for state in states)
    if starts != [3]:
        check(capture_of(runtimes[0]), inputs, wanted)
        assert capture_of(runtimes[1]).manifest() == []
        assert ranks.sums[0] == ranks.sums[1]
        assert D not in {shape[1] for shape in ranks.sums[0]}  # nothing that both know


@given(positions=st.sets(st.integers(0, 40), min_size=1), mean=st.booleans())
def test_what_travels_with_a_request(positions: set[int], mean: bool) -> None:
    wanted = Wanted(SOME, tuple(sorted(positions)), mean)
    assert Wanted.from_json(wanted.to_json()) == wanted
