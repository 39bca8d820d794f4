"""A Disk found through tables, page by page: what images and other tools' restore points share.

::

    guest   |        page 0         |        page 1         | ...     ``page_span`` bytes each
            |DATA |ABSENT|DATA |BLK |ZERO|      ABSENT      |         Segments of a page
               |      |    |     |
    files  ..==|......|....|=====|##|..
                      '--> the backing Disk, or a hole

A format does two things, both blocking, in threads: ``_read_page`` reads what its table says of one
page, ``_decode`` unpacks one encoded block. Everything else is here: pages are loaded on demand,
once, kept within a bound, and turned into runs for the engine and extents for block status.
"""

import asyncio
from abc import abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from nbdsrv.disk.blocks import Blocks
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import Stored
from nbdsrv.disk.runs import BlockRun, FileRun, Run, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.page import Kind, Page, Segment, Stretch
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ZERO, ExtentList

__all__ = ["MAX_SEGMENTS", "PagedDisk"]

MAX_SEGMENTS = 1 << 20
"""Segments kept in memory per image, some 18 MiB: 64 GiB of fragmented 64 KiB clusters, and any
amount of contiguous ones."""
PAGE_COST = 30
"""What a page costs besides its segments, as so many of them: some 500 bytes, and an empty qcow2
of 2 PiB has four million pages. The 32 768 of a 16 TiB disk stay in memory if they say little."""
MAX_EXTENTS = 1 << 16
"""Extents looked up in one go; an answer may stop short."""
AHEAD = 64
"""Pages read along with one that is wanted, where they are short (a 16 TiB disk has 32 768)."""
AHEAD_SEGMENTS = 1 << 12
"""Segments after which reading ahead stops; some milliseconds of work."""
MAX_DEPTH = 255
"""Allocation depths above it are all told as this."""

_DATA, _BLOCK, _ZERO, _ABSENT = (int(kind) for kind in Kind)
_FLAGS = {_DATA: DATA, _BLOCK: DATA, _ZERO: ZERO}


