"""Buffers that go round, and filling them from a Disk: what copying and comparing have in common.

Rule: a buffer is a bytearray and is looked at as one; its memoryview is only for filling it and for
handing pieces on (comparing through a memoryview is forty times slower).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from nbdsrv.disk.disk import Disk, read_runs
from nbdsrv.disk.runs import RemoteRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError

__all__ = ["PIECE", "WINDOW", "Lender", "read_piece"]

T = TypeVar("T")

PIECE = 2 << 20
"""Bytes read at a time: a block of a VHD, and what still fits a processor's cache with its copy."""

WINDOW = min(max(len(os.sched_getaffinity(0)), 4), 16)
"""Pieces being read or written at a time: as many as there are processors to work on them, enough
for a disk or a network that takes its time, and no more threads than that to get in each other's
way. 32 MiB at most."""


class Lender:
    """``count`` buffers of ``size`` bytes; who asks for one more waits."""

    def __init__(self, count: int, size: int = PIECE) -> None:
        self._free: asyncio.LifoQueue[bytearray | None] = asyncio.LifoQueue()
        self._size = size
        for _ in range(count):
            self._free.put_nowait(None)

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[bytearray]:
        """A buffer until the end of the block; the one given back last, it is warmest."""
        buffer = await self.take()
        try:
            yield buffer
        finally:
            self.give_back(buffer)

    async def take(self) -> bytearray:
        """A buffer; give it back."""
        return await self._free.get() or bytearray(self._size)

    def give_back(self, buffer: bytearray) -> None:
        """No thread may be using it any more."""
        self._free.put_nowait(buffer)


async def read_piece(
    disk: Disk,
    workers: Workers,
    offset: int,
    buffer: bytearray,
    length: int,
    then: Callable[[], T],
) -> T:
    """Fill ``buffer[:length]`` and return what ``then``, called in the same thread, returns.

    Raises:
        DiskError: it cannot be read; names the offset on the disk. Or what ``then`` raises.
    """
    view = memoryview(buffer)[:length]
    with _named(offset):
        runs = await disk.runs(offset, length)
        remote = any(isinstance(run, RemoteRun) for run in runs)
        if remote:
            await disk.read_into(offset, view)
    if remote:
        return await workers.run(then)

    def work() -> T:
        with _named(offset):
            read_runs(disk.name, offset, runs, view)
        return then()

    return await workers.run(work)


@contextmanager
def _named(offset: int) -> Iterator[None]:
    """An error of a read that began at ``offset`` says where on the disk it happened."""
    try:
        yield
    except DiskError as error:
        at = offset if error.offset is None else error.offset
        raise type(error)(f"{error}, at byte {at} of the disk", error.errno, at) from error
