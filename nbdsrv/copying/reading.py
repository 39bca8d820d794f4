"""Buffers that go round, and filling them from a Disk: what copying and comparing have in common.

Rule: a buffer is a bytearray and is looked at as one; its memoryview is only for filling it and for
handing pieces on (comparing through a memoryview is forty times slower).
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol, TypeVar

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
way. 32 MiB at most, but for remote disks (see ``Lender``)."""


SPARE = min(len(os.sched_getaffinity(0)), 4)
"""Buffers being looked at, compressed or written while others are being read from a network."""


class HasDepth(Protocol):
    """A Disk, or what writes to one."""

    @property
    def depth(self) -> int:
        """Bytes to have in flight."""


class Lender:
    """``count`` buffers of ``size`` bytes; who asks for one more waits, in order.

    With a remote disk, as many as it wants to have in flight (``Disk.depth``) and ``spare`` ones
    that are being worked on: more where the way is long, and where it is short no more than a
    processor's cache holds, which makes for twice the speed.
    """

    def __init__(
        self, count: int, size: int = PIECE, deep: Sequence[HasDepth] = (), *, spare: int = SPARE
    ) -> None:
        """``deep``: the disks that are read or written with these buffers."""
        self._count = count
        self._work = spare
        self._size = size
        self._deep = deep
        self._free: list[bytearray] = []
        self._lent = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def follow(self, *deep: HasDepth) -> None:
        """These are the disks, from now on."""
        self._deep = deep
        self._serve()

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
        if self._waiting or not self._spare():
            ready = asyncio.get_running_loop().create_future()
            self._waiting.append(ready)
            try:
                await ready
            except asyncio.CancelledError:
                if ready.done() and not ready.cancelled():
                    self._lent -= 1  # it had been promised
                    self._serve()
                raise
        else:
            self._lent += 1
        return self._free.pop() if self._free else bytearray(self._size)

    def give_back(self, buffer: bytearray) -> None:
        """No thread may be using it any more."""
        self._lent -= 1
        if self._lent + len(self._free) < self._limit():
            self._free.append(buffer)
        self._serve()

    def _limit(self) -> int:
        depth = max((each.depth for each in self._deep), default=0)
        return max(-(-depth // self._size), 1) + self._work if depth else self._count

    def _spare(self) -> bool:
        return self._lent < self._limit()

    def _serve(self) -> None:
        while self._waiting and self._spare():
            ready = self._waiting.popleft()
            if not ready.done():
                self._lent += 1
                ready.set_result(None)


async def read_piece(
    disk: Disk,
    workers: Workers,
    offset: int,
    buffer: bytearray,
    length: int,
    then: Callable[[], T],
    *,
    quick: bool = False,
) -> T:
    """Fill ``buffer[:length]`` and return what ``then``, called in the same thread, returns.

    A ``quick`` one may be called on the event loop; it is when the bytes come from a remote disk.

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
        return then() if quick else await workers.run(then)

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
