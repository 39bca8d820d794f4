"""The footer and the header of sparse VHDs that are written, by whomever.

::

    footer    type 3 dynamic, 4 differencing; size, geometry, unique id
    header    where the table is, how long; of a differencing one: the parent's unique id and name

The creator is ``tap``: QEMU believes the size only of those it knows. Time counts from 2000.
"""

from uuid import UUID

from nbdsrv.formats.vhd.structs import (
    CREATOR_TAP,
    EPOCH,
    FEATURES_RESERVED,
    FOOTER,
    FOOTER_CHECKSUM,
    FOOTER_COOKIE,
    FOOTER_SIZE,
    HEADER,
    HEADER_CHECKSUM,
    HEADER_COOKIE,
    HEADER_SIZE,
    LOCATORS,
    NO_OFFSET,
    SECTOR,
    VERSION,
    DiskType,
    Platform,
    checksum,
)
from nbdsrv.formats.vhd.writer_structs import geometry

__all__ = ["BLOCK", "MAX_NAME", "TABLE_AT", "build_footer", "build_header", "entries_of"]

BLOCK = 2 << 20
"""Bytes of a block; some readers know no other size."""
TABLE_AT = FOOTER_SIZE + HEADER_SIZE
"""Where the table is: behind the copy of the footer and the header."""
MAX_NAME = 512
"""Bytes of the parent's name."""
_NO_LOCATOR = {
    "platform": Platform.NONE,
    "data_space": 0,
    "data_length": 0,
    "reserved": 0,
    "data_offset": 0,
}


def entries_of(size: int) -> int:
    """Blocks of a disk of so many bytes; a table without any is none to most readers."""
    return max(1, -(-size // BLOCK))


def build_footer(
    size: int, unique_id: UUID, created: float, creator_version: int, disk_type: DiskType
) -> bytes:
    """A footer.

    Args:
        size: of the disk, bytes.
        unique_id: its own.
        created: seconds since 1970.
        creator_version: of ``tap``; from 1.2 on it promises a batmap behind the table.
        disk_type: dynamic or differencing.
    """
    footer = bytearray(
        FOOTER.build(
            {
                "cookie": FOOTER_COOKIE,
                "features": FEATURES_RESERVED,
                "version": VERSION,
                "data_offset": FOOTER_SIZE,
                "timestamp": _timestamp(created),
                "creator": CREATOR_TAP,
                "creator_version": creator_version,
                "creator_os": bytes(4),
                "original_size": size,
                "current_size": size,
                "geometry": geometry(size // SECTOR),
                "disk_type": disk_type,
                "checksum": 0,
                "unique_id": unique_id.bytes,
                "saved_state": 0,
                "hidden": 0,
                "reserved": bytes(426),
            }
        )
    )
    footer[FOOTER_CHECKSUM : FOOTER_CHECKSUM + 4] = checksum(footer, FOOTER_CHECKSUM).to_bytes(4)
    return bytes(footer)


def build_header(
    entries: int,
    parent_id: UUID | None = None,
    parent_name: bytes = b"",
    parent_created: float = 0.0,
) -> bytes:
    """A header.

    Args:
        entries: of the table.
        parent_id: unique id of the parent, or None.
        parent_name: in UTF-16BE, less than MAX_NAME bytes.
        parent_created: seconds since 1970; nobody may rely on it.
    """
    header = bytearray(
        HEADER.build(
            {
                "cookie": HEADER_COOKIE,
                "data_offset": NO_OFFSET,
                "table_offset": TABLE_AT,
                "version": VERSION,
                "max_table_entries": entries,
                "block_size": BLOCK,
                "checksum": 0,
                "parent_unique_id": parent_id.bytes if parent_id else bytes(16),
                "parent_timestamp": _timestamp(parent_created) if parent_id else 0,
                "reserved1": bytes(4),
                "parent_unicode_name": parent_name.ljust(MAX_NAME, b"\0"),
                "locators": [_NO_LOCATOR] * LOCATORS,
                "reserved2": bytes(256),
            }
        )
    )
    header[HEADER_CHECKSUM : HEADER_CHECKSUM + 4] = checksum(header, HEADER_CHECKSUM).to_bytes(4)
    return bytes(header)


def _timestamp(seconds: float) -> int:
    return max(0, int(seconds) - EPOCH) & 0xFFFFFFFF
