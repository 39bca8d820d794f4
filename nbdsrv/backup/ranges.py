"""Ranges of a disk: what has changed, what must be told, and where of that there is data.

::

    changed   |====|........|===|                  a context's extents that have flags
    told      |=====|.......|=====|....|==|        of several targets together, on coarser multiples
    data      |==|.....................|==|        the source is asked about told ranges alone
    steps      rr z          zzzzz      rr         read, or zero: the source has a hole there
"""

from collections.abc import Iterable, Iterator
from functools import partial
from heapq import merge

from nbdsrv.copying.survey import DataMap
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.sweep import sweep
from protocol.extents import DATA

__all__ = ["changed_ranges", "data_within", "ranges_within", "steps", "together", "whole"]


def whole(size: int, granularity: int) -> DataMap:
    """All of a disk."""
    return together(size, granularity, [[(0, size)] if size else []])


def together(size: int, granularity: int, parts: Iterable[Iterable[tuple[int, int]]]) -> DataMap:
    """The ranges, (offset, length) ascending, that are in any of ``parts``."""
    found = DataMap(size, granularity)
    for offset, length in merge(*parts):
        found.add(offset, length)
    return found


async def changed_ranges(disk: Disk, context: str, granularity: int) -> DataMap:
    """Where a meta context has flags.

    Raises:
        DiskError: it cannot be asked.
    """
    found = DataMap(disk.size, granularity)
    async for extents in sweep(partial(disk.status, context), 0, disk.size):
        for start, length, flags in extents.ranges():
            if flags:
                found.add(start, length)
    return found


async def data_within(disk: Disk, told: DataMap) -> DataMap:
    """Where in these ranges the disk has data.

    Raises:
        DiskError: its extents cannot be read.
    """
    found = DataMap(disk.size, told.granularity)
    for start, length in told.ranges():
        async for extents in sweep(disk.extents, start, start + length):
            for at, span, flags in extents.ranges():
                if flags == DATA:
                    found.add(at, span)
    return found


def steps(told: DataMap, data: DataMap, piece: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is data) for all told ranges; data in pieces that end on its multiples."""
    for start, length in told.ranges():
        at, end = start, start + length
        while at < end:
            is_data, until = data.data_until(at)
            stop = min(until, end)
            if is_data:
                stop = min(stop, (at // piece + 1) * piece)
            yield at, stop - at, is_data
            at = stop


def ranges_within(ranges: DataMap, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the parts of a range that are in ``ranges``."""
    at, end = offset, offset + length
    while at < end:
        inside, until = ranges.data_until(at)
        stop = min(until, end)
        if inside:
            yield at, stop - at
        at = stop
