"""Waiting for an event, for so long and no longer."""

import asyncio
from contextlib import suppress

__all__ = ["set_within"]


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Return when ``event`` is set, or after ``seconds``; is it set? May be cancelled.

    Not by ``asyncio.wait_for``: Python 3.11's forgets a cancellation that comes with the event.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
