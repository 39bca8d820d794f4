"""Disks made for one test: content in memory, extents and faults where the test says."""

import asyncio
import errno
from collections.abc import Sequence

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import RemoteRun, Run
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from protocol.extents import DATA, HOLE, ExtentList

__all__ = ["MIB", "MemoryDisk", "pieces"]

MIB = 1 << 20


class MemoryDisk(Disk):
    """Bytes in memory, read as from afar: the event loop runs between one piece and the next.

    Attributes:
        content: of the whole disk.
        data: (offset, length) of what counts as data; by default everything.
        bad: offset of a byte that cannot be read, or None.
        reads: (offset, length) of all reads so far.
        most: reads that were under way together.
    """

    name = "memory"
    format = "raw"

    def __init__(
        self,
        workers: Workers,
        content: bytes,
        data: Sequence[tuple[int, int]] | None = None,
        *,
        bad: int | None = None,
    ) -> None:
        super().__init__(workers)
        self.content = content
        self.size = len(content)
        self.data = [(0, self.size)] if data is None else list(data)
        self.bad = bad
        self.reads: list[tuple[int, int]] = []
        self.under_way = self.most = 0

    def locate(self, offset: int, length: int) -> Sequence[Run]:
        return (RemoteRun(length),)

    async def load(self, offset: int, length: int) -> None:
        raise AssertionError("all is in memory")

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(len(self.reads) * 7 % 5):
                await asyncio.sleep(0)  # those that began later may be done earlier
            if self.bad is not None and offset <= self.bad < offset + len(buffer):
                raise DiskError("reading memory: Input/output error", errno.EIO, self.bad)
            buffer[:] = self.content[offset : offset + len(buffer)]
        finally:
            self.under_way -= 1

    async def extents(self, offset: int, length: int) -> ExtentList:
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        for start, span in self.data:
            if start + span <= at or start >= end:
                continue
            found.append((max(start - at, 0), HOLE))
            at = max(start, at)
            found.append((min(start + span, end) - at, DATA))
            at = min(start + span, end)
        found.append((end - at, HOLE))
        return ExtentList(offset, found)

    async def close(self) -> None:
        pass


def pieces(size: int, *parts: tuple[int, bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """Content that is zero but for (offset, bytes) ``parts``, and where they are."""
    content = bytearray(size)
    for offset, data in parts:
        content[offset : offset + len(data)] = data
    return bytes(content), [(offset, len(data)) for offset, data in parts]
