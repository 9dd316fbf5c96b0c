from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from steersman.clients.sdk import SteersmanError
from steersman.server.jobs import Job, Progress, Runner, State
from steersman.steering.errors import InvalidRequest, TooManyJobs, UnknownJob


class Gate:
    """Work that runs until it is let go, and notes what it saw."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.began = asyncio.Event()
        self.cancelled = False

    async def __call__(self, progress: Progress) -> Mapping[str, Any]:
        self.began.set()
        progress.expect(4, "texts")
        progress.advance()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return {"assets": ["a@1"]}


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 10)

    asyncio.run(bounded())


async def ended(job: Job) -> None:
    while not job.over:
        await asyncio.sleep(0)


async def fails(progress: Progress, error: Exception) -> Mapping[str, Any]:
    progress.expect(2, "texts")
    raise error


def test_a_job_from_queue_to_result() -> None:
    async def test() -> None:
        runner, gate = Runner(2), Gate()
        job = runner.submit("extract", "calm", gate)
        assert (job.state, job.progress.fraction, job.started) == (State.QUEUED, 0.0, None)
        await gate.began.wait()
        told = job.to_json()
        assert (told["state"], told["progress"]) == ("running", 0.25)
        assert told["counts"] == {"done": 1, "total": 4, "unit": "texts"}
        gate.open.set()
        await ended(job)
        told = runner.get(job.id).to_json()
        assert (told["state"], told["progress"], told["result"]) == ("done", 1.0, {"assets": ["a@1"]})
        assert told["created"] <= told["started"] <= told["ended"]
        assert told["error"] is None
        assert job.work is None, "what it was given is let go"

    run(test)


def test_one_at_a_time_in_order_and_so_many_wait() -> None:
    async def test() -> None:
        runner, gates = Runner(2), [Gate() for _ in range(3)]
        jobs = [runner.submit("extract", str(i), gate) for i, gate in enumerate(gates)]
        await gates[0].began.wait()
        with pytest.raises(TooManyJobs, match="2 jobs wait"):
            runner.submit("extract", "more", Gate())
        assert [job.id for job in runner.list()] == [job.id for job in reversed(jobs)]
        for i, gate in enumerate(gates):
            assert [g.began.is_set() for g in gates] == [j <= i for j in range(3)]
            gate.open.set()
            await ended(jobs[i])
            if i < 2:
                await gates[i + 1].began.wait()
        late = Gate()
        runner.submit("extract", "late", late)  # the queue runs again after it was empty
        await late.began.wait()

    run(test)


def test_cancelling_what_runs_and_what_waits() -> None:
    async def test() -> None:
        runner, gates = Runner(3), [Gate() for _ in range(3)]
        jobs = [runner.submit("extract", str(i), gate) for i, gate in enumerate(gates)]
        await gates[0].began.wait()
        assert (await runner.cancel(jobs[1].id)).state is State.CANCELLED
        cancelled = await runner.cancel(jobs[0].id)
        assert (cancelled.state, gates[0].cancelled) == (State.CANCELLED, True)
        await gates[2].began.wait()
        assert not gates[1].began.is_set()
        gates[2].open.set()
        await ended(jobs[2])
        assert (await runner.cancel(jobs[2].id)).state is State.DONE

    run(test)


def test_cancelling_before_the_first_step() -> None:
    async def test() -> None:
        runner, gate = Runner(1), Gate()
        job = runner.submit("extract", "x", gate)
        while job.task is None:
            await asyncio.sleep(0)
        assert (await runner.cancel(job.id)).state is State.CANCELLED
        after = Gate()
        runner.submit("extract", "y", after)
        await after.began.wait()

    run(test)


@pytest.mark.parametrize(
    ("error", "told", "logged"),
    [
        (InvalidRequest("no", "pairs[3]"), ("no", "invalid_request_error", "pairs[3]", "invalid_steering"), False),
        (SteersmanError(404, "gone", "asset_not_found"), ("gone", "invalid_request_error", None, "asset_not_found"), 0),
        (KeyError("x"), ("KeyError: 'x'", "internal_error", None, "job_failed"), True),
    ],
)
def test_failures_have_our_form(
    error: Exception, told: tuple[Any, ...], logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        runner = Runner(1)
        job = runner.submit("extract", "x", lambda progress: fails(progress, error))
        await ended(job)
        assert job.state is State.FAILED
        assert job.error == dict(zip(("message", "type", "param", "code"), told, strict=True))

    with caplog.at_level(logging.ERROR, "steersman.server.jobs"):
        run(test)
    assert bool(caplog.records) == bool(logged)


def test_only_the_last_are_remembered() -> None:
    async def test() -> None:
        runner = Runner(10, history=2)
        jobs = [runner.submit("extract", str(i), Gate()) for i in range(4)]
        for job in jobs:
            await runner.cancel(job.id)
        assert [job.name for job in runner.list()] == ["3", "2"]
        with pytest.raises(UnknownJob, match="end with the server, and the last 2 are remembered"):
            runner.get(jobs[0].id)

    run(test)


def test_what_runs_ends_with_the_loop() -> None:
    gate: list[Gate] = []

    async def begin() -> None:
        gate.append(Gate())
        Runner(1).submit("extract", "x", gate[0])
        await gate[0].began.wait()

    asyncio.run(begin())
    assert gate[0].cancelled
