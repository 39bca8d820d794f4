"""Extents: what is known about consecutive ranges of a disk.

::

    offset
      |<-- length -->|<- length ->|<---- length ---->|
      |    flags     |   flags    |      flags       |
                                                     end

Rule: an ``ExtentList`` is ascending, contiguous, without empty or equal neighbouring extents.
The one constructor sees to it, so that nobody else has to.

The same list carries ``base:allocation`` (three states below), dirty bitmaps and any other
meta context: only the meaning of the flags differs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from protocol.constants import Allocation

__all__ = ["DATA", "HOLE", "ZERO", "Extent", "ExtentList"]

DATA = 0
"""Allocated, contents not known to be zero."""
ZERO = int(Allocation.ZERO)
"""Allocated, reads as zeroes."""
HOLE = int(Allocation.HOLE | Allocation.ZERO)
"""Not allocated, reads as zeroes."""


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes with the same ``flags``."""

    length: int
    flags: int


class ExtentList:
    """A normalised run of extents starting at ``offset``. Immutable once built."""

    __slots__ = ("_extents", "length", "offset")

    def __init__(self, offset: int, extents: Iterable[tuple[int, int]]) -> None:
        """Build from (length, flags) pairs; empty ones vanish, equal neighbours merge.

        Raises:
            ValueError: a length or the offset is negative.
        """
        if offset < 0:
            raise ValueError(f"extent list at a negative offset: {offset}")
        merged: list[Extent] = []
        total = 0
        for length, flags in extents:
            if length < 0:
                raise ValueError(f"extent of negative length: {length}")
            if not length:
                continue
            total += length
            if merged and merged[-1].flags == flags:
                merged[-1] = Extent(merged[-1].length + length, flags)
            else:
                merged.append(Extent(length, flags))
        self.offset = offset
        self.length = total
        self._extents = tuple(merged)

    @property
    def end(self) -> int:
        """First byte after the last extent."""
        return self.offset + self.length

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentList):
            return NotImplemented
        return self.offset == other.offset and self._extents == other._extents

    def __hash__(self) -> int:
        return hash((self.offset, self._extents))

    def __repr__(self) -> str:
        shown = ", ".join(f"{e.length}:{e.flags:#x}" for e in self._extents[:8])
        more = ", ..." if len(self._extents) > 8 else ""
        return f"ExtentList({self.offset}, [{shown}{more}])"

    def first(self) -> "ExtentList":
        """Only the first extent (what NBD_CMD_FLAG_REQ_ONE asks for)."""
        return ExtentList(self.offset, [(e.length, e.flags) for e in self._extents[:1]])

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) of each extent, with absolute offsets."""
        at = self.offset
        for extent in self._extents:
            yield at, extent.length, extent.flags
            at += extent.length
