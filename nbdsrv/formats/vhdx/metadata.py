"""The metadata region of a VHDX: size, block size, sector sizes, and who the parent is.

::

    region   | table: 32 bytes an entry | ..64 KiB.. | item | item | parent locator |
                 guid, offset, length ------------------^
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vhdx.replayed import Replayed
from nbdsrv.formats.vhdx.structs import (
    FILE_PARAMETERS,
    HAS_PARENT,
    LEAVE_ALLOCATED,
    LOCATOR,
    LOCATOR_ENTRY,
    LOCATOR_ENTRY_SIZE,
    LOCATOR_SIZE,
    LOGICAL_SECTOR_SIZE,
    MAX_BLOCK,
    MAX_DISK,
    MAX_ITEM,
    MAX_TABLE_ENTRIES,
    METADATA_ENTRY,
    METADATA_TABLE,
    METADATA_TABLE_SIZE,
    MIB,
    PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE,
    TABLE_ENTRY_SIZE,
    VHDX_LOCATOR,
    VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE,
)

__all__ = ["Metadata", "read_metadata"]

_KNOWN = {
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    VIRTUAL_DISK_ID: 16,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
    PARENT_LOCATOR: LOCATOR_SIZE,
}
"""Items and their least lengths."""
_USER, _REQUIRED = 1, 4
MAX_KEYS = 64
"""Entries of a parent locator; five are defined."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the items say.

    Attributes:
        fixed: blocks are never given back; only for ``info``.
        parent: the parent locator's keys and values, None if there is no parent.
        parent_at: where in the file they are.
    """

    size: int
    block_size: int
    sector_size: int
    physical_sector_size: int
    disk_id: UUID
    fixed: bool
    parent: Mapping[str, str] | None
    parent_at: int


def read_metadata(file: ImageFile, view: Replayed, region: tuple[int, int]) -> Metadata:
    """The items of the metadata region. Blocking.

    Raises:
        CorruptImage: one is missing, or not what it can be.
        UnsupportedImage: an item is required that we know nothing of.
    """
    items = dict(_items(file, view, region))

    def number(item: UUID, length: int) -> int:
        position, _ = _item(file, region, items, item)
        return int.from_bytes(view.read(position, length, "a metadata item"), "little")

    block_size, flags = (number(FILE_PARAMETERS, 8) >> shift & 0xFFFFFFFF for shift in (0, 32))
    disk_at, _ = _item(file, region, items, VIRTUAL_DISK_ID)
    has_parent = bool(flags & HAS_PARENT)
    parent, parent_at = None, 0
    if has_parent:
        parent_at, length = _item(file, region, items, PARENT_LOCATOR)
        parent = _locator(file, parent_at, view.read(parent_at, length, "the parent locator"))
    metadata = Metadata(
        size=number(VIRTUAL_DISK_SIZE, 8),
        block_size=block_size,
        sector_size=number(LOGICAL_SECTOR_SIZE, 4),
        physical_sector_size=number(PHYSICAL_SECTOR_SIZE, 4),
        disk_id=UUID(bytes_le=view.read(disk_at, 16, "the disk's id")),
        fixed=bool(flags & LEAVE_ALLOCATED) and not has_parent,
        parent=parent,
        parent_at=parent_at,
    )
    problem = _problem(metadata)
    if problem:
        raise file.corrupt(region[0], problem)
    return metadata


def _problem(metadata: Metadata) -> str:
    block_size, sector_size = metadata.block_size, metadata.sector_size
    if not MIB <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
        return f"blocks of {block_size} bytes"
    if sector_size not in {512, 4096}:
        return f"sectors of {sector_size} bytes"
    if metadata.size > MAX_DISK or metadata.size % sector_size:
        return f"a disk of {metadata.size} bytes, in sectors of {sector_size}"
    return ""


def _items(
    file: ImageFile, view: Replayed, region: tuple[int, int]
) -> Iterator[tuple[UUID, tuple[int, int]]]:
    """(id, (position, length)) of the known ones."""
    region_at, region_length = region
    table = view.read(region_at, METADATA_TABLE_SIZE, "the metadata table")
    header: Any = METADATA_TABLE.parse(table)
    if header.signature != b"metadata":
        raise file.corrupt(region_at, "no metadata table here")
    if header.entry_count > MAX_TABLE_ENTRIES:
        raise file.corrupt(region_at, f"{header.entry_count} metadata items")
    for at in range(
        TABLE_ENTRY_SIZE, (header.entry_count + 1) * TABLE_ENTRY_SIZE, TABLE_ENTRY_SIZE
    ):
        entry: Any = METADATA_ENTRY.parse(table[at : at + TABLE_ENTRY_SIZE])
        item = UUID(bytes_le=entry.item_id)
        if entry.flags & _USER or item not in _KNOWN:
            if entry.flags & _REQUIRED:
                raise UnsupportedImage(f"{file.path}: item {item} is required, but not known")
            continue
        offset, length = entry.offset, entry.length
        inside = offset >= METADATA_TABLE_SIZE and offset + length <= region_length
        if not inside or not _KNOWN[item] <= length <= MAX_ITEM:
            text = f"metadata item {item} of {length} bytes at {offset} of its region"
            raise file.corrupt(region_at + at, text)
        yield item, (region_at + offset, length)


def _item(
    file: ImageFile, region: tuple[int, int], items: Mapping[UUID, tuple[int, int]], item: UUID
) -> tuple[int, int]:
    if item not in items:
        raise file.corrupt(region[0], f"there is no metadata item {item}")
    return items[item]


def _locator(file: ImageFile, position: int, raw: bytes) -> Mapping[str, str]:
    header: Any = LOCATOR.parse(raw)
    kind = UUID(bytes_le=header.locator_type)
    if kind != VHDX_LOCATOR:
        raise UnsupportedImage(f"{file.path}: parents of kind {kind} are not known")
    count = header.key_value_count
    if count > MAX_KEYS or LOCATOR_SIZE + count * LOCATOR_ENTRY_SIZE > len(raw):
        raise file.corrupt(position, f"a parent locator of {len(raw)} bytes with {count} keys")
    pairs = {}
    for at in range(LOCATOR_SIZE, LOCATOR_SIZE + count * LOCATOR_ENTRY_SIZE, LOCATOR_ENTRY_SIZE):
        entry: Any = LOCATOR_ENTRY.parse(raw[at : at + LOCATOR_ENTRY_SIZE])
        try:
            key = _text(raw, entry.key_offset, entry.key_length)
            pairs[key] = _text(raw, entry.value_offset, entry.value_length)
        except UnicodeError as error:
            raise _no_text(file, position + at) from error
    return pairs


def _text(raw: bytes, offset: int, length: int) -> str:
    return raw[offset : offset + length].decode("utf-16-le").rstrip("\0")


def _no_text(file: ImageFile, position: int) -> CorruptImage:
    return file.corrupt(position, "a key or value of the parent locator is no UTF-16")
