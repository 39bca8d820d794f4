"""What a target of a backup must still be given: what it must be told, less what it has taken.

::

    told      |==========|.......|=====|........|==========|     ranges, decided by the plan
    taken     |##...#####|.......|.....|........|######....|     one bit a chunk, in pages
    owed        ---               -----                ----      read at the end, at the latest

A page that nothing of was taken needs no memory, whatever the size of the disk.
"""

from collections.abc import Iterator

from nbdsrv.backup.ranges import ranges_within
from nbdsrv.copying.survey import DataMap

__all__ = ["Owed"]

PAGE = 4096
"""Chunks of a page: 512 bytes of bits."""


class Owed:
    """A set of chunks of one disk. Belongs to one event loop."""

    def __init__(self, told: DataMap, unit: int) -> None:
        """All of ``told``, whose ranges begin and end on multiples of ``unit`` or at the end."""
        self._told = told
        self._unit = unit
        self._taken: dict[int, int] = {}

    def tell(self, told: DataMap) -> None:
        """Another plan; what has been taken stays so."""
        self._told = told

    def __contains__(self, chunk: int) -> bool:
        taken = self._taken.get(chunk // PAGE, 0) >> chunk % PAGE & 1
        return not taken and self._told.data_until(chunk * self._unit)[0]

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """[begin, end) of the chunks that are owed among [first, stop), neighbours merged.

        Those of the part that was given out already may be taken meanwhile.
        """
        unit, size = self._unit, self._told.size
        offset = first * unit
        for at, span in ranges_within(self._told, offset, min(stop * unit, size) - offset):
            yield from self._untaken(at // unit, -(-(at + span) // unit))

    def take(self, first: int, stop: int) -> None:
        """The chunks [first, stop) are owed no more."""
        while first < stop:
            page, skip = divmod(first, PAGE)
            count = min(stop - first, PAGE - skip)
            self._taken[page] = self._taken.get(page, 0) | _mask(skip, count)
            first += count

    def rest(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of all that is owed, ascending."""
        unit, size = self._unit, self._told.size
        for start, length in self._told.ranges():
            for first, stop in self._untaken(start // unit, -(-(start + length) // unit)):
                at = first * unit
                yield at, min(stop * unit, size) - at

    def _untaken(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        begin = first  # of a run that may go on in the next page
        at = first
        while at < stop:
            page, skip = divmod(at, PAGE)
            count = min(stop - at, PAGE - skip)
            bits = self._taken.get(page, 0) >> skip & _mask(0, count)
            end = at + count
            while bits:
                low = (bits & -bits).bit_length() - 1  # taken from here on
                if at + low > begin:
                    yield begin, at + low
                high = bits >> low
                ones = (~high & high + 1).bit_length() - 1
                bits >>= low + ones
                at += low + ones
                begin = at
            at = end
        if begin < stop:
            yield begin, stop


def _mask(skip: int, count: int) -> int:
    return ((1 << count) - 1) << skip
