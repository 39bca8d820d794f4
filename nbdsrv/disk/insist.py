"""Awaiting what must be done to its end, whoever has lost patience: threads, thawing ..."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["insist"]

T = TypeVar("T")


async def insist(work: Awaitable[T], *, hurry: Callable[[], None] | None = None) -> T:
    """Await ``work`` to its end, even if the caller is cancelled meanwhile; then be cancelled.

    Args:
        work: has deadlines of its own.
        hurry: is called when the caller is cancelled: shortens them.
    """
    task = asyncio.ensure_future(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
            if hurry is not None:
                hurry()
        except BaseException:  # noqa: BLE001 - raised again by result() below
            break
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what counts
        raise cancelled
    return task.result()
