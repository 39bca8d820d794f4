"""Extents: the pieces a VMDK is made of, and how a sparse one is looked up.

::

    directory   | 0 | t | t | 0 | ...     where each table lies; 0: nothing of it is stored
                      |
    table           | g | g+1 | 1 | 0 |   where each grain lies; 1: zeroes, 0: not stored here
                      |
    file  ....|=======|                   grains of 512 bytes to 1 GiB, anywhere

Everything here blocks and belongs in threads. Offsets and lengths are bytes of the extent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.vmdk.structs import SECTOR

__all__ = ["Extent", "FlatExtent", "SparseExtent", "ZeroExtent", "check_grain"]

MAX_GRAIN = 1 << 30
"""Bytes; 64 KiB is usual, VMware documents no upper bound, QEMU takes up to this."""
MAX_COMPRESSED_GRAIN = 16 << 20
"""The same for grains that are decoded as a whole, in memory."""
PAGE_ENTRIES = 2048
"""Table entries read at a time, at least: some 0.3 ms of decoding."""


class Extent(ABC):
    """A range of the disk.

    Attributes:
        size: bytes.
        file: what it lies in, None if in nothing.
        page_span: bytes looked up at a time.
        grain: bytes of a block that must not be cut, 1 where there are none.
    """

    size: int
    file: ImageFile | None = None
    page_span: int = 1 << 30
    grain: int = 1

    @abstractmethod
    def segments(self, offset: int, length: int, start: int) -> Iterable[Segment]:
        """What lies in a range; ``start`` is the disk offset of the extent itself.

        Raises:
            CorruptImage: the tables make no sense.
        """

    def decode(self, sector: int, first_sector: int, disk_sector: int) -> bytes:
        """The compressed grain at ``sector``, which is the extent's ``first_sector``."""
        raise NotImplementedError  # pragma: no cover - only CompressedExtent makes BLOCK segments


class ZeroExtent(Extent):
    """Zeroes, stored nowhere."""

    def __init__(self, size: int) -> None:
        self.size = size

    def segments(self, offset: int, length: int, start: int) -> Iterable[Segment]:
        """Explicit zeroes: a parent does not show through."""
        return (Segment(length, Kind.ZERO),)


class FlatExtent(Extent):
    """A file, or a part of one, as it is."""

    file: ImageFile

    def __init__(self, file: ImageFile) -> None:
        self.size = file.size
        self.file = file

    def segments(self, offset: int, length: int, start: int) -> Iterable[Segment]:
        """All data; see ``FlatVmdk`` for disks where holes of the file show."""
        return (Segment(length, Kind.DATA, offset, self.file),)


class SparseExtent(Extent):
    """Two levels of tables. What they look like on disk is a subclass's knowledge.

    Attributes:
        table_span: bytes of the extent a table covers.
        reserved: (begin, end) of what lies in the file and is neither grain nor table.
    """

    file: ImageFile
    entry_size = 4

    def __init__(
        self,
        file: ImageFile,
        *,
        size: int,
        grain: int,
        table_entries: int,
        reserved: Sequence[tuple[int, int]],
    ) -> None:
        self.file = file
        self.size = size
        self.grain = grain
        self.table_entries = table_entries
        self.table_span = grain * table_entries
        self.page_span = self.table_span * -(-PAGE_ENTRIES // table_entries)
        self.reserved = reserved

    @abstractmethod
    def _tables(self, first: int, count: int) -> Sequence[int]:
        """Where tables lie in the file, bytes; 0 where there is none."""

    @abstractmethod
    def _grains(self, position: int, data: bytes) -> Sequence[int]:
        """Where grains lie, sectors; 0 not stored, 1 zeroes. ``position``: of the entries."""

    def segments(self, offset: int, length: int, start: int) -> Iterator[Segment]:
        """Table by table, those that lie side by side in one go."""
        cut = offset % self.grain  # in a disk of several extents pages need not begin on grains
        for segment in self._aligned(offset - cut, offset + length, start):
            if not cut:
                yield segment
                continue
            size, kind, position, file = segment
            yield Segment(size - cut, kind, position + cut * (kind == Kind.DATA), file)
            cut = 0

    def _aligned(self, begin: int, end: int, start: int) -> Iterator[Segment]:
        span = self.table_span
        first = begin // span
        tables = self._tables(first, (end - 1) // span + 1 - first)
        for index, count, position in _stretches(tables, self.table_entries * self.entry_size):
            low = max(begin, (first + index) * span)
            high = min(end, (first + index + count) * span)
            if not position:
                yield Segment(high - low, Kind.ABSENT)
                continue
            entry = position + (low // self.grain - (first + index) * self.table_entries) * (
                self.entry_size
            )
            entries = -(-(high - low) // self.grain)
            data = self.file.read(entry, entries * self.entry_size, "grain table")
            self._check_place(entry, len(data), entry, "a grain table")
            if data == bytes(len(data)):
                yield Segment(high - low, Kind.ABSENT)
            else:
                yield from self._stored(low, high, start, entry, self._grains(entry, data))

    def _stored(
        self, begin: int, end: int, start: int, entry: int, grains: Sequence[int]
    ) -> Iterator[Segment]:
        """The segments of one stretch of table entries, the first of which lies at ``entry``."""
        used: list[tuple[int, int]] = []
        for index, count, sector in _stretches(grains, self.grain // SECTOR):
            at = begin + index * self.grain
            length = min(count * self.grain, end - at)
            if sector <= 1:
                yield Segment(length, Kind.ZERO if sector else Kind.ABSENT)
                continue
            position = sector * SECTOR
            where = entry + index * self.entry_size
            self._check_place(position, length, where, "a grain")
            used.append((position, position + length))
            yield Segment(length, Kind.DATA, position, self.file)
        used.sort()
        for (_, low), (high, _) in pairwise(used):
            if high < low:
                raise self.file.corrupt(entry, f"two grains share the bytes at {high}")

    def _check_place(self, position: int, length: int, where: int, what: str) -> None:
        """``where``: of the entry that says so."""
        if position + length > self.file.size:
            raise self.file.corrupt(
                where, f"{what} at {position} lies beyond the end of the file ({self.file.size})"
            )
        for begin, end in self.reserved:
            if position < end and begin < position + length:
                raise self.file.corrupt(where, f"{what} at {position} lies within the metadata")


def check_grain(
    file: ImageFile, position: int, grain_sectors: int, *, compressed: bool = False
) -> int:
    """The size of a grain in bytes.

    Raises:
        CorruptImage: it is not a power of two, or too large.
    """
    grain = grain_sectors * SECTOR
    limit = MAX_COMPRESSED_GRAIN if compressed else MAX_GRAIN
    if not 0 < grain <= limit or grain & (grain - 1):
        raise file.corrupt(position, f"grains of {grain_sectors} sectors")
    return grain


def _stretches(places: Sequence[int], step: int) -> Iterator[tuple[int, int, int]]:
    """(index, count, first place) where each is ``step`` further, or all are 0, or all are 1."""
    index, first, expected, move = 0, -1, -1, 0
    for here, place in enumerate(places):
        if place == expected:
            expected += move
            continue
        if here:
            yield index, here - index, first
        index, first = here, place
        move = step if place > 1 else 0
        expected = place + move
    yield index, len(places) - index, first
