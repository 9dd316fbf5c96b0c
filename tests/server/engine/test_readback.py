"""Numbers of a pass reach whoever waits for them, each pass's own, in order, though its buffer is filled anew."""

import pytest
import torch

from steersman.server.engine import readback
from steersman.server.engine.readback import DEPTH, Readback


class Event:
    """A copy that ends when it is waited for, or when it is told to."""

    ended = False

    def record(self) -> None:
        self.ended = False

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.ended = True


def slow(source: torch.Tensor) -> tuple[Readback, list[Event]]:
    found = Readback(source)
    events = [Event() for _ in range(DEPTH)]
    found._events = events  # type: ignore[assignment]
    return found, events


def test_each_pass_has_its_own_numbers() -> None:
    source, seen = torch.zeros(4, 2), list[list[list[float]]]()
    found, events = slow(source)
    for i in range(3):
        source.fill_(i)
        found.take(i + 1, lambda values: seen.append(values.tolist()))
    found.settle()
    assert seen == [], "nobody waits"
    events[1].ended = True
    found.settle()
    assert seen == [], "the first comes first"
    events[0].ended = True
    found.settle()
    assert seen == [[[0.0, 0.0]], [[1.0, 1.0]] * 2]
    found.settle(wait=True)
    assert seen[2:] == [[[2.0, 2.0]] * 3]
    found.settle(wait=True)
    assert len(seen) == 3


def test_the_oldest_makes_room() -> None:
    source, seen = torch.zeros(1, 1), list[float]()
    found, _ = slow(source)
    for i in range(3 * DEPTH):
        source.fill_(i)
        found.take(1, lambda values: seen.append(float(values)))
        assert seen == [*range(max(0, i - DEPTH + 1))]
    found.settle(wait=True)
    assert seen == [*range(3 * DEPTH)]


def test_on_a_processor_copies_have_ended() -> None:
    source, seen = torch.ones(2, 2), list[float]()
    found = Readback(source)
    found.take(2, lambda values: seen.append(float(values.sum())))
    found.settle()
    assert seen == [4.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_on_a_gpu() -> None:
    source, seen = torch.zeros(1000, 16, device="cuda"), list[float]()
    found = readback.Readback(source)
    for i in range(20):
        source.fill_(i)
        found.take(1000, lambda values: seen.append(float(values.mean())))
        found.settle()
    found.settle(wait=True)
    assert seen == [*range(20)]
