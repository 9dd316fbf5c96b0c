"""Work for a client who may go away before it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from vllm.entrypoints.serve.utils.api_utils import listen_for_disconnect

GONE = Response(status_code=499)  # nobody reads it

T = TypeVar("T")


async def unless_gone(raw: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` comes to; None, and it is cancelled, when the client goes away first. The body has been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(listen_for_disconnect(raw))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))  # it lets go of its plan
