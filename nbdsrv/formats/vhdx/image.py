"""A VHDX file as it was found: its header, its log, its metadata and its block table.

::

    header ── log ──> replayed view ── regions ──> metadata
                                              └──> BAT:  | n blocks | bitmap | n blocks | bitmap |
                                                           a chunk, 2^23 sectors

Rule: the BAT is read through the view, piece by piece; whatever it points at is checked first.
"""

from array import array
from collections.abc import Iterator
from itertools import pairwise
from sys import byteorder

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vhdx.headers import Header, read_creator, read_header, read_regions
from nbdsrv.formats.vhdx.log import replay
from nbdsrv.formats.vhdx.metadata import Metadata, read_metadata
from nbdsrv.formats.vhdx.replayed import Replayed
from nbdsrv.formats.vhdx.structs import (
    BAT_REGION,
    BITMAP_BITS,
    BITMAP_PRESENT,
    BITMAP_SIZE,
    METADATA_REGION,
    BlockState,
)

__all__ = ["STATE", "VhdxImage"]

MAX_COMPARED = 1 << 16
"""Entries up to which a BAT is searched as a whole for blocks that overlap; in a larger one those
of the same page are compared."""

POSITION = ~((1 << 20) - 1)
"""The bits of a BAT entry that are a position: it counts MiB from bit 20 on."""
STATE = 7
"""The bits of a BAT entry that are a ``BlockState``."""


class VhdxImage:
    """What was found in the headers and the metadata of one file."""

    def __init__(self, file: ImageFile) -> None:
        """Blocking."""
        self.file = file
        self.creator = read_creator(file)
        self.header: Header = read_header(file)
        self.view = Replayed(file, file.size, [])
        if self.header.logged:
            header = self.header
            self.view = replay(file, header.log_offset, header.log_length, header.log_guid)
        regions, self._reserved = read_regions(file, self.view, self.header)
        self.metadata: Metadata = read_metadata(file, self.view, regions[METADATA_REGION])
        self.bat_at, bat_length = regions[BAT_REGION]
        self.ratio = BITMAP_BITS * self.metadata.sector_size // self.metadata.block_size
        self.blocks = -(-self.metadata.size // self.metadata.block_size)
        entries = self._entry_count()
        if 8 * entries > bat_length:
            text = f"a block table of {bat_length} bytes for {entries} blocks and bitmaps"
            raise file.corrupt(self.bat_at, text)
        if 0 < entries <= MAX_COMPARED:
            self.check_overlaps(0, self.blocks - 1)

    def _entry_count(self) -> int:
        if self.metadata.parent is not None:
            return -(-self.blocks // self.ratio) * (self.ratio + 1)
        return self.blocks + max(self.blocks - 1, 0) // self.ratio

    def index(self, block: int) -> int:
        """Of a block's entry in the BAT."""
        return block + block // self.ratio

    def entries(self, first: int, count: int) -> "array[int]":
        """Of the BAT."""
        entries = array("Q", self.view.read(self.bat_at + 8 * first, 8 * count, "the block table"))
        if byteorder == "big":
            entries.byteswap()
        return entries

    def chunks(self, first: int, last: int) -> Iterator[tuple[int, "array[int]"]]:
        """(block, entries from it on) of the blocks ``first`` to ``last``, chunk by chunk."""
        while first <= last:
            upto = min(first - first % self.ratio + self.ratio - 1, last)
            yield first, self.entries(self.index(first), upto - first + 1)
            first = upto + 1

    def is_even(self, entries: "array[int]") -> bool:
        """Are all of these blocks in the same state and, if they are here, in one piece?"""
        first = entries[0]
        if first & STATE < BlockState.FULLY_PRESENT:
            return entries.count(first) == len(entries)
        if first & STATE != BlockState.FULLY_PRESENT or first > self.view.size:
            return False
        step = self.metadata.block_size
        return entries == array("Q", range(first, first + step * len(entries), step))

    def place(self, block: int, entry: int, end: int) -> int:
        """Where the block is; CorruptImage unless everything up to ``end`` of the disk can be."""
        block_size, position = self.metadata.block_size, entry & POSITION
        end = min(-(-end // block_size) * block_size, self.metadata.size)
        self._check_place(self.index(block), position, position + end - block * block_size)
        return position

    def bitmap(self, chunk: int) -> int:
        """Where the sector bitmap of a chunk is."""
        index = chunk * (self.ratio + 1) + self.ratio
        entry = self.entries(index, 1)[0]
        if entry & STATE != BITMAP_PRESENT:
            text = f"blocks are partly here, but chunk {chunk} has no sector bitmap"
            raise self.corrupt(index, text)
        position = entry & POSITION
        self._check_place(index, position, position + BITMAP_SIZE)
        return position

    def _check_place(self, index: int, start: int, end: int) -> None:
        if end > self.view.size:
            problem = f"beyond the end of the file ({self.view.size})"
        elif taken := self._reserved.at(start, end):
            problem = f"on {taken}"
        else:
            return
        raise self.corrupt(index, f"a block of {end - start} bytes at {start} lies {problem}")

    def check_overlaps(self, first: int, last: int) -> None:
        """CorruptImage if two of these blocks, or of the bitmaps among them, overlap."""
        base = self.index(first)
        present = sorted(
            (entry & POSITION, index)
            for index, entry in enumerate(self.entries(base, self.index(last) - base + 1), base)
            if entry & STATE >= BlockState.FULLY_PRESENT
        )
        for (low, index), (high, other) in pairwise(present):
            if high < low + self._length(index):
                raise self.corrupt(other, f"what lies at {high} overlaps the block at {low}")

    def _length(self, index: int) -> int:
        is_bitmap = index % (self.ratio + 1) == self.ratio
        return BITMAP_SIZE if is_bitmap else self.metadata.block_size

    def corrupt(self, index: int, what: str) -> CorruptImage:
        """The error to raise about an entry of the BAT."""
        return self.file.corrupt(self.bat_at + 8 * index, what)
