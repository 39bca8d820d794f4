"""The block allocation table of a VHD: where blocks are, and whether they can be there.

::

    BAT    | sector | ABSENT | sector | ...        4 bytes each, big-endian
               |                 |
    file   ..|bitmap| data |..|bitmap| data |..
"""

from array import array
from collections.abc import Sequence
from itertools import pairwise
from sys import byteorder

from nbdsrv.errors import CorruptImage
from nbdsrv.formats.vhd.metadata import Footer, Header, Readable
from nbdsrv.formats.vhd.structs import ABSENT, FOOTER_SIZE, HEADER_SIZE, MAX_NAME, SECTOR

__all__ = ["MAX_COMPARED", "BlockTable", "any_present"]

MAX_COMPARED = 1 << 16
"""Entries up to which a table is searched as a whole for blocks that overlap (128 GiB of disk); in
a larger one those that are looked at together are compared."""


class BlockTable:
    """Read piece by piece; any thread may call it, all methods block."""

    def __init__(self, file: Readable, footer: Footer, header: Header) -> None:
        """Raises CorruptImage if blocks overlap and the table is small. The file is borrowed."""
        self._file = file
        self._footer = footer
        self._header = header
        self._reserved = _reserved(header)
        self._reserved_end = max(end for _, end, _ in self._reserved)
        if header.blocks <= MAX_COMPARED:
            self.check_overlaps(0, self.entries(0, header.blocks))

    def entries(self, first: int, count: int) -> "array[int]":
        """Sectors of ``count`` blocks from ``first`` on, or ABSENT."""
        position = self._header.table_at + 4 * first
        entries = array("I", self._file.read(position, 4 * count, "the block table"))
        if byteorder == "little":
            entries.byteswap()
        return entries

    def place(self, block: int, entry: int) -> int:
        """Where the block is; CorruptImage unless it lies in the file and on nothing else."""
        header = self._header
        position = entry * SECTOR
        used = min(header.block_size, self._footer.size - block * header.block_size)
        end = position + header.bitmap_size + used
        if end > self._footer.data_end:
            problem = f"reaches beyond the end of the file ({self._footer.data_end})"
        else:
            problem = self._lies_on(position, end)
        if problem:
            raise self._corrupt(block, position, problem)
        return position

    def check_overlaps(self, first: int, entries: Sequence[int]) -> None:
        """CorruptImage if two of these blocks, from ``first`` on, share a sector."""
        length = self._header.bitmap_size + self._header.block_size
        present = sorted(entry for entry in entries if entry != ABSENT)
        for low, high in pairwise(present):
            if (high - low) * SECTOR < length:
                problem = self._lies_on(low * SECTOR, low * SECTOR + length)
                wrong = low if problem else high
                block = first + _last(entries, wrong)
                problem = problem or f"overlaps the one at {low * SECTOR}"
                raise self._corrupt(block, wrong * SECTOR, problem)

    def _lies_on(self, start: int, end: int) -> str:
        if start < self._reserved_end:
            for low, high, name in self._reserved:
                if start < high and low < end:
                    return f"lies on the {name}"
        return ""

    def _corrupt(self, block: int, position: int, problem: str) -> CorruptImage:
        at = self._header.table_at + 4 * block
        return self._file.corrupt(at, f"block {block} at {position} {problem}")


def any_present(entries: "array[int]") -> bool:
    """Is any of the blocks there?"""
    raw = entries.tobytes()
    return raw.count(0xFF) != len(raw)


def _last(entries: Sequence[int], entry: int) -> int:
    return max(index for index, other in enumerate(entries) if other == entry)


def _reserved(header: Header) -> list[tuple[int, int, str]]:
    """(start, end, name) of what no block may lie on."""
    ranges = [
        (0, FOOTER_SIZE, "copy of the footer"),
        (header.position, header.position + HEADER_SIZE, "header"),
        (header.table_at, header.table_at + 4 * header.table_entries, "block table"),
    ]
    for platform, position, length in header.locators:
        if platform and length <= MAX_NAME:
            ranges.append((position, position + length, "name of the parent"))
    return sorted(ranges)
