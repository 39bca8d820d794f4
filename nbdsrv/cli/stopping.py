"""Signals to stop: what is being made is cleaned up first."""

import asyncio
import signal
from collections.abc import Awaitable
from typing import TypeVar

from nbdsrv.errors import DiskError

__all__ = ["SIGNALS", "stoppable"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


async def stoppable(work: Awaitable[T], left: str) -> T:
    """Await ``work``; SIGINT, SIGTERM or SIGHUP cancel it, once.

    Args:
        work: is awaited in the current task.
        left: what an interruption leaves, for the message.

    Raises:
        DiskError: it was stopped; names the signal and what is left.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    told: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        if not told:  # once is enough: cleaning up must not be interrupted
            told.append(number)
            task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not told:
            raise
        raise DiskError(f"stopped by {told[0].name}: {left}") from None
