"""How many assets the store holds, for ``/metrics``: others may share the store, so they are counted now and then."""

from __future__ import annotations

import asyncio
from collections import Counter

from steersman.server.state import SteeringState
from steersman.steering.errors import StoreError

EVERY_SECONDS = 60.0


async def watch(state: SteeringState) -> None:
    while True:
        await count(state)
        await asyncio.sleep(EVERY_SECONDS)


async def count(state: SteeringState) -> None:
    """Counts the store's assets; to be called after every change too."""
    try:
        found = await asyncio.to_thread(state.frontend.store.list)
    except StoreError as error:
        state.metrics.store_failed(error)
    else:
        state.metrics.stocked(Counter(info.meta.kind for info in found))
