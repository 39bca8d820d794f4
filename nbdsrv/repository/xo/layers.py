"""The disks of a chain as layers: which blocks each has, and where they are.

::

    asked for     |=======================|
    layer 0       |DATA|.......|BLOCK|....|      pieces(): what it has, and what it leaves
    layer 1            |..|DATA|     |....|      to the layers below
    layer 2            |DA|          |DATA|

A VHD in a file gives DATA where its bytes lie, once per sector bitmap; a VHD directory, a VHD in a
bucket, and whatever has a checksum give BLOCKs, which are read and unpacked as a whole. Their
sector bitmaps come with them, so what those deny is filled in from below when a block is decoded.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from sys import byteorder
from typing import NamedTuple

from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.page import Kind
from nbdsrv.formats.vhd.sectors import stretches
from nbdsrv.formats.vhd.structs import ABSENT, SECTOR
from nbdsrv.formats.vhd.table import BlockTable, any_present
from nbdsrv.repository.xo.disk_file import DiskFile
from nbdsrv.store.store import ObjectMissing

__all__ = ["PART", "BlockLayer", "DirectoryLayer", "FileLayer", "Layer", "Piece", "RemoteLayer"]

PART = 64 << 10
"""Bytes of a block that is stored as it is and can be read in parts."""
_WINDOW = 1024
"""Entries of a block table looked at together to find out that there is nothing."""
_KEPT = 256
"""Such windows kept in memory of a table that is far away: 1 MiB."""
_RUN = 1 << 16
"""Blocks whose bits are gone through at a time."""


class Piece(NamedTuple):
    """What a layer says of a range of the disk.

    Attributes:
        start: first byte.
        end: behind the last.
        kind: DATA, BLOCK, or ABSENT for what layers below may have.
        where: DATA: position in the layer's file. BLOCK: the number of the block.
    """

    start: int
    end: int
    kind: int
    where: int = 0


class Layer(ABC):
    """One disk of a chain. Thread-safe; methods block.

    Attributes:
        source: the disk.
        size: bytes of it that count: no more than those of the disks above.
        block_size: bytes.
        file: DATA lies in it, or None.
    """

    file: ImageFile | None = None

    def __init__(self, source: DiskFile, size: int) -> None:
        self.source = source
        self.size = min(size, source.footer.size)
        self.block_size = source.header.block_size
        self.blocks = -(-self.size // self.block_size)

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """What it has of a range; ascending, and all of the range."""
        limit = min(end, self.size)
        if start < limit:
            if self.has_any(start // self.block_size, -(-limit // self.block_size)):
                yield from self._pieces(start, limit)
            else:
                yield Piece(start, limit, Kind.ABSENT)
        if limit < end:
            yield Piece(max(start, limit), end, Kind.ABSENT)

    @abstractmethod
    def has_any(self, first: int, end: int) -> bool:
        """Is any block of these there? Yes is a guess, no is not."""

    @abstractmethod
    def present(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(first, end) of the runs of blocks that are there."""

    @abstractmethod
    def table(self) -> bytes:
        """All of the table, as it is stored.

        Raises:
            CorruptImage: it is damaged.
            StoreError: it cannot be read.
        """

    @abstractmethod
    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        """The same, within the disk."""