class PagedDisk(Disk):
    """A Disk whose bytes are found through tables. Subclasses set ``page_span`` and ``size``.

    Attributes:
        page_span: guest bytes a page covers; a multiple of the format's block size.
        blocks: the encoded blocks.
        backing: whose bytes those of ABSENT segments are, or None.
    """

    page_span: int

    def __init__(self, workers: Workers, name: str, backing: Disk | None = None) -> None:
        """Becomes the owner of ``backing``."""
        super().__init__(workers)
        self.name = name
        self.backing = backing
        self.blocks = Blocks(workers.cache, self._decode, self._stored)
        self._pages: OrderedDict[int, Page] = OrderedDict()
        self._segments = 0
        self._next_page = 0
        self._loading = asyncio.Lock()
        self._closed = False

    # --- a format's part, in threads -----------------------------------------------------------

    @abstractmethod
    def _read_page(self, offset: int, length: int) -> Iterable[Segment]:
        """What the table says of these bytes, blocking; the segments' lengths sum to ``length``.

        ``offset`` is a multiple of ``page_span``, ``length`` that or what is left of the disk.

        Raises:
            DiskError: CorruptImage where the table points outside the file, or at itself.
        """

    def _decode(self, key: int) -> bytes:
        """The block a BLOCK Segment named, unpacked, blocking; at least the segment's length."""
        raise DiskError(f"{self.name}: no compressed block {key}")  # pragma: no cover

    def _close_files(self) -> None:
        """Close every file, blocking; called once."""

    def _file_run(self, file: ImageFile | None, position: int, length: int) -> FileRun:
        """Of a DATA Segment: ``file`` is what it names."""
        assert file is not None, f"{self.name}: a segment without a file"
        return file.run(position, length)

    # --- addresses -----------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """From pages in memory; a FileRun reaches as far as the file goes on within the page."""
        number = offset // self.page_span
        page = self._pages.get(number)
        if page is None:
            return None
        self._pages.move_to_end(number)
        edges = page.edges
        index = bisect_right(edges, offset) - 1
        end = edges[index + 1]
        if page.kinds[index] == _DATA and offset + length <= end:
            file = page.files[index] if page.files else None
            at = page.positions[index] + offset - edges[index]
            return (self._file_run(file, at, end - offset),)
        if page.kinds[index] == _BLOCK and offset + length <= edges[-1]:
            return self._locate_blocks(page, index, offset, length)
        return self._locate(offset, length)

    def _locate_blocks(
        self, page: Page, index: int, offset: int, length: int
    ) -> Sequence[Run] | None:
        """As ``_locate``, for what is mostly asked of compressed images: blocks side by side."""
        edges, kinds, positions, blocks = page.edges, page.kinds, page.positions, self.blocks
        runs: list[Run] = []
        start, limit, at = edges[index], offset + length, offset
        while at < limit:
            if kinds[index] != _BLOCK:
                return self._locate(offset, length)
            end = edges[index + 1]
            upto = min(end, limit)
            runs.append(BlockRun(blocks, positions[index], at - start, upto - at))
            start = at = end
            index += 1
        return runs

    def _stored(self, key: int) -> Stored | None:
        """Where that packed block lies, if decoding it is quick. Never blocks."""
        del key
        return None

    def _locate(self, offset: int, length: int) -> Sequence[Run] | None:
        runs: list[Run] = []
        at, limit = offset, offset + length
        for segment in self._in_memory(offset, length):
            if segment is None:
                return None
            start, end, kind, position, file = segment
            end = min(end, limit) if kind != _DATA else end
            if kind == _DATA:
                run = self._file_run(file, position + at - start, end - at)
                _append_file(runs, run)
            elif kind == _BLOCK:
                runs.append(BlockRun(self.blocks, position, at - start, end - at))
            elif kind == _ZERO:
                _append_zeroes(runs, end - at)
            elif not self._locate_below(runs, at, end - at):
                return None
            at = end
        return runs

    def _in_memory(self, offset: int, length: int) -> Iterator[Stretch | None]:
        """The segments that cover a range; None in place of a page that is not there."""
        at, limit, span = offset, offset + length, self.page_span
        while at < limit:
            number = at // span
            page = self._pages.get(number)
            if page is None:
                yield None
                return
            self._pages.move_to_end(number)
            for index in range(page.find(at), len(page)):
                if page.edges[index] >= limit:
                    return
                yield page.stretch(index)
            at = (number + 1) * span

    def _locate_below(self, runs: list[Run], offset: int, length: int) -> bool:
        """What is absent here; False if the backing Disk has to load first."""
        inside = self._inside_backing(offset, length)
        if inside:
            assert self.backing is not None
            below = self.backing.locate(offset, inside)
            if below is None:
                return False
            left = inside
            for run in below:
                clipped = run if run.length <= left else run._replace(length=left)
                if isinstance(clipped, FileRun):
                    _append_file(runs, clipped)
                elif isinstance(clipped, ZeroRun):
                    _append_zeroes(runs, clipped.length)
                else:
                    runs.append(clipped)
                left -= clipped.length
                if not left:
                    break
        if inside < length:
            _append_zeroes(runs, length - inside)
        return True

    def _inside_backing(self, offset: int, length: int) -> int:
        """How many of these bytes the backing Disk has; it may be shorter than we are."""
        if self.backing is None:
            return 0
        return max(0, min(length, self.backing.size - offset))

    # --- metadata ------------------------------------------------------------------------------

    async def load(self, offset: int, length: int) -> None:
        """Read the pages of this range, and what the backing Disk needs for it."""
        self._check(offset, length)
        await self._load_pages(offset, length)
        if self.backing is None:
            return
        for segment in list(self._in_memory(offset, length)):
            if segment is None:
                return  # evicted again by somebody else's load; the caller comes back
            start, end, kind, *_ = segment
            begin = max(start, offset)
            inside = self._inside_backing(begin, min(end, offset + length) - begin)
            if kind == _ABSENT and inside and self.backing.locate(begin, inside) is None:
                await self.backing.load(begin, inside)

    async def _load_pages(self, offset: int, length: int) -> None:
        span = self.page_span
        numbers = range(offset // span, (offset + length - 1) // span + 1)
        if all(number in self._pages for number in numbers):
            return
        async with self._loading:
            if self._closed:
                raise DiskError(f"{self.name} is closed")
            missing = [number for number in numbers if number not in self._pages]
            if not missing:
                return
            # Only who reads on gets more than he asked for: elsewhere it would push out pages
            # that somebody uses, and take milliseconds.
            goes_on = numbers.start == self._next_page
            upto = numbers.stop + (AHEAD if goes_on else 0)
            ahead = [n for n in range(numbers.stop, upto) if n not in self._pages]
            pages = await self.workers.look_up(self._read_pages, missing, ahead)
            self._next_page = max(number for number, _ in pages) + 1
            for number, page in pages:
                self._keep(number, page)
            for number in numbers:
                if number in self._pages:
                    self._pages.move_to_end(number)  # what is wanted now goes last
            self._evict()

    def _read_pages(
        self, wanted: Sequence[int], ahead: Sequence[int]
    ) -> Sequence[tuple[int, Page]]:
        """In a thread."""
        pages = [(number, self._read_one(number)) for number in wanted]
        segments = sum(len(page) for _, page in pages)
        for number in ahead:
            if segments > AHEAD_SEGMENTS or number * self.page_span >= self.size:
                break
            try:
                page = self._read_one(number)
            except DiskError:
                break  # somebody who wants it will be told
            segments += len(page)
            pages.append((number, page))
        return pages

    def _read_one(self, number: int) -> Page:
        offset = number * self.page_span
        length = min(self.page_span, self.size - offset)
        page = Page(offset, self._read_page(offset, length))
        end = page.edges[-1]
        assert end == offset + length, f"{self.name}: page at {offset} ends at {end}"
        return page

    def _keep(self, number: int, page: Page) -> None:
        pages = self._pages
        old = pages.pop(number, None)
        if old is not None:
            self._segments -= len(old) + PAGE_COST
        pages[number] = page
        self._segments += len(page) + PAGE_COST

    def _evict(self) -> None:
        pages = self._pages
        while self._segments > MAX_SEGMENTS and len(pages) > 1:
            _, oldest = pages.popitem(last=False)
            self._segments -= len(oldest) + PAGE_COST

    # --- block status --------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> ExtentList:
        """As the tables of the whole chain say; a compressed block is data."""
        return await self.status(ALLOCATION, offset, length)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """``base:allocation`` and ``qemu:allocation-depth``; formats add their own contexts."""
        if context not in {ALLOCATION, ALLOCATION_DEPTH}:
            raise self._no_context(context)
        self._check(offset, length)
        depth = context == ALLOCATION_DEPTH
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < MAX_EXTENTS:
            # A page at a time: a range may be a whole disk of many tebibytes.
            upto = min((at // self.page_span + 1) * self.page_span, end)
            await self._load_pages(at, upto - at)
            for segment in list(self._in_memory(at, upto - at)):
                if segment is None:
                    break
                start, stop, kind, *_ = segment
                begin, stop = max(start, at), min(stop, upto)
                if kind != _ABSENT:
                    found.append((stop - begin, 1 if depth else _FLAGS[kind]))
                    at = stop
                    continue
                below = await self._status_below(context, begin, stop - begin)
                found += below
                at += sum(span for span, _ in below)
                if at < stop:
                    break  # the backing Disk answered for less: ask it again from there
        return ExtentList(offset, found)

    async def _status_below(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        inside = self._inside_backing(offset, length)
        if not inside:
            return [(length, 0 if context == ALLOCATION_DEPTH else HOLE)]
        assert self.backing is not None
        below = await self.backing.status(context, offset, inside)
        if context == ALLOCATION_DEPTH:
            return [(e.length, min(e.flags + 1, MAX_DEPTH) if e.flags else 0) for e in below]
        return [(e.length, e.flags) for e in below]

    # --- life ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the files and the backing Disk."""
        if self._closed:
            return
        self._closed = True
        self._pages.clear()
        self._segments = 0
        self.blocks.close()
        await self.workers.look_up(self._close_files)
        if self.backing is not None:
            await self.backing.close()


def _append_file(runs: list[Run], run: FileRun) -> None:
    """Add a run, or make the last one longer where the file simply goes on."""
    if runs:
        last = runs[-1]
        if (
            isinstance(last, FileRun)
            and last.fd == run.fd
            and last.position + last.length == run.position
        ):
            runs[-1] = last._replace(length=last.length + run.length)
            return
    runs.append(run)


def _append_zeroes(runs: list[Run], length: int) -> None:
    if runs and isinstance(runs[-1], ZeroRun):
        runs[-1] = ZeroRun(runs[-1].length + length)
    else:
        runs.append(ZeroRun(length))
