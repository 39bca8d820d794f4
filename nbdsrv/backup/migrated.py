"""One disk on its way from another tool's repository into ours.

::

    told    |=====|.......|=====|            what changed, or all of it
    data    |==|..........|=====|            where the foreign disk has data
            read ─ 4 at a time ─> data       holes ─> zero, without being read
    then    what the writer wants besides; a sample of what was not told: as in the parent?
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from nbdsrv.backup.ranges import changed_ranges, data_within, steps, together, whole
from nbdsrv.copying.reading import PIECE, read_piece
from nbdsrv.copying.survey import DataMap
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.repository.native.disk_writer import NativeDiskWriter

__all__ = ["MigratedDisk"]

READERS = 4
"""Pieces on their way at a time."""

_Queue = asyncio.Queue[tuple[int, int] | None]


class MigratedDisk:
    """Copies one disk. Belongs to one event loop; ``run`` it once.

    Attributes:
        read_bytes: of the foreign disk so far.
        rechecked_bytes: of these, said to be unchanged and read all the same.
    """

    def __init__(
        self,
        content: Disk,
        told: NativeDiskWriter,
        workers: Workers,
        reading: Callable[[], AbstractContextManager[None]],
        advance: Callable[[int], None],
    ) -> None:
        """Copy ``content`` to ``told``.

        Args:
            content: stays open.
            told: of the new point.
            workers: threads.
            reading: what is done with ``content`` is done within it.
            advance: told of bytes of the disk that are done.
        """
        self._content = content
        self._told = told
        self._workers = workers
        self._reading = reading
        self._advance = advance
        self._piece = max(PIECE, told.granularity)
        self.read_bytes = 0
        self.rechecked_bytes = 0

    async def run(self, context: str, recheck: float) -> bool:
        """Tell everything that is not as in the parent.

        Args:
            context: tells what has changed since the parent; "" if nothing does.
            recheck: percent of the rest that is read to check it.

        Returns:
            True if the context did not tell all changes, so that all of it was read.

        Raises:
            DiskError: one of them fails; the source's errors pass through ``reading``.
        """
        size, unit = self._content.size, self._told.granularity
        told = whole(size, unit)
        if context:
            with self._reading():
                changed = await changed_ranges(self._content, context, unit)
            told = together(size, unit, [changed.ranges(), await self._told.wanted()])
        self._advance(size - told.bytes)
        await self._tell(told)
        distrusted = bool(context) and await self._differs(told, recheck)
        if distrusted:
            await self._tell(whole(size, unit))
        while wanted := await self._told.wanted():
            await self._tell(together(size, unit, [wanted]))
        return distrusted

    async def _tell(self, told: DataMap) -> None:
        with self._reading():
            data = await data_within(self._content, told)
        pieces: _Queue = asyncio.Queue(READERS)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(READERS):
                    tasks.create_task(self._carry(pieces))
                for offset, length, is_data in steps(told, data, self._piece):
                    if is_data:
                        await pieces.put((offset, length))
                    else:
                        await self._told.zero(offset, length)
                        self._advance(length)
                for _ in range(READERS):
                    await pieces.put(None)
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _carry(self, pieces: _Queue) -> None:
        buffer = bytearray(self._piece)
        while (piece := await pieces.get()) is not None:
            offset, length = piece
            await self._read(offset, buffer, length)
            await self._told.data(offset, buffer, length)
            self._advance(length)

    async def _read(self, offset: int, buffer: bytearray, length: int) -> None:
        with self._reading():
            await read_piece(self._content, self._workers, offset, buffer, length, _nothing)
        self.read_bytes += length

    async def _differs(self, told: DataMap, percent: float) -> bool:
        """Is anything that was not told other than in the parent? A sample is read."""
        chosen: Iterable[tuple[int, int]] = sorted(await self._told.sample(percent, told))
        buffer = bytearray(self._piece)
        for offset, length in chosen:
            await self._read(offset, buffer, length)
            self.rechecked_bytes += length
            if await self._told.recheck(offset, buffer, length):
                return True
        return False


def _nothing() -> None:
    """What has been read is looked at elsewhere."""


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What happened first; the others were cancelled for it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
