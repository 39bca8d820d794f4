"""Several VMs in one command: so many at once, each for itself.

::

    web   ████████████          a VM that fails fails alone; what they share is the rate, the
    db    ███████               threads, the repositories and the connections to each server
    mail         ██████████
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from nbdsrv.copying.progress import Advance
from nbdsrv.errors import NbdsrvError

__all__ = ["Together", "for_each"]

T = TypeVar("T")
R = TypeVar("R")


async def for_each(
    items: Sequence[T], at_once: int, work: Callable[[T], Awaitable[R]]
) -> list[R | NbdsrvError]:
    """Do ``work`` for all, begun in their order; what each returns, or its error.

    Cancellation and any other error cancel all.
    """
    places = asyncio.Semaphore(at_once)

    async def one(item: T) -> R | NbdsrvError:
        async with places:
            try:
                return await work(item)
            except NbdsrvError as error:
                return error

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(item)) for item in items]
    return [task.result() for task in running]


class Together:
    """One progress of several VMs or disks: the bytes of those that are under way or done."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._finished = 0
        self._current: dict[object, tuple[int, int]] = {}

    def part(self) -> Advance:
        """Of one of them; where less is done than before, it has begun something else."""
        key = object()

        def advance(done: int, total: int) -> None:
            before = self._current.get(key)
            if before is not None and done < before[0]:  # the next disk
                self._finished += before[1]
            self._current[key] = (done, total)
            self._tell()

        return advance

    def _tell(self) -> None:
        done = self._finished + sum(done for done, _ in self._current.values())
        total = self._finished + sum(total for _, total in self._current.values())
        self._advance(done, total)
