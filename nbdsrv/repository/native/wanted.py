"""Chunks of a disk that its source must give, whether they have changed or not.

::

    page    0         1         2                     pages without any take nothing
    slots   ....      ..##....  ########  ####        one bit each
    ranges              |-|     |-----------|         (offset, length) on the disk
"""

from collections.abc import Iterator

__all__ = ["Wanted"]


class Wanted:
    """A set of chunks, by page and slot. Not thread-safe."""

    def __init__(self, chunk_size: int, page_slots: int, size: int) -> None:
        """Of a disk of ``size`` bytes."""
        self._chunk_size = chunk_size
        self._page_slots = page_slots
        self._size = size
        self._bits: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._bits)

    def add(self, page: int, start: int, stop: int) -> None:
        """The slots [start, stop) of a page."""
        if start < stop:
            self._bits[page] = self._bits.get(page, 0) | _mask(start, stop)

    def discard(self, page: int, start: int, stop: int) -> None:
        """The slots [start, stop) of a page, which need not be wanted."""
        bits = self._bits.get(page)
        if bits is None:
            return
        bits &= ~_mask(start, stop)
        if bits:
            self._bits[page] = bits
        else:
            del self._bits[page]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes, ascending, neighbours merged."""
        begin = end = 0
        for first, stop in self._runs():
            start = first * self._chunk_size
            if start != end:
                if begin < end:
                    yield begin, end - begin
                begin = start
            end = min(stop * self._chunk_size, self._size)
        if begin < end:
            yield begin, end - begin

    def _runs(self) -> Iterator[tuple[int, int]]:
        """[first, stop) of chunks, page by page."""
        for page in sorted(self._bits):
            bits, at = self._bits[page], page * self._page_slots
            while bits:
                skip = (bits & -bits).bit_length() - 1
                ones = bits >> skip
                count = (~ones & ones + 1).bit_length() - 1
                yield at + skip, at + skip + count
                bits &= ~_mask(skip, skip + count)


def _mask(start: int, stop: int) -> int:
    return ((1 << stop - start) - 1) << start
