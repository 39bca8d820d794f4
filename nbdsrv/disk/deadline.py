"""No operation takes longer than so long, and a read that fails is tried again a few times.

::

    read   ──> attempt ──> late or EIO ──> pause ──> attempt ... ──> DiskError
    write  ──> attempt ──> late ──> DiskError: whether it was carried out is unknown

The Disk inside may be unable to stop what it has begun (a thread in a read from a dead NFS server).
So every attempt works on memory of its own, and one that is late is left behind with it.

Rule: a change is never tried again.
"""

import asyncio
import errno as os_errno
from collections.abc import Coroutine
from typing import Any, TypeVar

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from protocol.extents import ExtentList

__all__ = ["Deadline"]

T = TypeVar("T")

PAUSE_S = 0.1
"""Before a read is tried again."""
MAX_HANGING = 64
"""Late attempts that have not come back, and their memory; with that many, the Disk is gone."""

_PASSING = frozenset(
    {
        os_errno.EIO,
        os_errno.EAGAIN,
        os_errno.ETIMEDOUT,
        os_errno.ECONNRESET,
        os_errno.ECONNREFUSED,
        os_errno.ECONNABORTED,
        os_errno.EPIPE,
        os_errno.EHOSTUNREACH,
        os_errno.ENETUNREACH,
        os_errno.ESHUTDOWN,
        os_errno.ENOMEM,
    }
)
"""Faults that may be over in a moment. What is wrong with the image or the request stays so."""


class Deadline(Passthrough):
    """The Disk inside, within bounds of time.

    Attributes:
        retried: reads that were tried again.
        late: attempts that were given up.
    """

    def __init__(
        self, workers: Workers, inside: Disk, timeout_s: float, *, retries: int = 2
    ) -> None:
        """``timeout_s`` is for each attempt; ``retries`` of a read are made beside the first."""
        super().__init__(workers, inside)
        self._timeout_s = timeout_s
        self._retries = retries
        self._left_behind: set[asyncio.Task[Any]] = set()
        self._hanging = 0
        self.retried = 0
        self.late = 0

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the inner Disk does; what has been read well before an error is not read again."""
        self._check(offset, len(buffer))
        done = 0
        for left in range(self._retries, -1, -1):
            block = memoryview(bytearray(len(buffer) - done))
            try:
                work = self._inside.read_into(offset + done, block)
                await self._bounded(work, "reading", offset + done, len(block))
            except DiskError as error:
                good = min(max((error.offset or 0) - offset - done, 0), len(block))
                buffer[done : done + good] = block[:good]
                done += good
                if not left or not _is_passing(error):
                    raise
                self.retried += 1
                await asyncio.sleep(PAUSE_S)
            else:
                buffer[done:] = block
                return

    async def extents(self, offset: int, length: int) -> ExtentList:
        """The inner Disk's."""
        return await self._bounded(self._inside.extents(offset, length), "mapping", offset, length)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """The inner Disk's."""
        work = self._inside.status(context, offset, length)
        return await self._bounded(work, "mapping", offset, length)

    async def write(self, offset: int, data: memoryview) -> None:
        """As the inner Disk does, from a copy: the original may be gone before it is late."""
        copy = memoryview(bytes(data))
        await self._bounded(self._inside.write(offset, copy), "writing", offset, len(data))

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """As the inner Disk does."""
        work = self._inside.zero(offset, length, punch=punch, fast=fast)
        await self._bounded(work, "zeroing", offset, length)

    async def trim(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        await self._bounded(self._inside.trim(offset, length), "trimming", offset, length)

    async def flush(self) -> None:
        """As the inner Disk does."""
        await self._bounded(self._inside.flush(), "flushing", 0, 0)

    async def cache(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        await self._bounded(self._inside.cache(offset, length), "caching", offset, length)

    async def close(self) -> None:
        """Close the inner Disk, if it can be closed within the time."""
        if self._left_behind:
            await asyncio.wait(self._left_behind, timeout=self._timeout_s)
        await self._bounded(self._inside.close(), "closing", 0, 0)

    async def _bounded(
        self, work: Coroutine[Any, Any, T], verb: str, offset: int, length: int
    ) -> T:
        """Await, but not for long. Who is cancelled leaves the work behind, cancelled as well."""
        if self._hanging >= MAX_HANGING:
            work.close()
            text = f"{self.name}: {MAX_HANGING} operations hang, nothing more is tried"
            raise DiskError(text, os_errno.ETIMEDOUT, offset)
        task = asyncio.get_running_loop().create_task(work)
        try:
            await asyncio.wait([task], timeout=self._timeout_s)
        except asyncio.CancelledError:
            self._leave(task)
            raise
        if task.done():
            return task.result()
        self.late += 1
        self._hanging += 1
        task.add_done_callback(self._came_back)
        self._leave(task)
        what = f"{verb} {length} bytes at {offset}" if length else verb
        raise DiskError(
            f"{self.name}: {what} took longer than {self._timeout_s:g} s",
            os_errno.ETIMEDOUT,
            offset,
        )

    def _leave(self, task: "asyncio.Task[Any]") -> None:
        task.cancel()
        self._left_behind.add(task)
        task.add_done_callback(self._forget)

    def _came_back(self, _: "asyncio.Task[Any]") -> None:
        self._hanging -= 1

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()  # seen: nobody is interested any more


def _is_passing(error: DiskError) -> bool:
    return error.errno in _PASSING and not isinstance(error, CorruptImage | UnsupportedImage)
