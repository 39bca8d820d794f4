"""One disk of one point: a chain of data files, read as a disk.

::

    guest    |  64 KiB read  |
    over()   | inc 2 | full  | full, LZ4 |  hole   | inc 1, zero |      newest file first
    runs     | FileRun, sendfile | BlockRun 256 KiB | ZeroRun ...

Extents that are not packed are served from the file as they are; of LZ4 frames the 256 KiB around
a read are unpacked. Where a file is cut short or broken, what it would have had is EIO, unless
a newer file has it; all else is served.

``nbdsrv:changed-since:POINT`` is what the files say that only one of the two points is made of.
"""

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.paged import PagedDisk
from nbdsrv.repository.comparing import announced
from nbdsrv.repository.repository import CHANGED_SINCE
from nbdsrv.repository.virtnbdbackup.data_file import DataFile
from nbdsrv.repository.virtnbdbackup.index import PLAIN, ZEROES, Index
from nbdsrv.repository.virtnbdbackup.layers import FAULT, Layer, Piece, over, ranges_in
from nbdsrv.repository.virtnbdbackup.lz4_frame import UNIT
from nbdsrv.repository.virtnbdbackup.open_files import OpenFile
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import ExtentList
from protocol.terms import BlockSizes

__all__ = ["VirtnbdDisk", "bounds", "changed_between"]

log = logging.getLogger(__name__)

PAGE = 512 << 20
"""Bytes of a page."""
WINDOW = 16 << 30
"""Bytes of the disk looked at in one go for allocation depths."""
MAX_FOUND = 1 << 16
"""Extents of an answer."""
PREFERRED = 1 << 16

# A key is layer, entry, unit of the frame, and how far in the unit the segment begins.
_SKIP_BITS, _UNIT_BITS, _ENTRY_BITS = 18, 10, 22

Opener = Callable[[Sequence[DataFile]], Awaitable[Sequence[Index]]]


