"""What is known of a sparse file's layout, kept in memory.

::

    0          a      b                 c        d        size
    | unknown  | data |     unknown     |  hole  | unknown |

Rule: stale knowledge of *data* is harmless (a hole punched meanwhile reads as zeroes through it),
stale knowledge of a *hole* would be wrong content. So data is trusted, and a hole is only a
promise that asking the kernel again will not have to wait for the disk.
"""

from bisect import bisect_right

__all__ = ["ExtentMap"]

MAX_ENTRIES = 1 << 16
"""Extents remembered per file, some 10 MiB at worst; beyond it the map starts anew."""


class ExtentMap:
    """Disjoint, ascending (start, end, is data) entries. Not thread-safe."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[tuple[int, int, bool]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, offset: int) -> tuple[int, int, bool] | None:
        """The entry that holds ``offset``."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        entry = self._entries[index]
        return entry if offset < entry[1] else None

    def learn(self, start: int, end: int, *, data: bool) -> None:
        """[start, end) is so; what was known of it before is forgotten, neighbours merge."""
        if start >= end:
            return
        self.forget(start, end)
        index = bisect_right(self._starts, start)
        if index and self._entries[index - 1][1:] == (start, data):
            index -= 1
            start = self._pop(index)[0]
        if index < len(self._entries):
            after = self._entries[index]
            if after[0] == end and after[2] == data:
                end = self._pop(index)[1]
        if len(self._entries) >= MAX_ENTRIES:
            self.clear()
            index = 0
        self._insert(index, (start, end, data))

    def forget(self, start: int, end: int) -> None:
        """Nothing is known of [start, end) any more."""
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._entries) and self._entries[index][0] < end:
            low, high, data = self._entries[index]
            if high <= start:
                index += 1
                continue
            self._pop(index)
            if low < start:
                self._insert(index, (low, start, data))
                index += 1
            if high > end:
                self._insert(index, (end, high, data))
                index += 1

    def clear(self) -> None:
        """Forget everything."""
        self._starts.clear()
        self._entries.clear()

    def _pop(self, index: int) -> tuple[int, int, bool]:
        del self._starts[index]
        return self._entries.pop(index)

    def _insert(self, index: int, entry: tuple[int, int, bool]) -> None:
        self._starts.insert(index, entry[0])
        self._entries.insert(index, entry)
