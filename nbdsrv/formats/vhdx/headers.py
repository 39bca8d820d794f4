"""Where a VHDX begins: its identifier, the current header, the region table.

::

    header 1   sequence 8, checksum right   --> current
    header 2   sequence 7, checksum right       the one before, or being overwritten in a crash
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from uuid import UUID

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vhdx.crc32c import crc32c
from nbdsrv.formats.vhdx.replayed import Replayed
from nbdsrv.formats.vhdx.structs import (
    BAT_REGION,
    CHECKSUM,
    FILE_IDENTIFIER,
    HEADER,
    HEADER_SECTION,
    HEADER_SIZE,
    HEADERS,
    MAX_TABLE_ENTRIES,
    METADATA_REGION,
    MIB,
    REGION_ENTRY,
    REGION_TABLE,
    REGION_TABLE_SIZE,
    REGION_TABLES,
    TABLE_ENTRY_SIZE,
)

__all__ = ["Header", "Reserved", "read_creator", "read_header", "read_regions"]


@dataclass(frozen=True, slots=True)
class Header:
    """The current header. ``data_write_guid`` is what children know the image by."""

    data_write_guid: UUID
    log_guid: bytes
    log_offset: int
    log_length: int

    @property
    def logged(self) -> bool:
        """Is there a log to be replayed?"""
        return any(self.log_guid)


class Reserved:
    """What no block may lie on: disjoint ranges (start, end, name)."""

    def __init__(self, file: ImageFile, ranges: Sequence[tuple[int, int, str]]) -> None:
        """Raises CorruptImage if they overlap."""
        self._ranges = sorted(ranges)
        self._starts = [start for start, _, _ in self._ranges]
        for (_, end, one), (start, _, other) in pairwise(self._ranges):
            if start < end:
                raise file.corrupt(start, f"{one} and {other} overlap")

    def at(self, start: int, end: int) -> str:
        """The name of what lies in [start, end), "" if nothing does."""
        index = bisect_left(self._starts, end) - 1
        if index >= 0 and self._ranges[index][1] > start:
            return self._ranges[index][2]
        return ""


def read_creator(file: ImageFile) -> str:
    """The identifier's creator, once it is known to be one. Blocking."""
    raw = file.read(0, FILE_IDENTIFIER.sizeof(), "the file identifier")
    fields: Any = FILE_IDENTIFIER.parse(raw)
    if fields.signature != b"vhdxfile":
        raise file.corrupt(0, "no VHDX identifier here")
    creator: str = fields.creator.decode("utf-16-le", "replace").partition("\0")[0]
    return creator


def read_header(file: ImageFile) -> Header:
    """The current header. Blocking.

    Raises:
        CorruptImage: neither is intact, or both claim to be current.
        UnsupportedImage: a later version.
    """
    intact = []
    for position in HEADERS:
        raw = file.read_up_to(position, HEADER_SIZE)
        if len(raw) == HEADER_SIZE and raw[:4] == b"head" and _checksum_right(raw):
            fields: Any = HEADER.parse(raw)
            intact.append((fields.sequence_number, position, raw, fields))
    if not intact:
        raise file.corrupt(HEADERS[0], "neither VHDX header is intact")
    sequence, position, raw, fields = max(intact, key=lambda header: header[0])
    if any(other[0] == sequence and other[2] != raw for other in intact):
        raise file.corrupt(position, f"two different headers have sequence number {sequence}")
    return _header(file, position, fields)


def _header(file: ImageFile, position: int, fields: Any) -> Header:
    header = Header(
        data_write_guid=UUID(bytes_le=fields.data_write_guid),
        log_guid=fields.log_guid,
        log_offset=fields.log_offset,
        log_length=fields.log_length,
    )
    if fields.version != 1:
        raise UnsupportedImage(f"{file.path}: VHDX version {fields.version} is not known")
    if header.logged and fields.log_version:
        raise UnsupportedImage(f"{file.path}: VHDX log version {fields.log_version} is not known")
    if header.log_offset % MIB or header.log_length % MIB:
        raise file.corrupt(position, "the log does not lie on multiples of 1 MiB")
    if header.logged and (header.log_offset < HEADER_SECTION or not header.log_length):
        raise file.corrupt(position, f"a log of {header.log_length} bytes at {header.log_offset}")
    return header


def _checksum_right(raw: bytes) -> bool:
    summed = crc32c(raw[CHECKSUM + 4 :], crc32c(bytes(4), crc32c(raw[:CHECKSUM])))
    return summed == int.from_bytes(raw[CHECKSUM : CHECKSUM + 4], "little")


def read_regions(
    file: ImageFile, view: Replayed, header: Header
) -> tuple[dict[UUID, tuple[int, int]], Reserved]:
    """(position, length) of BAT and metadata, and everything that is taken. Blocking.

    Raises:
        CorruptImage: neither table is intact, or regions lie where they cannot.
        UnsupportedImage: a region is required that we know nothing of.
    """
    for table_at in REGION_TABLES:
        raw = view.read(table_at, REGION_TABLE_SIZE, "the region table")
        if raw[:4] == b"regi" and _checksum_right(raw):
            break
    else:
        raise file.corrupt(REGION_TABLES[0], "neither region table is intact")
    count = REGION_TABLE.parse(raw).entry_count
    if count > MAX_TABLE_ENTRIES:
        raise file.corrupt(table_at, f"{count} regions")
    regions: dict[UUID, tuple[int, int]] = {}
    taken = [(0, HEADER_SECTION, "the headers")]
    if header.log_length:
        end = header.log_offset + header.log_length
        taken.append((header.log_offset, end, "the log"))
    for at in range(16, 16 + count * TABLE_ENTRY_SIZE, TABLE_ENTRY_SIZE):
        name, position, length = _region(file, view, table_at + at, raw[at : at + TABLE_ENTRY_SIZE])
        if name in regions:
            raise file.corrupt(table_at + at, f"region {name} is there twice")
        regions[name] = position, length
        taken.append((position, position + length, f"region {name}"))
    for name in (BAT_REGION, METADATA_REGION):
        if name not in regions:
            raise file.corrupt(table_at, f"there is no region {name}")
    return regions, Reserved(file, taken)


def _region(file: ImageFile, view: Replayed, at: int, raw: bytes) -> tuple[UUID, int, int]:
    fields: Any = REGION_ENTRY.parse(raw)
    name, position, length = UUID(bytes_le=fields.guid), fields.file_offset, fields.length
    if name not in {BAT_REGION, METADATA_REGION} and fields.required & 1:
        raise UnsupportedImage(f"{file.path}: region {name} is required, but not known")
    if position % MIB or length % MIB or not length:
        raise file.corrupt(at, f"a region of {length} bytes at {position}: not multiples of 1 MiB")
    if position + length > view.size:
        text = f"a region of {length} bytes at {position} reaches beyond the end of the file"
        raise file.corrupt(at, text)
    return name, position, length
