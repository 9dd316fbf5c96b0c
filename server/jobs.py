"""Long work beside the requests, in the process that serves HTTP: one job at a time, the next ones in a bounded queue.

Jobs live in memory alone. When the server ends, so do they; what an earlier job has stored stays. The last
`HISTORY` jobs that have ended are remembered.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from steersman.clients.sdk import SteersmanError
from steersman.steering.errors import SteeringError, TooManyJobs, UnknownJob

HISTORY: Final = 100
logger = logging.getLogger(__name__)


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Progress:
    """How far a job is; the work itself writes it."""

    total: int = 0  # in `unit`; 0: not known yet
    done: int = 0
    unit: str = ""

    def expect(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit

    def advance(self, count: int = 1) -> None:
        self.done += count

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


Work = Callable[[Progress], Awaitable[Mapping[str, Any]]]
"""What a job does; its result has `assets`, the refs (name@version) that it stored."""


@dataclass(eq=False)
class Job:
    kind: str
    name: str  # of the asset that it makes
    work: Work | None  # None once the job is over: it holds what the job was given
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:16]}")
    state: State = State.QUEUED
    progress: Progress = field(default_factory=Progress)
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None  # the `error` object of OpenAI's error body
    created: str = field(default_factory=lambda: _now())
    started: str | None = None
    ended: str | None = None
    task: asyncio.Future[Mapping[str, Any]] | None = None  # while it runs

    @property
    def over(self) -> bool:
        return self.state not in (State.QUEUED, State.RUNNING)

    def to_json(self) -> dict[str, Any]:
        p = self.progress
        return {
            "object": "steering.job",
            "id": self.id,
            "kind": self.kind,
            "name": self.name,
            "state": self.state.value,
            "progress": 1.0 if self.state is State.DONE else p.fraction,
            "counts": {"done": p.done, "total": p.total, "unit": p.unit},
            "result": self.result,
            "error": self.error,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
        }


class Runner:
    """Runs jobs one after another, on the event loop that calls it."""

    def __init__(self, waiting: int, history: int = HISTORY) -> None:
        """`waiting`: jobs that may queue while one runs. `history`: ended ones that are remembered."""
        self.waiting = waiting
        self.history = history
        self._jobs: dict[str, Job] = {}  # in the order of arrival
        self._draining: asyncio.Task[None] | None = None  # works the queue off

    def submit(self, kind: str, name: str, work: Work) -> Job:
        """Raises TooManyJobs when as many wait as may."""
        states = [job.state for job in self._jobs.values()]
        queued = states.count(State.QUEUED)
        if queued >= self.waiting + (State.RUNNING not in states):  # the first one runs as soon as it can
            raise TooManyJobs(f"{queued} jobs wait already (--steering-max-jobs); try again later")
        job = Job(kind, name, work)
        self._jobs[job.id] = job
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        return job

    def list(self) -> list[Job]:
        """The newest first."""
        return list(reversed(self._jobs.values()))

    def get(self, job_id: str) -> Job:
        found = self._jobs.get(job_id)
        if found is None:
            message = f"no job '{job_id[:64]}': jobs end with the server, and the last {self.history} are remembered"
            raise UnknownJob(message, "id")
        return found

    async def cancel(self, job_id: str) -> Job:
        """Ends a job that waits or runs, and returns once it has ended; one that is over stays as it is.

        What it is storing at that moment may still be stored.
        """
        job = self.get(job_id)
        if job.state is State.QUEUED:
            self._end(job, State.CANCELLED)
        elif job.task is not None:
            job.task.cancel()
            await asyncio.wait((job.task,))
            self._settle(job, job.task)
        return job

    async def _drain(self) -> None:
        while (job := next((j for j in self._jobs.values() if j.state is State.QUEUED), None)) is not None:
            assert job.work is not None, "it waits still"
            job.state, job.started = State.RUNNING, _now()
            job.task = asyncio.ensure_future(job.work(job.progress))
            try:
                await asyncio.wait((job.task,))
            finally:  # also when the server is ending
                job.task.cancel()
            self._settle(job, job.task)
            job.task = None

    def _settle(self, job: Job, task: asyncio.Future[Mapping[str, Any]]) -> None:
        if job.over:
            return
        if task.cancelled():
            self._end(job, State.CANCELLED)
        elif (error := task.exception()) is not None:
            if not isinstance(error, SteeringError | SteersmanError):
                logger.error("job %s (%s) failed", job.id, job.kind, exc_info=error)
            job.error = _told(error)
            self._end(job, State.FAILED)
        else:
            job.result = task.result()
            self._end(job, State.DONE)

    def _end(self, job: Job, state: State) -> None:
        job.state, job.ended, job.work = state, _now(), None
        over = [each.id for each in self._jobs.values() if each.over]
        for forgotten in over[: max(len(over) - self.history, 0)]:
            del self._jobs[forgotten]


def _told(error: BaseException) -> Mapping[str, Any]:
    """The `error` object of OpenAI's error body."""
    if isinstance(error, SteeringError):
        body: Mapping[str, Any] = error.body()["error"]
        return body
    if isinstance(error, SteersmanError):  # a job that talks to this server as a client does
        kind = "invalid_request_error" if error.status < 500 else "internal_error"
        return {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {
        "message": f"{type(error).__name__}: {error}",
        "type": "internal_error",
        "param": None,
        "code": "job_failed",
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
