"""Awaiting what must be done to its end, whoever has lost patience: threads, thawing ..."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

__all__ = ["insist"]

T = TypeVar("T")


async def insist(work: Awaitable[T]) -> T:
    """Await ``work`` to its end, even if the caller is cancelled meanwhile; then be cancelled.

    ``work`` has deadlines of its own: it cannot be hurried.
    """
    task = asyncio.ensure_future(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:  # noqa: BLE001 - raised again by result() below
            break
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what counts
        raise cancelled
    return task.result()
