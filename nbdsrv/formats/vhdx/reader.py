"""Reading VHDX images.

::

    guest   | block 0 | block 1 | ... | block n-1 |    | block n | ...      a chunk: n blocks,
                 |         |               |                |               2^23 sectors
    BAT     | entry 0 | entry 1 | ... | entry n-1 | bm | entry n | ...
                 |         |                         |
    file    ..|block|...|block|.......|sector bitmap block, 1 MiB|..

A block that is only partly here is the parent's where the chunk's bitmap says so.

====================== ============================= =========================
state                  with a parent                 without
====================== ============================= =========================
NOT_PRESENT            the parent's                  a hole
UNDEFINED, UNMAPPED    zeroes, hiding the parent     a hole
ZERO                   zeroes                        zeroes
FULLY_PRESENT          data                          data
PARTIALLY_PRESENT      data, or the parent's         corrupt
====================== ============================= =========================
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from sys import byteorder
from uuid import UUID

from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import Kind, MappedDisk, Segment
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.vhd.parents import find_parent, windows_names
from nbdsrv.formats.vhd.sectors import stretches
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
from protocol.terms import BlockSizes

__all__ = ["VhdxDisk", "open_vhdx"]

PAGE_BLOCKS = 2048
"""Blocks of a page, where a block is one segment."""
PAGE_SECTORS = 1 << 17
"""Sectors of a page, where in the worst case each is a segment of its own."""
MAX_COMPARED = 1 << 16
"""Entries up to which a BAT is searched as a whole for blocks that overlap; in a larger one those
of the same page are compared."""
PREFERRED = 1 << 16

_POSITION = ~((1 << 20) - 1)
"""The bits of a BAT entry that are a position: MiB, where bits 20 and up begin."""
_STATE = 7


class _Image:
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
        regions, self.reserved = read_regions(file, self.view, self.header)
        self.metadata: Metadata = read_metadata(file, self.view, regions[METADATA_REGION])
        self.bat_at, bat_length = regions[BAT_REGION]
        self.ratio = BITMAP_BITS * self.metadata.sector_size // self.metadata.block_size
        self.blocks = -(-self.metadata.size // self.metadata.block_size)
        entries = self._entry_count()
        if 8 * entries > bat_length:
            text = f"a block table of {bat_length} bytes for {entries} blocks and bitmaps"
            raise file.corrupt(self.bat_at, text)
        if entries <= MAX_COMPARED:
            self.check_overlaps(0, self.entries(0, entries))

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

    def check_overlaps(self, first: int, entries: Sequence[int]) -> None:
        """CorruptImage if two of the blocks in these entries, from ``first`` on, overlap."""
        present = sorted(
            (entry & _POSITION, index)
            for index, entry in enumerate(entries, first)
            if entry & _STATE >= BlockState.FULLY_PRESENT
        )
        for (low, index), (high, other) in pairwise(present):
            if high < low + self._length(index):
                text = f"what lies at {high} overlaps the block at {low}"
                raise self.file.corrupt(self.bat_at + 8 * other, text)

    def _length(self, index: int) -> int:
        is_bitmap = index % (self.ratio + 1) == self.ratio
        return BITMAP_SIZE if is_bitmap else self.metadata.block_size

    def check_place(self, index: int, start: int, end: int) -> None:
        """CorruptImage unless what entry ``index`` points at is free for it, and in the file."""
        problem = ""
        if end > self.view.size:
            problem = f"beyond the end of the file ({self.view.size})"
        elif taken := self.reserved.at(start, end):
            problem = f"on {taken}"
        if problem:
            text = f"a block of {end - start} bytes at {start} lies {problem}"
            raise self.file.corrupt(self.bat_at + 8 * index, text)


class VhdxDisk(MappedDisk):
    """A VHDX of any kind."""

    format = "vhdx"

    def __init__(self, workers: Workers, image: _Image, parent: "VhdxDisk | None" = None) -> None:
        """Becomes the owner of the image's file and of ``parent``."""
        super().__init__(workers, image.file, parent)
        self._image = image
        metadata = image.metadata
        self.size = metadata.size
        self.page_span = (
            PAGE_SECTORS * metadata.sector_size if parent else PAGE_BLOCKS * metadata.block_size
        )
        self.block_sizes = BlockSizes(preferred=min(metadata.block_size, PREFERRED))
        self._undefined = Kind.ZERO if parent else Kind.ABSENT

    @property
    def data_write_guid(self) -> UUID:
        """What children know it by."""
        return self._image.header.data_write_guid

    @property
    def sector_size(self) -> int:
        """Of the guest's logical sectors."""
        return self._image.metadata.sector_size

    @property
    def facts(self) -> Mapping[str, object]:
        """What headers and metadata say."""
        metadata = self._image.metadata
        facts: dict[str, object] = {
            "subformat": "fixed" if metadata.fixed else "dynamic",
            "disk_id": str(metadata.disk_id),
            "data_write_guid": str(self.data_write_guid),
            "creator": self._image.creator,
            "block_size": metadata.block_size,
            "logical_sector_size": metadata.sector_size,
            "physical_sector_size": metadata.physical_sector_size,
            "log_replayed": not self._image.view.plain,
        }
        if self.backing is not None:
            facts["subformat"] = "differencing"
            facts["parent"] = self.backing.name
        return facts

    # --- pages ---------------------------------------------------------------------------------

    def _read_page(self, offset: int, length: int) -> Iterator[Segment]:
        image, block_size = self._image, self._image.metadata.block_size
        first, last = offset // block_size, (offset + length - 1) // block_size
        base = image.index(first)
        entries = image.entries(base, image.index(last) - base + 1)
        if not any(entries):
            yield Segment(length, Kind.ABSENT)
            return
        image.check_overlaps(base, entries)
        bitmaps: dict[int, int] = {}
        for block in range(first, last + 1):
            begin = max(offset - block * block_size, 0)
            stop = min(offset + length - block * block_size, block_size)
            index = image.index(block)
            yield from self._block(bitmaps, block, index, entries[index - base], begin, stop)

    def _block(
        self, bitmaps: dict[int, int], block: int, index: int, entry: int, begin: int, stop: int
    ) -> Iterator[Segment]:
        """Bytes [begin, stop) of a block."""
        image, length = self._image, stop - begin
        state = entry & _STATE
        if state == BlockState.NOT_PRESENT:
            yield Segment(length, Kind.ABSENT)
        elif state == BlockState.ZERO:
            yield Segment(length, Kind.ZERO)
        elif state in {BlockState.UNDEFINED, BlockState.UNMAPPED}:
            yield Segment(length, self._undefined)
        else:
            block_size = image.metadata.block_size
            position = entry & _POSITION
            used = min(block_size, self.size - block * block_size)
            image.check_place(index, position, position + used)
            if state == BlockState.FULLY_PRESENT:
                yield from image.view.segments(position + begin, length)
            elif state == BlockState.PARTIALLY_PRESENT and self.backing is not None:
                bitmap_at = self._bitmap(bitmaps, block // image.ratio)
                yield from self._partial(bitmap_at, block, position, begin, stop)
            else:
                text = f"block {block} is in state {state}"
                raise self.file.corrupt(image.bat_at + 8 * index, text)

    def _bitmap(self, bitmaps: dict[int, int], chunk: int) -> int:
        """Where the bitmap of a chunk is."""
        if chunk not in bitmaps:
            image = self._image
            index = chunk * (image.ratio + 1) + image.ratio
            entry = image.entries(index, 1)[0]
            if entry & _STATE != BITMAP_PRESENT:
                text = f"blocks are partly here, but chunk {chunk} has no sector bitmap"
                raise self.file.corrupt(image.bat_at + 8 * index, text)
            bitmaps[chunk] = entry & _POSITION
            image.check_place(index, bitmaps[chunk], bitmaps[chunk] + BITMAP_SIZE)
        return bitmaps[chunk]

    def _partial(
        self, bitmap_at: int, block: int, position: int, begin: int, stop: int
    ) -> Iterator[Segment]:
        image, sector = self._image, self.sector_size
        sectors = (stop - begin) // sector
        first = (block % image.ratio * image.metadata.block_size + begin) // sector
        bitmap = image.view.read(bitmap_at + first // 8, -(-sectors // 8), "a sector bitmap")
        at = position + begin
        for count, here in stretches(bitmap, 0, sectors, least_first=True):
            length = count * sector
            if here:
                yield from image.view.segments(at, length)
            else:
                yield Segment(length, Kind.ABSENT)
            at += length

    def _decode(self, key: int) -> bytes:
        """What the log holds of guest data."""
        return self._image.view.block(key)


async def open_vhdx(file: ImageFile, opening: Opening) -> VhdxDisk:
    """Open a VHDX and its parents; becomes the owner of ``file``.

    Raises:
        DiskError: broken, or the parent is missing or not the one it was made from.
    """
    image = await opening.workers.look_up(_Image, file)
    parent = None
    if image.metadata.parent is not None:
        parent = await _open_parent(image, image.metadata.parent, opening)
    return VhdxDisk(opening.workers, image, parent)


async def _open_parent(image: _Image, locator: Mapping[str, str], opening: Opening) -> VhdxDisk:
    file, at = image.file, image.metadata.parent_at
    wanted = list(_linkages(locator))
    names = [
        name
        for key in ("relative_path", "volume_path", "absolute_win32_path")
        for name in windows_names(locator.get(key, ""))
    ]
    name = await opening.workers.look_up(find_parent, file, at, names, wanted, _identify)
    disk = await opening.below(file, name, "vhdx")
    problem = ""
    if not isinstance(disk, VhdxDisk) or disk.data_write_guid not in wanted:
        problem = "has just become another image"
    elif disk.sector_size != image.metadata.sector_size:
        problem = f"has sectors of {disk.sector_size} bytes, not {image.metadata.sector_size}"
    else:
        return disk
    await disk.close()
    raise file.corrupt(at, f"its parent {disk.name} {problem}")


def _linkages(locator: Mapping[str, str]) -> Iterator[UUID]:
    for key in ("parent_linkage", "parent_linkage2"):
        try:
            yield UUID(locator.get(key, ""))
        except ValueError:
            continue


def _identify(file: ImageFile) -> UUID:
    read_creator(file)
    return read_header(file).data_write_guid
