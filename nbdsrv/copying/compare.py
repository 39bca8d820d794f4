"""Comparing two disks: the first byte that differs.

::

    one      |====|....|====|....|.........|
    other    |====|....|....|====|
              both  none  one  one  tail: must be zeroes, unless strict
              read   -    read read read where there is data

Several pieces are being read at a time; they are judged in order, so that the first difference
found is the first there is.
"""

import asyncio
import heapq
from collections import deque
from dataclasses import dataclass
from functools import partial

from nbdsrv.copying.progress import Advance
from nbdsrv.copying.reading import PIECE, WINDOW, Lender, read_piece
from nbdsrv.copying.survey import DataMap, survey
from nbdsrv.copying.zeroes import first_nonzero
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers

__all__ = ["Verdict", "compare"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out.

    Attributes:
        sizes: of both disks, bytes.
        difference: offset of the first byte that differs, None where there is none. A longer
            disk's tail differs where it is not zero; when being strict, at once.
    """

    sizes: tuple[int, int]
    difference: int | None

    @property
    def equal(self) -> bool:
        """Do the disks have the same content?"""
        return self.difference is None


async def compare(
    one: Disk,
    other: Disk,
    workers: Workers,
    *,
    strict: bool,
    advance: Advance | None = None,
    looking: Advance | None = None,
) -> Verdict:
    """Compare all of both; ``strict`` demands the same size.

    ``looking`` is told of the search for data, ``advance`` of what has been compared.

    Raises:
        DiskError: one of them cannot be read; it names the disk and the offset.
    """
    sizes = one.size, other.size
    if strict and one.size != other.size:
        return Verdict(sizes, min(sizes))
    first = _Side(one, await survey(one, advance=looking))
    second = _Side(other, await survey(other, advance=looking))
    union = _union(first.data, second.data)
    comparison = _Comparison(first, second, workers, union.bytes, advance)
    return Verdict(sizes, await comparison.run(union))


def _union(one: DataMap, other: DataMap) -> DataMap:
    union = DataMap(max(one.size, other.size))
    for offset, length in heapq.merge(one.ranges(), other.ranges()):
        union.add(offset, length)
    return union


@dataclass(frozen=True, slots=True)
class _Side:
    disk: Disk
    data: DataMap

    def length(self, offset: int, length: int) -> int:
        """How many of these bytes must be read; what follows them is zeroes."""
        is_data, upto = self.data.data_until(offset)
        if not is_data and upto >= min(offset + length, self.disk.size):
            return 0
        return min(length, self.disk.size - offset)


class _Comparison:
    def __init__(
        self, one: _Side, other: _Side, workers: Workers, total: int, advance: Advance | None
    ) -> None:
        self._one = one
        self._other = other
        self._workers = workers
        self._total = total
        self._advance = advance
        self._buffers = Lender(2 * WINDOW)

    async def run(self, union: DataMap) -> int | None:
        window: deque[asyncio.Task[int | None]] = deque()
        done = 0
        try:
            for offset, length, is_data in union.cut(PIECE):
                if not is_data:
                    continue
                if len(window) == WINDOW:
                    found = await window.popleft()
                    if found is not None:
                        return found
                    if self._advance is not None:
                        self._advance(done, self._total)
                window.append(asyncio.ensure_future(self._piece(offset, length)))
                done += length
            while window:
                found = await window.popleft()
                if found is not None:
                    return found
            return None
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _piece(self, offset: int, length: int) -> int | None:
        """Offset of the first difference within this piece."""
        one, other, workers = self._one.disk, self._other.disk, self._workers
        here = self._one.length(offset, length)
        there = self._other.length(offset, length)
        async with self._buffers.lend() as first, self._buffers.lend() as second:
            judge = partial(_first_difference, first, here, second, there)
            if not there:
                found = await read_piece(one, workers, offset, first, here, judge)
            else:
                if here:
                    await read_piece(one, workers, offset, first, here, _nothing)
                found = await read_piece(other, workers, offset, second, there, judge)
        return None if found is None else offset + found


def _nothing() -> None:
    pass


def _first_difference(one: bytearray, here: int, other: bytearray, there: int) -> int | None:
    """Within ``here`` bytes of the one and ``there`` of the other; what one lacks is zeroes."""
    common = min(here, there)
    if common == len(one) == len(other):
        if one == other:  # nothing is copied
            return None
    elif one[:common] == other[:common]:
        return first_nonzero(one if here > there else other, common, max(here, there))
    low, high = 0, common
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] != other[low:middle]:
            high = middle
        else:
            low = middle
    return low
