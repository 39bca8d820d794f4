"""A byte for each 4 KiB block of a disk, in memory, at a price only where something was touched.

::

    page       0        1         2          3               64 MiB of the disk each
               |        |         |          |
    absent   (all 0)  bytes    bytearray   Packed            16 KiB, but for what is shared:
                      uniform  changing    not lately        uniform pages of a value are one object

Memory: ``MAX_OPEN`` pages as they are (64 MiB); the others packed by zlib, some 40 bytes where a
page has a few stretches and at worst, every block unlike its neighbour, 4 KiB: 64 MiB for each TiB
of the disk.
"""

import re
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator

__all__ = ["BLOCK", "BLOCK_BITS", "PAGE_BITS", "PAGE_BLOCKS", "BlockMap", "Page", "packed"]

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
"""Bytes with one value."""
PAGE_BITS = 26
PAGE_BLOCKS = 1 << PAGE_BITS - BLOCK_BITS
"""Blocks of a page."""
MAX_OPEN = 4096
"""Pages that are not packed."""
VALUES = 8
"""Values are below this; 0 is what a block has that nobody has set."""

_OTHER = [re.compile(b"[^%c]" % value, re.DOTALL) for value in range(VALUES)]
_UNIFORM = [bytes([value]) * PAGE_BLOCKS for value in range(VALUES)]
_BLOCKS_BITS = PAGE_BITS - BLOCK_BITS
_MASK = PAGE_BLOCKS - 1


class Packed:
    """A page nobody has asked for lately."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


Page = bytes | bytearray | Packed
"""A value of its own for each block (bytearray), one for all of them (bytes), or packed."""


class BlockMap:
    """Values of blocks. Not thread-safe.

    Attributes:
        counts: blocks of each value but 0.
    """

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}
        self._numbers: list[int] = []
        self._open: dict[int, None] = {}
        self.counts = [0] * VALUES

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        """Has anything of this page been set?"""
        return page in self._pages

    def get(self, block: int) -> int:
        """The value of one block."""
        page = self._page(block >> _BLOCKS_BITS)
        return 0 if page is None else page[block & _MASK]

    def stretch(self, block: int, end: int) -> tuple[int, int]:
        """The value of ``block``, and the block at or before ``end`` up to which it is that.

        Looks no further than the page, but for pages of one value and absent ones.
        """
        number = block >> _BLOCKS_BITS
        page = self._page(number)
        if page is None:
            return 0, min(self.untouched(number) << _BLOCKS_BITS, end)
        value = page[block & _MASK]
        if isinstance(page, bytes):
            number += 1
            while number << _BLOCKS_BITS < end and self._pages.get(number) is page:
                number += 1
            return value, min(number << _BLOCKS_BITS, end)
        limit = min(end - (number << _BLOCKS_BITS), PAGE_BLOCKS)
        other = _OTHER[value].search(page, block & _MASK, limit)
        return value, (number << _BLOCKS_BITS) + (other.start() if other else limit)

    def stretches(self, block: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first, end, value) from ``block`` to ``end``; neighbours may have the same value."""
        while block < end:
            value, stop = self.stretch(block, end)
            yield block, stop, value
            block = stop

    def before(self, block: int, end: int, value: int) -> int:
        """The first block from ``block`` on that has a value, not 0; ``end`` if none has."""
        while block < end:
            found, stop = self.stretch(block, end)
            if found == value:
                return block
            block = stop
        return end

    def set(self, block: int, end: int, value: int) -> None:
        """Give blocks a value that is not 0."""
        while block < end:
            number = block >> _BLOCKS_BITS
            stop = min(end, (number + 1) << _BLOCKS_BITS)
            self._set(number, block & _MASK, (block & _MASK) + stop - block, value)
            block = stop

    def _set(self, number: int, first: int, end: int, value: int) -> None:
        counts = self.counts
        page = self._page(number)
        if page is None:
            insort(self._numbers, number)
            page = _UNIFORM[0]
        elif end - first == 1:
            counts[page[first]] -= 1
        else:
            old = page[first:end]
            for each in range(1, VALUES):
                counts[each] -= old.count(each)
        counts[value] += end - first
        counts[0] = 0
        if end - first == PAGE_BLOCKS:
            self._pages[number] = _UNIFORM[value]
            self._open.pop(number, None)
            return
        if not isinstance(page, bytearray):
            page = self._unfold(number, page)
        if end - first == 1:
            page[first] = value
        else:
            page[first:end] = _UNIFORM[value][first:end]

    def _unfold(self, number: int, page: bytes) -> bytearray:
        """A page that can be changed."""
        changing = bytearray(page)
        self._pages[number] = changing
        self._open[number] = None
        if len(self._open) > MAX_OPEN:
            oldest = next(iter(self._open))
            if oldest == number:
                return changing
            del self._open[oldest]
            self._pages[oldest] = self._folded(oldest)
        return changing

    def _folded(self, number: int) -> bytes | Packed:
        page = self._pages[number]
        assert isinstance(page, bytearray)
        uniform = _UNIFORM[page[0]]
        return uniform if page == uniform else Packed(zlib.compress(page, 1))

    def _page(self, number: int) -> bytes | bytearray | None:
        page = self._pages.get(number)
        if isinstance(page, Packed):
            return self._unfold(number, zlib.decompress(page.data))
        return page

    def untouched(self, number: int) -> int:
        """The first page from ``number`` on of which something has been set; up to it all is 0."""
        index = bisect_left(self._numbers, number)
        return self._numbers[index] if index < len(self._numbers) else 1 << 62

    # --- to be kept ----------------------------------------------------------------------------

    def pages(self) -> list[tuple[int, Page]]:
        """All of it as it is now, ascending, for ``packed``; changes come after it."""
        found: list[tuple[int, Page]] = []
        for number in self._numbers:
            page = self._pages[number]
            found.append((number, bytearray(page) if isinstance(page, bytearray) else page))
        return found

    def restore(self, number: int, packed: bytes) -> bool:
        """Take a page back, of which nothing has been set; False if it is none."""
        if len(packed) == 1 and packed[0] < VALUES:
            self.set(number << _BLOCKS_BITS, (number + 1) << _BLOCKS_BITS, packed[0])
            return True
        unpacker = zlib.decompressobj()
        try:
            page = unpacker.decompress(packed, PAGE_BLOCKS)
        except zlib.error:
            return False
        if len(page) != PAGE_BLOCKS or unpacker.unconsumed_tail or page.translate(None, _VALID):
            return False
        for value in range(1, VALUES):
            self.counts[value] += page.count(value)
        if number not in self._pages:
            insort(self._numbers, number)
        self._pages[number] = Packed(packed)
        return True


_VALID = bytes(range(VALUES))


def packed(page: Page) -> bytes:
    """What ``BlockMap.restore`` takes. Any thread may call it."""
    if isinstance(page, Packed):
        return page.data
    uniform = _UNIFORM[page[0]]
    return uniform[:1] if page == uniform else zlib.compress(page, 1)
