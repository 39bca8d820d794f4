"""Disks one after the other, as one.

::

    |------ first ------|--- second ---|------ third ------|
    0                   |              |                   size
                        starts[1]      starts[2]
"""

import errno as os_errno
from bisect import bisect_right
from collections.abc import Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import RemoteRun, Run
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import ExtentList

__all__ = ["Concat"]


class Concat(Disk):
    """Read-only. Its parts may be anything that never changes while it is open."""

    format = "concat"

    def __init__(self, workers: Workers, name: str, parts: Sequence[Disk]) -> None:
        """Becomes the owner of ``parts``, of which there is at least one, none of them empty."""
        super().__init__(workers)
        self.name = name
        self._parts = tuple(parts)
        self._starts: list[int] = []
        self.size = 0
        for part in parts:
            self._starts.append(self.size)
            self.size += part.size

    def _pieces(self, offset: int, length: int) -> Sequence[tuple[Disk, int, int]]:
        """(part, offset in it, length) of a range, which is not empty."""
        pieces = []
        index = bisect_right(self._starts, offset) - 1
        while length:
            part = self._parts[index]
            inside = offset - self._starts[index]
            count = min(length, part.size - inside)
            pieces.append((part, inside, count))
            offset, length, index = offset + count, length - count, index + 1
        return pieces

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """What the parts say; within one of them it costs a bisection more."""
        index = bisect_right(self._starts, offset) - 1
        part, inside = self._parts[index], offset - self._starts[index]
        if inside + length <= part.size:
            return part.locate(inside, length)
        runs: list[Run] = []
        for part, inside, count in self._pieces(offset, length):
            found = part.locate(inside, count)
            if found is None:
                return None
            if any(isinstance(run, RemoteRun) for run in found):
                return (RemoteRun(length),)
            runs += found  # none reaches beyond the part's end
        return runs

    async def load(self, offset: int, length: int) -> None:
        """Load each part that is concerned."""
        self._check(offset, length)
        for part, inside, count in self._pieces(offset, length):
            if part.locate(inside, count) is None:
                await part.load(inside, count)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Part by part."""
        self._check(offset, len(buffer))
        done = 0
        for part, inside, count in self._pieces(offset, len(buffer)):
            try:
                await part.read_into(inside, buffer[done : done + count])
            except DiskError as error:
                if error.offset is not None:
                    error.offset += offset + done - inside
                raise
            done += count

    async def extents(self, offset: int, length: int) -> ExtentList:
        """The answer of the part at ``offset``; ask again from its end."""
        return await self.status(ALLOCATION, offset, length)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """``base:allocation`` and ``qemu:allocation-depth``, as the parts have it."""
        if context not in {ALLOCATION, ALLOCATION_DEPTH}:
            raise self._no_context(context)
        self._check(offset, length)
        if not length:
            return ExtentList(offset, ())
        part, inside, count = self._pieces(offset, length)[0]
        found = await part.status(context, inside, count)
        return ExtentList(offset, [(extent.length, extent.flags) for extent in found])

    async def cache(self, offset: int, length: int) -> None:
        """Passed on."""
        self._check(offset, length, os_errno.EINVAL)
        for part, inside, count in self._pieces(offset, length):
            await part.cache(inside, count)

    async def close(self) -> None:
        """Close every part."""
        for part in self._parts:
            await part.close()
