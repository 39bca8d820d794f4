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

from collections.abc import Iterator, Mapping
from uuid import UUID

from nbdsrv.disk.workers import Workers
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.mapped import MappedDisk
from nbdsrv.formats.opening import Opening
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.vhd.parents import find_parent, windows_names
from nbdsrv.formats.vhd.sectors import stretches
from nbdsrv.formats.vhdx.headers import read_creator, read_header
from nbdsrv.formats.vhdx.image import STATE, VhdxImage
from nbdsrv.formats.vhdx.structs import BITMAP_BITS, BlockState
from protocol.terms import BlockSizes

__all__ = ["VhdxDisk", "open_vhdx"]

PAGE_BLOCKS = 2048
"""Blocks of a page, where a block is one segment."""
PAGE_SECTORS = 1 << 17
"""Sectors of a page, where in the worst case each is a segment of its own."""
PREFERRED = 1 << 16


class VhdxDisk(MappedDisk):
    """A VHDX of any kind."""

    format = "vhdx"

    def __init__(
        self, workers: Workers, image: VhdxImage, parent: "VhdxDisk | None" = None
    ) -> None:
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
        end = offset + length
        first, last = offset // block_size, (end - 1) // block_size
        compared = False
        for block, entries in image.chunks(first, last):
            start = max(block * block_size, offset)
            upto = min((block + len(entries)) * block_size, end)
            if image.is_even(entries):
                yield from self._stretch(block, entries[0], start, upto)
                continue
            if not compared:
                image.check_overlaps(first, last)
                compared = True
            for number, entry in enumerate(entries, block):
                stop = min((number + 1) * block_size, upto)
                yield from self._stretch(number, entry, start, stop)
                start = stop

    def _stretch(self, block: int, entry: int, start: int, end: int) -> Iterator[Segment]:
        """Bytes [start, end) of the disk; they begin in ``block`` and are as its entry says."""
        image, state, length = self._image, entry & STATE, end - start
        if state == BlockState.NOT_PRESENT:
            yield Segment(length, Kind.ABSENT)
        elif state == BlockState.ZERO:
            yield Segment(length, Kind.ZERO)
        elif state in {BlockState.UNDEFINED, BlockState.UNMAPPED}:
            yield Segment(length, self._undefined)
        elif state == BlockState.FULLY_PRESENT:
            position = image.place(block, entry, end)
            skip = start - block * image.metadata.block_size
            yield from image.view.segments(position + skip, length)
        elif state == BlockState.PARTIALLY_PRESENT and self.backing is not None:
            position = image.place(block, entry, end)
            yield from self._partial(block, position, start, end)
        else:
            raise image.corrupt(image.index(block), f"block {block} is in state {state}")

    def _partial(self, block: int, position: int, start: int, end: int) -> Iterator[Segment]:
        """The same of a block that is only partly here."""
        image, sector = self._image, self.sector_size
        chunk = block // image.ratio
        first = start // sector - chunk * BITMAP_BITS
        sectors = (end - start) // sector
        bitmap_at = image.bitmap(chunk) + first // 8
        bitmap = image.view.read(bitmap_at, -(-sectors // 8), "a sector bitmap")
        at = position + start - block * image.metadata.block_size
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
    image = await opening.workers.look_up(VhdxImage, file)
    parent = None
    if image.metadata.parent is not None:
        parent = await _open_parent(image, image.metadata.parent, opening)
    return VhdxDisk(opening.workers, image, parent)


async def _open_parent(image: VhdxImage, locator: Mapping[str, str], opening: Opening) -> VhdxDisk:
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
