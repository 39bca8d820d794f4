"""Chunks of which only parts have come: readers ask as they like, targets store whole chunks.

::

    reads     |-----|  |--------|     |---|          any order, size and overlap
    chunks    |---------|---------|---------|
    parts      [#######]  [####..]                   the one not added to for longest goes first

Rule: what is given up is only memory. Nobody has counted on it; it is read again at the end.
"""

from bisect import bisect_left
from collections import OrderedDict

__all__ = ["Partials"]

LIMIT = 16 << 20
"""Bytes of all unfinished chunks of one target; two chunks at least."""
MAX_SPANS = 64
"""Stretches of one chunk with gaps between them; a reader that jumps more does not finish it."""


class _Partial:
    __slots__ = ("buffer", "ends", "starts")

    def __init__(self, length: int) -> None:
        self.buffer = bytearray(length)
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, start: int, part: memoryview) -> None:
        end = start + len(part)
        self.buffer[start:end] = part
        starts, ends = self.starts, self.ends
        if ends and ends[-1] == start:  # who reads on
            ends[-1] = end
            return
        low = bisect_left(ends, start)  # the first that reaches up to here
        high = low
        while high < len(starts) and starts[high] <= end:
            high += 1
        if low < high:
            start, end = min(start, starts[low]), max(end, ends[high - 1])
        starts[low:high] = [start]
        ends[low:high] = [end]

    @property
    def whole(self) -> bool:
        return self.ends == [len(self.buffer)] and self.starts == [0]


class Partials:
    """Unfinished chunks of one disk. Belongs to one event loop."""

    def __init__(self, unit: int, size: int, limit: int = LIMIT) -> None:
        """Chunks of ``unit`` bytes of a disk of ``size`` bytes; ``limit``: bytes of memory."""
        self._unit = unit
        self._size = size
        self._most = max(limit // unit, 2)
        self._chunks: OrderedDict[int, _Partial] = OrderedDict()  # added to last at the end

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, offset: int, part: memoryview) -> bytearray | None:
        """Bytes within one chunk; the chunk, if they were what it lacked."""
        unit = self._unit
        chunk, skip = divmod(offset, unit)
        found = self._chunks.get(chunk)
        if found is None:
            if len(self._chunks) >= self._most:
                self._chunks.popitem(last=False)
            length = min(unit, self._size - chunk * unit)
            found = self._chunks[chunk] = _Partial(length)
        else:
            self._chunks.move_to_end(chunk)
        found.add(skip, part)
        if found.whole:
            del self._chunks[chunk]
            return found.buffer
        if len(found.starts) > MAX_SPANS:
            del self._chunks[chunk]
        return None

    def drop(self, first: int, stop: int) -> None:
        """The chunks [first, stop) have come as a whole."""
        for chunk in [each for each in self._chunks if first <= each < stop]:
            del self._chunks[chunk]

    def clear(self) -> None:
        """Give all memory back."""
        self._chunks.clear()
