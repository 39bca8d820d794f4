"""A file as a backup tool cut it: pieces of any length, each known by the hash of its content.

::

    ids       | id 0 | id 1 | id 2 |   ?  | id 4 |  ...       in the order of the file
    starts    0      a      b      c   gap   d      e ... size
                                            pieces of unknown size

Where the size of a piece is not known (its tool keeps sizes elsewhere, and has lost that), what
lies before the first such piece and behind the last one is found all the same, from either end.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from nbdsrv.repository.comparing import CHANGED, UNCHANGED

__all__ = ["ID_SIZE", "MAX_PIECE", "MisfitError", "Pieces"]

ID_SIZE = 32
"""Bytes of an id."""
MAX_PIECE = 64 << 20
"""Bytes of a piece, which is unpacked as a whole; restic's have at most 8 MiB, borg's 20 MiB."""
MAX_EXTENTS = 1 << 16
MANY = 1 << 15
FEW = 8
"""Pieces that are compared at a time: as many as are equal, down to so few."""


class MisfitError(Exception):
    """The pieces make no file of that size. Whoever knows the file makes it an error."""


class Pieces:
    """Which piece is where in a file. Immutable: any thread may ask.

    Attributes:
        size: of the file, bytes.
        ids: of all pieces, one behind the other.
        starts: where each piece begins, and the end; meaningless within the gap.
        gap: [begin, end) of what cannot be placed; empty if all can.
        missing: the first piece of unknown size, or None.
    """

    def __init__(self, size: int, ids: bytes, sizes: "array[int]") -> None:
        """``sizes``: of each piece, -1 where it is not known.

        Raises:
            MisfitError: they do not make a file of that size.
        """
        if len(ids) != len(sizes) * ID_SIZE:
            raise MisfitError(f"{len(sizes)} sizes for {len(ids)} bytes of ids")
        self.size = size
        self.ids = ids
        self.missing: bytes | None = None
        self.starts = array("Q")
        self.gap = (size, size)
        self._first_lost = self._last_lost = len(sizes)
        self._place(sizes)

    def _place(self, sizes: "array[int]") -> None:
        count = len(sizes)
        lost = sizes.index(-1) if -1 in sizes else count
        known = sizes[:lost]
        if known and max(known) > MAX_PIECE:
            index = next(n for n, size in enumerate(known) if size > MAX_PIECE)
            text = f"piece {self.id(index).hex()} has {known[index]} bytes, more than {MAX_PIECE}"
            raise MisfitError(text)
        self.starts = array("Q", accumulate(known, initial=0))
        at = self.starts[-1]
        if at > self.size:
            raise MisfitError(f"its pieces have more than its {self.size} bytes")
        if lost == count:
            if at != self.size:
                raise MisfitError(f"its pieces have {at} bytes, it should have {self.size}")
            return
        self.starts.extend(array("Q", bytes(8 * (count - lost))))
        self._first_lost = lost
        self.missing = self.id(lost)
        self._place_from_end(sizes, at)

    def _place_from_end(self, sizes: "array[int]", begin: int) -> None:
        starts, at = self.starts, self.size
        starts[len(sizes)] = at
        for index in range(len(sizes) - 1, -1, -1):
            if sizes[index] < 0:
                self._last_lost = index
                break
            at -= sizes[index]
            if at < begin:
                raise MisfitError(f"its pieces have more than its {self.size} bytes")
            starts[index] = at
        for index in range(self._first_lost, self._last_lost + 1):
            starts[index] = begin
        self.gap = (begin, at)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def id(self, index: int) -> bytes:
        """Of a piece."""
        return self.ids[index * ID_SIZE : (index + 1) * ID_SIZE]

    def length(self, index: int) -> int:
        """Bytes of a piece that is not in the gap."""
        return self.starts[index + 1] - self.starts[index]

    def between(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(index, begin, end) of the pieces that [offset, end) touches, ascending, contiguous.

        The gap is one of them, with the index -1.
        """
        begin, stop = self.gap
        if offset >= end:
            return
        if offset < begin:
            yield from self._known(offset, min(end, begin), 0, self._first_lost)
        if begin < stop and offset < stop and end > begin:
            yield -1, begin, stop
        if end > stop and self._last_lost < len(self):
            yield from self._known(max(offset, stop), end, self._last_lost + 1, len(self))

    def _known(
        self, offset: int, end: int, first: int, last: int
    ) -> Iterator[tuple[int, int, int]]:
        starts = self.starts
        index = bisect_right(starts, offset, first, last) - 1
        while index < last and starts[index] < end:
            stop = starts[index + 1]
            if stop > starts[index]:  # an empty piece, as nobody writes it, covers nothing
                yield index, starts[index], stop
            index += 1

    def changes(self, other: "Pieces", offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) from ``offset`` on: where this file differs from another.

        Equal pieces at equal places are unchanged; equal bytes that were cut otherwise count as
        changed. At least one, at most ``length`` bytes.
        """
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < MAX_EXTENTS:
            stop = self._same_until(other, at, end)
            flag = UNCHANGED
            if stop == at:
                flag = CHANGED
                index, begin, stop = next(self.between(at, at + 1))
                if index >= 0 and other.holds(begin, stop, self.id(index)):
                    flag = UNCHANGED
            stop = min(stop, end)
            if found and found[-1][1] == flag:
                found[-1] = (found[-1][0] + stop - at, flag)
            else:
                found.append((stop - at, flag))
            at = stop
        return found

    def _same_until(self, other: "Pieces", offset: int, end: int) -> int:
        """From ``offset`` on, up to where many equal pieces are at equal places.

        Compared as memory is: a disk has millions of them.
        """
        if self.missing is not None or other.missing is not None:
            return offset
        first = bisect_right(self.starts, offset) - 1
        theirs = bisect_right(other.starts, offset) - 1
        count = min(MANY, len(self) - first, len(other) - theirs)
        while count >= FEW:
            mine = self.starts[first : first + count + 1]
            if mine[0] < end and self._equal(other, first, theirs, count):
                return min(mine[-1], end)
            count //= 8
        return offset

    def _equal(self, other: "Pieces", first: int, theirs: int, count: int) -> bool:
        ids = slice(theirs * ID_SIZE, (theirs + count) * ID_SIZE)
        if self.ids[first * ID_SIZE : (first + count) * ID_SIZE] != other.ids[ids]:
            return False
        mine = self.starts[first : first + count + 1].tobytes()
        return mine == other.starts[theirs : theirs + count + 1].tobytes()

    def holds(self, begin: int, end: int, id_: bytes) -> bool:
        """Is exactly this range that piece?"""
        if end > self.size:
            return False
        index, *place = next(self.between(begin, begin + 1), (-1, 0, 0))
        return index >= 0 and place == [begin, end] and self.id(index) == id_
