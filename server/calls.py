"""Questions to the workers about requests; those asked while a call is under way go together in the next one."""

from __future__ import annotations

import asyncio
from typing import Any

from steersman.server.engine.frontend import Frontend
from steersman.steering.errors import EngineUnsteered


class Calls:
    """``method`` takes a mapping from requests' keys to questions; each rank answers with one of answers, or None."""

    def __init__(self, frontend: Frontend, method: str) -> None:
        self.frontend = frontend
        self.method = method
        self._waiting: dict[str, tuple[Any, asyncio.Future[list[Any]]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def ask(self, key: str, question: Any) -> list[Any]:
        """The answer of every rank that has one. Raises EngineUnsteered when the call fails."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting[key] = question, future
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            try:
                answers = await self.frontend.rpc(self.method, {key: question for key, (question, _) in batch.items()})
                found = {key: [a[key] for a in answers if a is not None and key in a] for key in batch}
            except Exception as error:
                failed = f"the engine's reports could not be read: {error or type(error).__name__}"
                for _, future in batch.values():
                    if not future.done():
                        future.set_exception(EngineUnsteered(failed, "steering"))
                continue
            for key, (_, future) in batch.items():
                if not future.done():
                    future.set_result(found[key])
