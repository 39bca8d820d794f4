"""Sparse extents of VMware's hosted products: magic KDMV.

::

    sparse  | header | descriptor | redundant directory, tables | directory, tables | grains ... |
    stream  | header | descriptor | grain | grain | ... table ... | directory | footer | end |
              gd_offset = GD_AT_END                                 ^           gd_offset

The footer of a stream is a second header, the one that counts; grains of a stream are compressed
(``compressed.py``). The redundant directory and its tables are a copy nobody needs to read.

Facts relied on: VMware, "Virtual Disk Format 5.0".
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from construct import ConstructError

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vmdk.descriptor import MAX_SECTORS
from nbdsrv.formats.vmdk.extents import SparseExtent, check_grain
from nbdsrv.formats.vmdk.structs import (
    COMPRESSION_DEFLATE,
    COMPRESSION_NONE,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINE_TEST,
    FLAG_ZERO_GRAINS,
    FOOTER_LENGTH,
    GD_AT_END,
    MARKER,
    MARKER_EOS,
    MARKER_FOOTER,
    SECTOR,
    SPARSE_HEADER,
    SPARSE_MAGIC,
    SPARSE_TABLE_ENTRIES,
    ZERO_GRAIN,
)

__all__ = ["HostedExtent", "HostedHeader", "read_header"]

VERSIONS = range(1, 4)
"""2 came with zeroed grains, 3 with changed block tracking; for reading they are alike."""
NEWLINES = b"\n \r\n"


@dataclass(frozen=True, slots=True)
class HostedHeader:
    """What the header that counts says, checked; offsets and sizes are bytes.

    Attributes:
        position: where in the file it stands.
        capacity: size of the extent.
        descriptor_size: of the embedded descriptor, 0 where there is none.
        markers: does a marker stand before each compressed grain?
        zero_grains: is a table entry of 1 a grain of zeroes?
        unclean: was whoever wrote last interrupted?
    """

    position: int
    version: int
    capacity: int
    grain: int
    table_entries: int
    gd_offset: int
    descriptor_offset: int
    descriptor_size: int
    compressed: bool
    markers: bool
    zero_grains: bool
    unclean: bool

    @property
    def gd_entries(self) -> int:
        """Tables it takes to cover the capacity."""
        return -(-self.capacity // (self.grain * self.table_entries))


def read_header(file: ImageFile) -> HostedHeader:
    """The header, or a stream's footer. Blocking.

    Raises:
        CorruptImage: it contradicts itself or the size of the file.
        UnsupportedImage: a version or compression we do not know.
    """
    header = _parse_header(file, 0, file.read(0, SECTOR, "sparse header"))
    if header.gd_offset == GD_AT_END * SECTOR:
        header = _read_footer(file)
    if header.gd_offset + header.gd_entries * 4 > file.size:
        raise file.corrupt(
            header.position, f"its grain directory at {header.gd_offset} lies beyond the end"
        )
    return header


def _read_footer(file: ImageFile) -> HostedHeader:
    at = file.size - FOOTER_LENGTH
    if at < SECTOR:
        raise file.corrupt(file.size, "a stream without footer, was it cut off?")
    data = file.read(at, FOOTER_LENGTH, "stream footer")
    for where, kind in ((0, MARKER_FOOTER), (2 * SECTOR, MARKER_EOS)):
        try:
            marker = MARKER.parse(data[where : where + SECTOR])
        except ConstructError:
            marker = None
        if marker is None or marker.kind != kind:
            raise file.corrupt(at + where, "a stream without footer, was it cut off?")
    footer = _parse_header(file, at + SECTOR, data[SECTOR : 2 * SECTOR])
    if footer.gd_offset == GD_AT_END * SECTOR:
        raise file.corrupt(at + SECTOR, "the stream's footer does not say where its directory is")
    return footer


def _parse_header(file: ImageFile, at: int, data: bytes) -> HostedHeader:
    if not data.startswith(SPARSE_MAGIC):
        raise file.corrupt(at, "no sparse header")
    raw = SPARSE_HEADER.parse(data)
    if raw.version not in VERSIONS:
        raise UnsupportedImage(f"{file.path}: VMDK version {raw.version} is not served, 1 to 3 are")
    if raw.flags & FLAG_NEWLINE_TEST and raw.newlines != NEWLINES:
        raise file.corrupt(at + 73, "line ends were converted: the file was copied as text")
    if not 0 < raw.capacity < MAX_SECTORS:
        raise file.corrupt(at + 12, f"a disk of {raw.capacity} sectors")
    if not 0 < raw.entries_per_table <= SPARSE_TABLE_ENTRIES:
        raise file.corrupt(at + 44, f"grain tables of {raw.entries_per_table} entries")
    if raw.compression not in {COMPRESSION_NONE, COMPRESSION_DEFLATE}:
        raise UnsupportedImage(f"{file.path}: compression method {raw.compression} is not known")
    compressed = raw.compression == COMPRESSION_DEFLATE
    if raw.flags & FLAG_COMPRESSED and not compressed:
        raise file.corrupt(at + 77, "compressed grains, but no compression method")
    return HostedHeader(
        position=at,
        version=raw.version,
        capacity=raw.capacity * SECTOR,
        grain=check_grain(file, at + 20, raw.grain_size, compressed=compressed),
        table_entries=raw.entries_per_table,
        gd_offset=raw.gd_offset * SECTOR,
        descriptor_offset=raw.descriptor_offset * SECTOR,
        descriptor_size=raw.descriptor_size * SECTOR,
        compressed=compressed,
        markers=bool(raw.flags & FLAG_MARKERS),
        zero_grains=bool(raw.flags & FLAG_ZERO_GRAINS),
        unclean=bool(raw.unclean_shutdown),
    )


class HostedExtent(SparseExtent):
    """Uncompressed grains; tables of 32-bit sector numbers."""

    def __init__(self, file: ImageFile, header: HostedHeader, size: int) -> None:
        """``size``: bytes of the extent that belong to the disk; at most the capacity."""
        descriptor_end = header.descriptor_offset + header.descriptor_size
        super().__init__(
            file,
            size=size,
            grain=header.grain,
            table_entries=header.table_entries,
            reserved=(
                (0, SECTOR),
                (header.descriptor_offset, descriptor_end),
                (header.gd_offset, header.gd_offset + header.gd_entries * 4),
            ),
        )
        self.header = header

    def _tables(self, first: int, count: int) -> Sequence[int]:
        position = self.header.gd_offset + first * 4
        return read_sectors(self.file.read(position, count * 4, "grain directory"), SECTOR)

    def _grains(self, position: int, data: bytes) -> Sequence[int]:
        grains = read_sectors(data)
        if not self.header.zero_grains and ZERO_GRAIN in grains:
            where = position + grains.index(ZERO_GRAIN) * 4
            raise self.file.corrupt(where, "a grain of zeroes, but its header knows of none")
        return grains


def read_sectors(data: bytes, unit: int = 1) -> Sequence[int]:
    """Little-endian 32-bit numbers, times ``unit``."""
    numbers = array("I", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers if unit == 1 else [number * unit for number in numbers]
