"""Partitions of a GPT: the header that is whole, and the entries its checksum vouches for.

::

    sector  0     1        2 ...                                             last
            MBR | header | entries |  partition 1 | partition 2 | .. | entries | header
                 primary                                                       backup

Sectors are 512 or 4096 bytes, and nothing on the disk says which: where the header is found does.
The backup is used when the primary, or its entries, cannot be believed; the same order as Linux.
"""

import zlib
from typing import Any
from uuid import UUID

from construct import ConstructError

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import CorruptImage
from nbdsrv.formats.partition.structs import GPT_MAGIC, GptEntry, GptHeader
from nbdsrv.formats.partition.terms import Partition, corrupt, read

__all__ = ["SECTOR_SIZES", "gpt_partitions"]

SECTOR_SIZES = (512, 4096)
MAX_ENTRIES_BYTES = 4 << 20
"""Of the array of entries; the usual one has 16 KiB."""
MAX_ENTRY_SIZE = 4096
"""Bytes; the specification allows any 128 * 2**n, nobody uses another one than 128."""
CRC_AT = 16
"""Where in the header its own checksum stands."""


async def gpt_partitions(disk: Disk) -> list[Partition] | None:
    """The partitions of a GPT; None if there is no trace of one.

    Raises:
        CorruptImage: there is one, and neither its primary nor its backup is whole.
    """
    first_fault: CorruptImage | None = None
    for last in (False, True):
        for sector_size in SECTOR_SIZES:
            sector = disk.size // sector_size - 1 if last else 1
            try:
                found = await _read_table(disk, sector, sector_size)
            except CorruptImage as error:
                first_fault = first_fault or error
                continue
            if found is not None:
                return found
    if first_fault is not None:
        raise first_fault
    return None


async def _read_table(disk: Disk, sector: int, sector_size: int) -> list[Partition] | None:
    at = sector * sector_size
    raw = await read(disk, at, sector_size)
    if len(raw) < sector_size or not raw.startswith(GPT_MAGIC):
        return None
    header = _parse_header(disk, at, raw, sector)
    length = header.count * header.entry_size
    if length > MAX_ENTRIES_BYTES:
        raise corrupt(disk, at, f"GPT with {header.count} entries of {header.entry_size} bytes")
    entries_at = header.entries * sector_size
    entries = await read(disk, entries_at, length)
    if len(entries) < length:
        raise corrupt(disk, at, "the GPT's entries lie beyond the end of the disk")
    if zlib.crc32(entries) != header.entries_crc:
        raise corrupt(disk, entries_at, "the GPT's entries do not match their checksum")
    return _parse_entries(entries, entries_at, header.entry_size, sector_size)


def _parse_header(disk: Disk, at: int, raw: bytes, sector: int) -> Any:
    try:
        header = GptHeader.parse(raw)
    except ConstructError as error:  # pragma: no cover - a sector is longer than a header
        raise corrupt(disk, at, "no GPT header") from error
    if not GptHeader.sizeof() <= header.header_size <= len(raw):
        raise corrupt(disk, at, f"GPT header of {header.header_size} bytes")
    covered = raw[:CRC_AT] + bytes(4) + raw[CRC_AT + 4 : header.header_size]
    if zlib.crc32(covered) != header.crc:
        raise corrupt(disk, at, "the GPT header does not match its checksum")
    if header.own != sector:
        raise corrupt(disk, at, f"the GPT header belongs into sector {header.own}")
    size = header.entry_size
    if size % 8 or not GptEntry.sizeof() <= size <= MAX_ENTRY_SIZE:
        raise corrupt(disk, at, f"GPT entries of {size} bytes")
    return header


def _parse_entries(
    entries: bytes, entries_at: int, entry_size: int, sector_size: int
) -> list[Partition]:
    found = []
    for index in range(len(entries) // entry_size):
        start = index * entry_size
        if not any(entries[start : start + 16]):
            continue  # unused
        entry = GptEntry.parse(entries[start : start + GptEntry.sizeof()])
        found.append(
            Partition(
                number=index + 1,
                offset=entry.first * sector_size,
                length=(entry.last + 1 - entry.first) * sector_size,
                kind=str(UUID(bytes_le=entry.kind)).upper(),
                name=_name(entry.name),
                entry=entries_at + start,
            )
        )
    return found


def _name(raw: bytes) -> str:
    return raw.decode("utf-16-le", "replace").partition("\0")[0]
