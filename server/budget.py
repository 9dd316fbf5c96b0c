"""Memory that several tasks share: who wants more than is left waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Budget:
    """First come, first served, so that one who wants much is not passed for ever by those who want little."""

    def __init__(self, total: int) -> None:
        self.total = total  # bytes
        self.used = 0
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[None]:
        """``nbytes`` of it, at most all, for as long as the context lasts."""
        assert nbytes <= self.total, "the caller has refused what would wait for ever"
        async with self._turn:
            while self.used + nbytes > self.total:
                self._given_back.clear()
                await self._given_back.wait()
            self.used += nbytes
        try:
            yield
        finally:
            self.used -= nbytes
            self._given_back.set()
