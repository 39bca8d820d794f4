"""Copying a disk into an image or onto another disk.

::

    survey ──> pieces  |data 2 MiB|data|....gap....|data|...
                          |read several at a time; zeroes found in them
               ordered    [ window ] ── oldest first ──> writer.data
               otherwise  each ──────── as it is read ─> writer.data   several at a time
                                                         writer.store  in the thread that has read

What becomes of a range:

==================== ================ =================== ============================
the source has       new image        onto a disk         image over a backing disk
==================== ================ =================== ============================
a hole, zeroes       left out         written as zeroes   left out if zeroes there too
zeroes within data   left out         written as zeroes   the same
data                 written          written             left out if the same there
==================== ================ =================== ============================

To a pipe all data that was announced is written, zeroes or not: its tables went ahead.

Memory: ``WINDOW`` buffers, twice as many with a backing disk, whatever the size of the disk; with
a remote disk as much as its ``depth`` asks for, 64 MiB at most.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from nbdsrv.copying.delta import differences
from nbdsrv.copying.progress import Advance
from nbdsrv.copying.reading import PIECE, SPARE, WINDOW, Lender, read_piece
from nbdsrv.copying.survey import DataMap, survey
from nbdsrv.copying.zeroes import split
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["Copy", "Outcome"]

GAP = 1 << 28
"""Bytes zeroed at a time on a disk that is overwritten; progress is told after each."""
MIN_ZERO = 4096
"""Zeroes within data are looked for in units of this: a file system's block."""
MIN_ZERO_IN_PLACE = 1 << 16
"""On a disk that is overwritten: below it a command of its own costs more than the bytes."""

Spans = Iterable[tuple[int, int, bool]]
"""(start, length, is zero) within a piece."""


@dataclass(slots=True)
class Outcome:
    """What has been done.

    Attributes:
        size: of the disk, bytes.
        data: bytes the source said were data; these are read.
        zero: bytes that are zeroes, said so by the source or found to be.
        written: bytes of data that were handed to the target.
    """

    size: int = 0
    data: int = 0
    zero: int = 0
    written: int = 0