class VirtnbdDisk(PagedDisk):
    """A disk of a point, read-only."""

    format = "virtnbdbackup"
    page_span = PAGE

    def __init__(
        self,
        workers: Workers,
        name: str,
        chain: Sequence[OpenFile],
        others: Mapping[str, Sequence[DataFile]],
        indexes: Opener,
        release: Callable[[], Awaitable[None]],
        facts: Mapping[str, object],
    ) -> None:
        """Use ``VirtnbdRepository.open_disk``.

        Args:
            workers: for everything that blocks.
            name: for messages.
            chain: the newest file first; open until ``release``.
            others: point to chain: what it can be compared with, from old to new.
            indexes: gives the indexes of files.
            release: called once, when it is closed.
            facts: for ``info``.
        """
        super().__init__(workers, name)
        self.size = chain[0].data.size
        self.block_sizes = BlockSizes(preferred=PREFERRED)
        self.contexts = announced(others)
        self._chain = chain
        self._others = others
        self._indexes = indexes
        self._release = release
        self._facts = facts
        self._layers: Sequence[Layer] = ()
        self._turn = asyncio.Lock()
        self._released = False

    @property
    def facts(self) -> Mapping[str, object]:
        """Point, files, version ..."""
        return self._facts

    # --- the files -----------------------------------------------------------------------------

    async def load(self, offset: int, length: int) -> None:
        """The files' extents are looked up first, then what of them is seen here."""
        self._check(offset, length)
        await self._ready()
        await super().load(offset, length)

    async def _ready(self) -> None:
        if self._layers or self._closed:
            return
        async with self._turn:
            if self._layers:
                return
            data = [each.data for each in self._chain]
            indexes = await self._indexes(data)
            for each, index in zip(self._chain, indexes, strict=True):
                if index.fault is not None:
                    log.warning("virtnbdbackup.broken file=%s why=%s", each.file.path, index.fault)
            self._layers = [
                Layer(index, bound) for index, bound in zip(indexes, bounds(data), strict=True)
            ]

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        at, end = offset, offset + length
        for piece in over(self._layers, offset, end):
            if piece.start > at:
                yield Segment(piece.start - at, Kind.ABSENT)
            yield from self._pieces(piece)
            at = piece.end
        if at < end:
            yield Segment(end - at, Kind.ABSENT)

    def _pieces(self, piece: Piece) -> Iterator[Segment]:
        start, end, layer, entry = piece
        if entry == FAULT:
            yield Segment(end - start, Kind.BLOCK, -(layer + 1))
            return
        index = self._layers[layer].index
        packed = index.packed[entry]
        inside = start - index.starts[entry]
        if packed == ZEROES:
            yield Segment(end - start, Kind.ZERO)
        elif packed == PLAIN:
            position = index.positions[entry] + inside
            yield Segment(end - start, Kind.DATA, position, self._chain[layer].file)
        else:
            head = layer << _ENTRY_BITS | entry
            while start < end:
                unit, skip = divmod(inside, UNIT)
                length = min(UNIT - skip, end - start)
                key = (head << _UNIT_BITS | unit) << _SKIP_BITS | skip
                yield Segment(length, Kind.BLOCK, key)
                start += length
                inside += length

    def _decode(self, key: int) -> bytes:
        """A unit of an LZ4 frame, from where the segment begins."""
        if key < 0:
            fault = self._layers[-key - 1].index.fault
            assert fault is not None
            raise CorruptImage(str(fault))
        rest, skip = divmod(key, 1 << _SKIP_BITS)
        rest, unit = divmod(rest, 1 << _UNIT_BITS)
        layer, entry = divmod(rest, 1 << _ENTRY_BITS)
        index = self._layers[layer].index
        data = self._chain[layer].frames.read(
            index.positions[entry], index.packed[entry], index.lengths[entry], unit
        )
        return data[skip:] if skip else data

    # --- block status --------------------------------------------------------------------------

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation; depth (which file of the chain has it, 1 for the newest); changes."""
        self._check(offset, length)
        other = None
        if context.startswith(CHANGED_SINCE):
            other = self._others.get(context.removeprefix(CHANGED_SINCE))
        if other is None and context not in {ALLOCATION, ALLOCATION_DEPTH}:
            raise self._no_context(context)
        if not length:
            raise DiskError(f"{self.name}: nothing lies at {offset}, its end")
        await self._ready()
        if context == ALLOCATION_DEPTH:
            return ExtentList(offset, await self.workers.run(self._depths, offset, length))
        if other is None:
            return await super().status(context, offset, length)
        mine = [each.data for each in self._chain]
        only, limit = changed_between(mine, other)
        indexes = await self._indexes(only)
        held = [ranges_in(index, self.size, offset, offset + length) for index in indexes]
        if limit < offset + length:
            held.append(iter([(max(limit, offset), offset + length)]))
        return ExtentList(offset, await self.workers.run(_merged, held, offset, length))

    def _depths(self, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < MAX_FOUND:
            stop = min(at + WINDOW, end)
            for piece in over(self._layers, at, stop):
                found += [(piece.start - at, 0), (piece.end - piece.start, piece.layer + 1)]
                at = piece.end
            found.append((stop - at, 0))
            at = stop
        return found

    async def close(self) -> None:
        """Give the files back."""
        await super().close()
        if not self._released:
            self._released = True
            await self._release()


def bounds(chain: Sequence[DataFile]) -> Sequence[int]:
    """How much of the disk each file may show: what was cut off once stays so."""
    found: list[int] = []
    least = chain[0].size
    for each in chain:
        least = min(least, each.size)
        found.append(least)
    return found


def changed_between(
    mine: Sequence[DataFile], other: Sequence[DataFile]
) -> tuple[Sequence[DataFile], int]:
    """The files only one of two chains is made of, and where the disk is new or gone behind."""
    both = {each.path for each in mine} & {each.path for each in other}
    only = [each for each in (*mine, *other) if each.path not in both]
    sizes = [each.size for each in only]
    return only, min([mine[0].size, other[0].size, *sizes])


def _merged(
    held: Iterable[Iterator[tuple[int, int]]], offset: int, length: int
) -> list[tuple[int, int]]:
    """(length, 1 where any of them has something), as far as an answer may go."""
    found: list[tuple[int, int]] = []
    at, end = offset, offset + length
    for start, stop in heapq.merge(*held):
        if len(found) >= MAX_FOUND:
            return found
        if start > at:
            found.append((start - at, 0))
            at = start
        if min(stop, end) > at:
            found.append((min(stop, end) - at, 1))
            at = min(stop, end)
    found.append((end - at, 0))
    return found
