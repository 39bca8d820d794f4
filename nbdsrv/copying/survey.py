"""Where a disk has data: looked up once, before it is copied or compared.

::

    extents   |==|..|=====|....zero....|=|...............|===|
    ranges    [0, 8)      [11, 16)     ... ascending, disjoint, on multiples of the granularity

A fragmented disk of many tebibytes has more extents than memory should hold. Beyond ``MAX_RANGES``
the granularity is doubled, which swallows small holes: they are then read and found to be zeroes.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator

from nbdsrv.copying.progress import Advance
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.sweep import sweep
from protocol.extents import DATA

__all__ = ["MAX_RANGES", "DataMap", "survey"]

MAX_RANGES = 1 << 20
"""Ranges kept, 16 MiB."""


class DataMap:
    """The ranges of a disk that are not known to be zeroes.

    Attributes:
        size: of the disk, bytes.
        granularity: all ranges begin and end on its multiples, the end of the disk excepted.
        bytes: in all ranges together.
    """

    def __init__(self, size: int, granularity: int = 1, limit: int = MAX_RANGES) -> None:
        self.size = size
        self.granularity = granularity
        self.bytes = 0
        self._limit = limit
        self._starts = array("Q")
        self._ends = array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, offset: int, length: int) -> None:
        """Data there. Ascending calls only."""
        unit = self.granularity
        start = offset // unit * unit
        end = min(-(-(offset + length) // unit) * unit, self.size)
        if self._ends and start <= self._ends[-1]:
            self.bytes += max(0, end - self._ends[-1])
            self._ends[-1] = max(end, self._ends[-1])
            return
        if len(self._starts) >= self._limit:
            self._coarsen()
            self.add(offset, length)
            return
        self._starts.append(start)
        self._ends.append(end)
        self.bytes += end - start

    def _coarsen(self) -> None:
        """Double the granularity until half of the places are free."""
        while len(self._starts) > self._limit // 2:
            starts, ends = self._starts, self._ends
            self._starts, self._ends = array("Q"), array("Q")
            self.granularity *= 2
            self.bytes = 0
            for start, end in zip(starts, ends, strict=True):
                self.add(start, end - start)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of all of them."""
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, end - start

    def cut(self, piece: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, is data) for the whole disk; data in pieces of at most ``piece``.

        Pieces end on multiples of ``piece``; what is not data comes as it is.
        """
        at = 0
        for start, length in self.ranges():
            if start > at:
                yield at, start - at, False
            at, end = start, start + length
            while at < end:
                stop = min((at // piece + 1) * piece, end)
                yield at, stop - at, True
                at = stop
        if at < self.size:
            yield at, self.size - at, False

    def data_until(self, offset: int) -> tuple[bool, int]:
        """Is there data at ``offset``, and up to where does that hold?"""
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and offset < self._ends[index]:
            return True, self._ends[index]
        following = index + 1
        return False, self._starts[following] if following < len(self._starts) else self.size

    def units(self, unit: int, first: int, end: int) -> Iterator[int]:
        """The numbers, from ``first`` to before ``end``, of units of ``unit`` bytes with data."""
        at = first
        while at < end:
            is_data, until = self.data_until(at * unit)
            if is_data:
                stop = min(end, -(-until // unit))
                yield from range(at, stop)
            elif until < self.size and until // unit == at:  # it begins inside of that unit
                stop = at + 1
                yield at
            else:
                stop = max(at + 1, until // unit)
            at = stop


async def survey(disk: Disk, granularity: int = 1, advance: Advance | None = None) -> DataMap:
    """Ask ``disk`` for all of its extents.

    ``advance`` is called with (bytes looked at, size), unless one answer told all.

    Raises:
        DiskError: they cannot be read.
    """
    found = DataMap(disk.size, granularity)
    async for extents in sweep(disk.extents, 0, disk.size):
        for start, length, flags in extents.ranges():
            if flags == DATA:
                found.add(start, length)
        if advance is not None and extents.end < disk.size:
            advance(extents.end, disk.size)
    return found