class FileLayer(Layer):
    """A VHD in a file of this host."""

    def __init__(self, source: DiskFile, size: int) -> None:
        super().__init__(source, size)
        assert isinstance(source.file, ImageFile)
        self.file: ImageFile = source.file
        self._table = BlockTable(source.file, source.footer, source.header)
        self._empty: set[int] = set()

    def has_any(self, first: int, end: int) -> bool:
        for window in range(first // _WINDOW, (end - 1) // _WINDOW + 1):
            if window in self._empty:
                continue
            start = window * _WINDOW
            count = min(_WINDOW, self.source.header.blocks - start)
            if any_present(self._table.entries(start, count)):
                return True
            self._empty.add(window)
        return False

    def present(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        begin = -1
        for at in range(first, end, _WINDOW):
            for block, entry in enumerate(self._table.entries(at, min(_WINDOW, end - at)), at):
                if entry != ABSENT and begin < 0:
                    begin = block
                elif entry == ABSENT and begin >= 0:
                    yield begin, block
                    begin = -1
        if begin >= 0:
            yield begin, end

    def table(self) -> bytes:
        return _stored(self._table, self.source.header.blocks)

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        size = self.block_size
        first, last = start // size, (end - 1) // size
        entries = self._table.entries(first, last + 1 - first)
        self._table.check_overlaps(first, entries)
        for block, entry in enumerate(entries, first):
            begin, stop = max(start, block * size), min(end, (block + 1) * size)
            if entry == ABSENT:
                yield Piece(begin, stop, Kind.ABSENT)
            else:
                yield from self._block(block, self._table.place(block, entry), begin, stop)

    def _block(self, block: int, position: int, begin: int, stop: int) -> Iterator[Piece]:
        header, offset = self.source.header, block * self.block_size
        at = position + header.bitmap_size - offset
        first = (begin - offset) // SECTOR
        sectors = -(-(stop - offset) // SECTOR) - first
        skip = first // 8
        length = -(-(first + sectors) // 8) - skip
        bitmap = self.file.read(position + skip, length, "a sector bitmap")
        if bitmap.count(0xFF) == len(bitmap):
            yield Piece(begin, stop, Kind.DATA, at + begin)
            return
        least_first = self.source.footer.least_first
        for count, here in stretches(bitmap, first % 8, sectors, least_first=least_first):
            end = min((begin // SECTOR + count) * SECTOR, stop)
            yield Piece(begin, end, Kind.DATA if here else Kind.ABSENT, at + begin if here else 0)
            begin = end


class BlockLayer(Layer):
    """A layer of blocks that come with their sector bitmaps."""

    @abstractmethod
    def fetch(self, block: int) -> bytes:
        """A block, its sector bitmap first.

        Raises:
            ObjectMissing: it is not there although the table says so.
            CorruptImage: it is damaged.
            StoreError: it cannot be read.
        """

    @property
    def parts(self) -> bool:
        """Can a part of a block be read alone? Then ``fetch_part`` does."""
        return False

    def fetch_part(self, block: int, skip: int, length: int) -> bytes:
        """Bytes of a block with its bitmap. Raises as ``fetch``."""
        return self.fetch(block)[skip : skip + length]

    @abstractmethod
    def insist(self, blocks: Sequence[int]) -> None:
        """These are there, whatever the table says: it is known otherwise."""

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        size, at = self.block_size, start
        for first, stop in self.present(start // size, -(-end // size)):
            if first * size > at:
                yield Piece(at, first * size, Kind.ABSENT)
                at = first * size
            for block in range(first, stop):
                upto = min((block + 1) * size, end)
                yield Piece(at, upto, Kind.BLOCK, block)
                at = upto
        if at < end:
            yield Piece(at, end, Kind.ABSENT)


class DirectoryLayer(BlockLayer):
    """A VHD directory; its table is read once, when it is first asked."""

    def __init__(self, source: DiskFile, size: int) -> None:
        super().__init__(source, size)
        assert source.directory is not None
        self.directory = source.directory
        self._bits: bytes | None = None

    def load(self) -> bytes:
        """Read the table, if it has not been: a bit for each block, MSB first.

        Raises:
            CorruptImage: it is damaged.
            StoreError: it cannot be read.
        """
        bits = self._bits
        if bits is None:  # twice, if two threads are at it: all the same
            bits = self._bits = self.directory.bat()
        return bits

    def has_any(self, first: int, end: int) -> bool:
        bits = self.load()[first // 8 : -(-end // 8)]
        return bits.count(0) != len(bits)

    def present(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        # Aligned to bytes: what one call gives and the next goes on with is told as two runs.
        while first < end:
            stop = min((first // _RUN + 1) * _RUN, end)
            skip = first // 8
            bits = self.load()[skip : -(-stop // 8)]
            if bits.count(0) != len(bits):
                at = first
                for count, here in stretches(bits, first % 8, stop - first, least_first=False):
                    if here:
                        yield at, at + count
                    at += count
            first = stop

    @property
    def parts(self) -> bool:
        return self.directory.plain

    def table(self) -> bytes:
        # Only the bits of blocks are kept; the rest of what is stored is zeroes.
        return self.load().ljust(self.source.header.table_entries, b"\0")

    def insist(self, blocks: Sequence[int]) -> None:
        bits = bytearray(self.load())
        for block in blocks:
            bits[block >> 3] |= 0x80 >> (block & 7)
        self._bits = bytes(bits)

    def fetch(self, block: int) -> bytes:
        return self.directory.block(block)

    def fetch_part(self, block: int, skip: int, length: int) -> bytes:
        path = self.directory.block_file(block)
        return self.directory.remote.tree.read_range(path, skip, length)


class RemoteLayer(BlockLayer):
    """A VHD in a bucket, or one whose blocks are checked: read a block at a time."""

    def __init__(self, source: DiskFile, size: int) -> None:
        super().__init__(source, size)
        assert source.file is not None
        self._table = BlockTable(source.file, source.footer, source.header)
        self._file = source.file
        self._windows: dict[int, array[int]] = {}
        self._insisted: frozenset[int] = frozenset()

    def has_any(self, first: int, end: int) -> bool:
        windows = range(first // _WINDOW, (end - 1) // _WINDOW + 1)
        found = any(any_present(self._entries(window)) for window in windows)
        return found or any(first <= block < end for block in self._insisted)

    def present(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        begin = -1
        for window in range(first // _WINDOW, (end - 1) // _WINDOW + 1):
            for block, entry in enumerate(self._entries(window), window * _WINDOW):
                if not first <= block < end:
                    continue
                here = entry != ABSENT or block in self._insisted
                if here and begin < 0:
                    begin = block
                elif not here and begin >= 0:
                    yield begin, block
                    begin = -1
        if begin >= 0:
            yield begin, end

    def table(self) -> bytes:
        return _stored(self._table, self.source.header.blocks)

    def insist(self, blocks: Sequence[int]) -> None:
        self._insisted = frozenset(blocks)

    def _entries(self, window: int) -> "array[int]":
        """Read once, a window at a time: each is a request where the file is far away."""
        entries = self._windows.get(window)
        if entries is None:
            if len(self._windows) >= _KEPT:
                self._windows.clear()
            start = window * _WINDOW
            count = min(_WINDOW, self.source.header.blocks - start)
            entries = self._windows[window] = self._table.entries(start, count)
        return entries

    def place(self, block: int) -> int:
        """Where the block begins in the file, its sector bitmap first.

        Raises:
            ObjectMissing: it has none.
            CorruptImage: it lies outside of the file, or on something else.
        """
        entry = self._entries(block // _WINDOW)[block % _WINDOW]
        if entry == ABSENT:
            raise ObjectMissing(f"{self._file.path}: block {block} is gone")
        return self._table.place(block, entry)

    def fetch(self, block: int) -> bytes:
        position = self.place(block)
        length = self.source.header.bitmap_size + self.block_size
        # The last one may be cut off behind the end of the disk: XAPI exports it like that.
        there = min(length, self.source.footer.data_end - position)
        return self._file.read(position, there, f"block {block}").ljust(length, b"\0")


def _stored(table: BlockTable, blocks: int) -> bytes:
    entries = table.entries(0, blocks)
    if byteorder == "little":
        entries.byteswap()
    return entries.tobytes()
