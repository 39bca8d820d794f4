"""Bringing a disk that holds one restore point to another: only what differs is written.

::

    target holds   |aaaa|bbbb|cccc|dddd|     point P
    source         |aaaa|BBBB|0000|dddd|     another point; its context changed-since:P says
                        |data|zero|          what differs, by the ids of the chunks

Nothing proves that the target holds P; who is not sure restores it whole.
"""

import asyncio

from nbdsrv.backup.ranges import changed_ranges, data_within, steps
from nbdsrv.copying.engine import GAP, Outcome
from nbdsrv.copying.progress import Advance
from nbdsrv.copying.reading import PIECE, WINDOW, Lender, read_piece
from nbdsrv.copying.survey import DataMap
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import PointMissing
from nbdsrv.formats.writer import ImageWriter, Plan
from nbdsrv.repository.native.disk import CHANGED_SINCE
from nbdsrv.repository.native.layout import ulid_of

__all__ = ["Patch", "changed_since"]


def changed_since(source: Disk, point: str) -> str:
    """The source's context for a point: its id, or the beginning of one.

    Raises:
        PointMissing: there is none, or several.
    """
    text = point.upper()
    if ulid_of(text) == text:
        return CHANGED_SINCE + text
    found = [each for each in source.contexts if each.startswith(CHANGED_SINCE + text)]
    if len(found) != 1:
        what = f"{len(found)} other points match" if found else "no other point matches"
        raise PointMissing(f"{source.name}: {what} {point}; name one by its id, see `nbdsrv ls`")
    return found[0]


class Patch:
    """One such restore. ``run`` it once.

    Attributes:
        outcome: so far; ``data`` and ``zero`` are of what differs.
    """

    def __init__(
        self,
        source: Disk,
        context: str,
        writer: ImageWriter,
        workers: Workers,
        advance: Advance | None = None,
    ) -> None:
        """Write what ``context`` of ``source`` says has changed, by a writer in place."""
        self.outcome = Outcome(source.size)
        self._source = source
        self._context = context
        self._writer = writer
        self._workers = workers
        self._advance = advance
        self._buffers = Lender(WINDOW, PIECE)

    async def run(self) -> Outcome:
        """Write it, durably. Errors and cancellation leave the target in between.

        Raises:
            DiskError: the source cannot be read or the target be written.
        """
        await self._writer.open(self._source.size)
        changed = await changed_ranges(self._source, self._context, self._writer.granularity)
        data = await data_within(self._source, changed)
        self.outcome.data = data.bytes
        await self._writer.begin(Plan(self._source.size, data.ranges))
        try:
            await self._move_all(changed, data)
            await self._writer.finish()
        except BaseException as error:
            await self._writer.abort()
            raise _cause(error) from error
        return self.outcome

    async def _move_all(self, changed: DataMap, data: DataMap) -> None:
        async with asyncio.TaskGroup() as tasks:
            for offset, length, is_data in steps(changed, data, PIECE):
                if is_data:
                    buffer = await self._buffers.take()
                    tasks.create_task(self._move(offset, length, buffer))
                    continue
                self.outcome.zero += length
                for at in range(offset, offset + length, GAP):
                    await self._writer.zero(at, min(GAP, offset + length - at))

    async def _move(self, offset: int, length: int, buffer: bytearray) -> None:
        try:
            await read_piece(self._source, self._workers, offset, buffer, length, _nothing)
            await self._writer.data(offset, memoryview(buffer)[:length])
        finally:
            self._buffers.give_back(buffer)
        self.outcome.written += length
        if self._advance is not None:
            self._advance(self.outcome.written, self.outcome.data)


def _nothing() -> None:
    """It is written as it is."""


def _cause(error: BaseException) -> BaseException:
    """What went wrong first; a TaskGroup wraps it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
