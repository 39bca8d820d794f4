"""Reading VHD images.

::

    guest    | block 0 | block 1 | block 2 | ...        block_size each, usually 2 MiB
                  |         |         |
    BAT      | sector  | ABSENT  | sector  |
                  |                   |
    file     ..|bitmap| data |...|bitmap| data |..| footer

What the bitmap denies is the parent's, and where there is no parent zero. The last block may be
cut off behind the end of the disk: that is how XAPI exports it.

Rule: a page reads the bitmaps of its blocks, one seek each, so pages are small, and only pages
without any block are read ahead.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from uuid import UUID

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind, Page, Segment
from nbdsrv.formats.raw import RawDisk
from nbdsrv.formats.vhd.metadata import Footer, Header, read_footer, read_header
from nbdsrv.formats.vhd.parents import find_parent, parent_names
from nbdsrv.formats.vhd.sectors import stretches
from nbdsrv.formats.vhd.structs import ABSENT, PARENT_UNIQUE_ID, SECTOR, DiskType
from nbdsrv.formats.vhd.table import BlockTable, any_present
from protocol.terms import BlockSizes

__all__ = ["FixedVhd", "SparseVhd", "open_vhd"]

PAGE = 32 << 20
"""Guest bytes of a page at most: 16 bitmaps of ordinary blocks, 65 536 sectors at worst."""
MAX_PAGE_BLOCKS = 4096
"""Blocks of a page at most, where they are small."""
WINDOW = 1 << 16
"""Bytes read at once where blocks are no larger than ``NEAR``."""
NEAR = 1 << 13
PREFERRED = 1 << 16
"""What reads are best aligned to, where blocks are larger."""


class FixedVhd(RawDisk):
    """A fixed VHD: a raw disk with a footer behind it."""

    format = "vhd"

    def __init__(self, workers: Workers, file: ImageFile, footer: Footer) -> None:
        """Becomes the owner of ``file``."""
        file.size = footer.size  # nothing behind it belongs to the disk
        super().__init__(workers, file)
        self._footer = footer

    @property
    def unique_id(self) -> UUID:
        """What children know it by."""
        return self._footer.unique_id

    @property
    def facts(self) -> Mapping[str, object]:
        """What the footer says."""
        return _footer_facts(self._footer)


class SparseVhd(MappedDisk):
    """A dynamic or differencing VHD."""

    format = "vhd"

    def __init__(
        self,
        workers: Workers,
        file: ImageFile,
        footer: Footer,
        header: Header,
        table: BlockTable,
        parent: "FixedVhd | SparseVhd | None" = None,
    ) -> None:
        """Becomes the owner of ``file`` and ``parent``."""
        super().__init__(workers, file, parent)
        self.size = footer.size
        self.page_span = min(PAGE, MAX_PAGE_BLOCKS * header.block_size)
        self.block_sizes = BlockSizes(preferred=_preferred(header.block_size))
        self._footer = footer
        self._header = header
        self._table = table

    @property
    def unique_id(self) -> UUID:
        """What children know it by."""
        return self._footer.unique_id

    @property
    def facts(self) -> Mapping[str, object]:
        """What footer and header say."""
        facts = {**_footer_facts(self._footer), "block_size": self._header.block_size}
        if self.backing is not None:
            facts["parent"] = self.backing.name
            facts["parent_unique_id"] = str(self._header.parent_id)
        return facts

    # --- pages ---------------------------------------------------------------------------------

    def _read_pages(
        self, wanted: Sequence[int], ahead: Sequence[int]
    ) -> Sequence[tuple[int, Page]]:
        return super()._read_pages(wanted, list(takewhile(self._is_empty, ahead)))

    def _is_empty(self, number: int) -> bool:
        offset = number * self.page_span
        length = min(self.page_span, self.size - offset)
        return length > 0 and not any_present(self._table.entries(*self._blocks_of(offset, length)))

    def _blocks_of(self, offset: int, length: int) -> tuple[int, int]:
        """First block of a range, and how many there are in it."""
        block_size = self._header.block_size
        first = offset // block_size
        return first, (offset + length - 1) // block_size + 1 - first

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        first, count = self._blocks_of(offset, length)
        entries = self._table.entries(first, count)
        if not any_present(entries):
            yield Segment(length, Kind.ABSENT)
            return
        self._table.check_overlaps(first, entries)
        bitmaps = _Bitmaps(self.file, self._header)
        block_size, end = self._header.block_size, offset + length
        for block, entry in enumerate(entries, first):
            begin = max(offset - block * block_size, 0)
            stop = min(end - block * block_size, block_size)
            if entry == ABSENT:
                yield Segment(stop - begin, Kind.ABSENT)
            else:
                position = self._table.place(block, entry)
                yield from self._block(bitmaps, position, begin, stop)

    def _block(
        self, bitmaps: "_Bitmaps", position: int, begin: int, stop: int
    ) -> Iterator[Segment]:
        """Bytes [begin, stop) of the block at ``position``; begin is whole bytes of bitmap."""
        sectors = -(-(stop - begin) // SECTOR)
        bitmap = bitmaps.read(position + begin // (8 * SECTOR), -(-sectors // 8))
        at = position + self._header.bitmap_size + begin
        if bitmap.count(0xFF) == len(bitmap):
            yield Segment(stop - begin, Kind.DATA, at)
            return
        left = stop - begin
        for count, here in stretches(bitmap, 0, sectors, least_first=self._footer.least_first):
            length = min(count * SECTOR, left)
            yield Segment(length, Kind.DATA, at) if here else Segment(length, Kind.ABSENT)
            at += length
            left -= length


class _Bitmaps:
    """Reads sector bitmaps; small blocks that lie side by side are read through together."""

    def __init__(self, file: ImageFile, header: Header) -> None:
        self._file = file
        self._ahead = WINDOW if header.block_size <= NEAR else 0
        self._start = 0
        self._data = b""

    def read(self, position: int, length: int) -> bytes:
        skip = position - self._start
        if skip < 0 or skip + length > len(self._data):
            if not self._ahead:
                return self._file.read(position, length, "a sector bitmap")
            self._data = self._file.read_up_to(position, max(self._ahead, length))
            self._start, skip = position, 0
        return self._data[skip : skip + length]


def _preferred(block_size: int) -> int:
    return max(min(block_size, PREFERRED), SECTOR)


def _footer_facts(footer: Footer) -> dict[str, object]:
    return {
        "subformat": footer.disk_type.name.lower(),
        "unique_id": str(footer.unique_id),
        "creator": footer.creator,
        "created": footer.created,
    }


async def open_vhd(file: ImageFile, opening: Opening) -> FixedVhd | SparseVhd:
    """Open a VHD and its parents; becomes the owner of ``file``.

    Raises:
        DiskError: broken, or the parent is missing or not the one it was made from.
    """
    look_up = opening.workers.look_up
    footer = await look_up(read_footer, file)
    if footer.disk_type == DiskType.FIXED:
        return FixedVhd(opening.workers, file, footer)
    header, table = await look_up(_read_tables, file, footer)
    parent = None
    if footer.disk_type == DiskType.DIFFERENCING:
        parent = await _open_parent(file, header, opening)
    return SparseVhd(opening.workers, file, footer, header, table, parent)


def _read_tables(file: ImageFile, footer: Footer) -> tuple[Header, BlockTable]:
    header = read_header(file, footer)
    return header, BlockTable(file, footer, header)


async def _open_parent(file: ImageFile, header: Header, opening: Opening) -> FixedVhd | SparseVhd:
    name = await opening.workers.look_up(_find, file, header)
    disk: Disk = await opening.below(file, name, "vhd")
    if isinstance(disk, FixedVhd | SparseVhd) and disk.unique_id == header.parent_id:
        return disk
    await disk.close()
    text = f"its parent {disk.name} has just become another image"
    raise file.corrupt(header.position + PARENT_UNIQUE_ID, text)


def _find(file: ImageFile, header: Header) -> str:
    names = parent_names(file, header)
    at = header.position + PARENT_UNIQUE_ID
    return find_parent(file, at, names, (header.parent_id,), _identify)


def _identify(file: ImageFile) -> UUID:
    return read_footer(file).unique_id