class Copy:
    """One copy. ``run`` it once.

    Attributes:
        outcome: so far.
    """

    def __init__(
        self,
        source: Disk,
        writer: ImageWriter,
        workers: Workers,
        *,
        base: Disk | None = None,
        advance: Advance | None = None,
        looking: Advance | None = None,
    ) -> None:
        """Copy ``source``.

        Args:
            source: stays open.
            writer: not open yet.
            workers: threads for reading.
            base: what the target has where nothing is written; only for a writer that is fresh.
            advance: called with (bytes done, bytes to do), often; counts data only.
            looking: called before that with (bytes, size) while it is found out where data is.
        """
        self.outcome = Outcome(source.size)
        self._source = source
        self._writer = writer
        self._workers = workers
        self._base = base
        self._advance = advance
        self._looking = looking
        smallest = MIN_ZERO if writer.fresh else MIN_ZERO_IN_PLACE
        self._unit = max(writer.granularity, smallest)
        # From a network in smaller pieces: the next ones are asked for the sooner.
        self._piece = max(PIECE // 2 if source.depth else PIECE, self._unit)
        # Where nothing is done with the bytes there is nothing to keep spare buffers for.
        spare = SPARE if writer.seekable else 0
        self._buffers = Lender(WINDOW, self._piece, (source, writer), spare=spare)
        self._below = Lender(WINDOW, self._piece)
        self._stored = writer.threaded and writer.fresh and base is None
        self._gaps = asyncio.Semaphore(WINDOW)
        self._done = 0

    async def run(self) -> Outcome:
        """Copy everything and finish the target.

        Cancellation and errors abort the target: a new image is not there then, a disk that was
        being overwritten is left as it is.

        Raises:
            DiskError: the source cannot be read (it names the offset) or the target be written.
        """
        try:
            await self._writer.open(self._source.size)
            data = await survey(self._source, self._unit, self._looking)
            self.outcome.data = data.bytes
            self.outcome.zero = data.size - data.bytes
            below = await survey(self._base, self._unit) if self._base else None
            await self._writer.begin(Plan(data.size, data.ranges))
            await self._move_all(data, below)
            await self._writer.finish()
        except BaseException as error:
            await self._writer.abort()
            raise _cause(error) from error
        return self.outcome

    async def _move_all(self, data: DataMap, below: DataMap | None) -> None:
        ordered = self._writer.ordered
        last: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            for offset, length, is_data in data.cut(self._piece):
                if is_data:
                    buffer = await self._buffers.take()
                    work = self._move(offset, length, buffer, last, data)
                elif self._writer.fresh and below is None:
                    continue
                else:
                    await self._gaps.acquire()
                    work = self._gap(offset, length, last, below)
                task = tasks.create_task(work)
                last = task if ordered else None

    async def _move(
        self,
        offset: int,
        length: int,
        buffer: bytearray,
        before: "asyncio.Task[None] | None",
        data: DataMap,
    ) -> None:
        """One piece of data; written when ``before`` has been."""
        try:
            spans = await self._read(offset, length, buffer)
            if before is not None:
                await asyncio.shield(before)
            view = memoryview(buffer)
            for start, span, zero in spans:
                if zero:
                    self.outcome.zero += span
                    if self._base or not self._writer.fresh:
                        await self._writer.zero(offset + start, span)
                else:
                    self.outcome.written += span
                    if not self._stored:
                        await self._writer.data(offset + start, view[start : start + span])
        finally:
            self._buffers.give_back(buffer)
        self._done += length
        if self._advance is not None:
            self._advance(self._done, data.bytes)

    async def _read(self, offset: int, length: int, buffer: bytearray) -> Spans:
        """Fill the buffer; which spans of it are to be written, and how?"""
        if not self._writer.seekable:
            find: Callable[[], Spans] = partial(_whole, length)
        elif self._stored:
            find = partial(self._store, offset, length, buffer)
        else:
            find = partial(_split, buffer, length, self._unit)
        quick = not self._writer.seekable
        spans = await read_piece(
            self._source, self._workers, offset, buffer, length, find, quick=quick
        )
        if self._base is None:
            return spans
        inside = max(0, min(length, self._base.size - offset))
        async with self._below.lend() as below:
            below[inside:length] = bytes(length - inside)
            find = partial(differences, buffer, below, length, self._unit)
            if inside:
                return await read_piece(self._base, self._workers, offset, below, inside, find)
            return find()

    def _store(self, offset: int, length: int, buffer: bytearray) -> Spans:
        """Write the data at once, in the thread that has read it."""
        spans = _split(buffer, length, self._unit)
        view = memoryview(buffer)
        for start, span, zero in spans:
            if not zero:
                self._writer.store(offset + start, view[start : start + span])
        return spans

    async def _gap(
        self,
        offset: int,
        length: int,
        before: "asyncio.Task[None] | None",
        below: DataMap | None,
    ) -> None:
        """Zeroes that nothing has to be read for."""
        try:
            if before is not None:
                await asyncio.shield(before)
            for at, span in _hidden(offset, length, below):
                for start in range(at, at + span, GAP):
                    await self._writer.zero(start, min(GAP, at + span - start))
        finally:
            self._gaps.release()


def _hidden(offset: int, length: int, below: DataMap | None) -> Iterator[tuple[int, int]]:
    """The parts of a gap where something else than zeroes may lie below."""
    if below is None:
        yield offset, length
        return
    at, end = offset, min(offset + length, below.size)
    while at < end:
        data, upto = below.data_until(at)
        upto = min(upto, end)
        if data:
            yield at, upto - at
        at = upto


def _whole(length: int) -> Spans:
    return [(0, length, False)]


def _split(buffer: bytearray, length: int, unit: int) -> Spans:
    return list(split(buffer, length, unit))


def _cause(error: BaseException) -> BaseException:
    """What went wrong first; a TaskGroup wraps it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
