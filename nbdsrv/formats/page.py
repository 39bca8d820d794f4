"""What a table says of one page of a disk: segments, kept small.

::

    guest   |        page 0         |        page 1         | ...
            |DATA |ABSENT|DATA |BLK |ZERO|      ABSENT      |         Segments

====== ============================ ========== =====================================
kind   bytes                        extent     allocation depth
====== ============================ ========== =====================================
DATA   as they are in a file        data       1
BLOCK  an encoded block             data       1
ZERO   zeroes, said so explicitly   zero       1
ABSENT the backing Disk's, or none  as below   one more than the backing's, 0 if none
====== ============================ ========== =====================================

Rule: ZERO and ABSENT differ. A cluster zeroed in an overlay hides what lies below it.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, MutableSequence, Sequence
from enum import IntEnum
from typing import NamedTuple

from nbdsrv.formats.image_file import ImageFile

__all__ = ["Kind", "Page", "Segment", "Stretch"]


class Kind(IntEnum):
    """Where the bytes of a Segment come from; see the module."""

    DATA = 0
    BLOCK = 1
    ZERO = 2
    ABSENT = 3


_DATA, _ZERO = int(Kind.DATA), int(Kind.ZERO)


class Segment(NamedTuple):
    """``length`` consecutive bytes of one kind.

    Attributes:
        length: bytes, at least 1.
        kind: a ``Kind``.
        position: DATA: of the first byte in ``file``. BLOCK: the block's key, any integer; the
            block is exactly this segment. Otherwise 0.
        file: DATA: which file, None for the image's own.
    """

    length: int
    kind: int
    position: int = 0
    file: ImageFile | None = None


Stretch = tuple[int, int, int, int, ImageFile | None]
"""(start, end, kind, position, file) of a Segment by guest offset."""


class Page:
    """The segments of one page by guest offset, neighbours merged where the file goes on.

    Arrays, not objects: a fragmented disk has a segment per block, and 25 bytes for each instead of
    200 is what lets all of them stay in memory.

    Attributes:
        edges: where each segment begins, and the end of the last.
    """

    __slots__ = ("edges", "files", "kinds", "positions")

    def __init__(self, offset: int, segments: Iterable[Segment]) -> None:
        edges = [offset]
        kinds = bytearray()
        positions: list[int] = []
        files: list[ImageFile | None] = []
        end, kind, following, file = offset, -1, 0, None
        for length, next_kind, next_position, next_file in segments:
            end += length
            if next_kind == kind and (
                kind >= _ZERO
                or (kind == _DATA and next_position == following and next_file is file)
            ):
                edges[-1] = end
            else:
                kind, file = int(next_kind), next_file
                kinds.append(kind)
                positions.append(next_position)
                files.append(file)
                edges.append(end)
            following = next_position + length
        self.edges: MutableSequence[int] = array("q", edges)
        self.kinds = kinds
        self.positions: MutableSequence[int] = _integers(positions)
        self.files: list[ImageFile | None] | None = files if any(files) else None

    def __len__(self) -> int:
        return len(self.kinds)

    def find(self, offset: int) -> int:
        """Index of the segment that holds ``offset``."""
        return bisect_right(self.edges, offset) - 1

    def stretch(self, index: int) -> Stretch:
        """One segment."""
        edges, files = self.edges, self.files
        file = files[index] if files else None
        return edges[index], edges[index + 1], self.kinds[index], self.positions[index], file

    def replace(self, first: int, last: int, stretches: Sequence[Stretch]) -> None:
        """Put others in place of the segments ``first`` to ``last``; they cover the same bytes."""
        slots = slice(first, last + 1)
        self.edges[slots] = array("q", [each[0] for each in stretches])
        self.kinds[slots] = bytes(each[2] for each in stretches)
        positions = _integers([each[3] for each in stretches])
        if type(positions) is not type(self.positions):
            self.positions = list(self.positions)
        self.positions[slots] = positions
        files = [each[4] for each in stretches]
        if self.files is None and any(files):
            self.files = [None] * (len(self.kinds) - len(files) + last + 1 - first)
        if self.files is not None:
            self.files[slots] = files


def _integers(values: list[int]) -> "MutableSequence[int]":
    """Compact, unless one of them (a key may be any integer) does not fit."""
    try:
        return array("q", values)
    except OverflowError:
        return values
