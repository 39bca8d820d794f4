"""The header and footer of VHDs that we write into Xen Orchestra repositories.

::

    footer    type 3 dynamic, 4 differencing; unique id = uuid of the snapshot
    header    parent_unique_id = unique id in the parent's footer
              parent_unicode_name = its file's name, UTF-16BE, relative; no locators

The creator is ``tap`` 1.1: QEMU believes the size only of creators it knows. tapdisk 1.2 and later
promises a batmap behind the BAT, which Xen Orchestra would make wrong when it merges.
"""

from uuid import UUID

from nbdsrv.errors import RepositoryError
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

__all__ = ["BITMAP", "BLOCK", "TABLE_AT", "entries_of", "footer_of", "header_of"]

BLOCK = 2 << 20
"""Bytes of a block's data."""
BITMAP = b"\xff" * SECTOR
"""In front of it: every sector is in this file. Xen Orchestra does not look at it."""
TABLE_AT = FOOTER_SIZE + HEADER_SIZE
_CREATOR_VERSION = 0x00010001
_NAME = 512


def entries_of(size: int) -> int:
    """Blocks of a disk; a table without any is none to most readers."""
    return max(1, -(-size // BLOCK))


def footer_of(size: int, unique_id: UUID, created: float, *, differencing: bool) -> bytes:
    """A footer.

    Args:
        size: of the disk, bytes.
        unique_id: its own.
        created: seconds since 1970.
        differencing: has it a parent?
    """
    footer = bytearray(
        FOOTER.build(
            {
                "cookie": FOOTER_COOKIE,
                "features": FEATURES_RESERVED,
                "version": VERSION,
                "data_offset": FOOTER_SIZE,
                "timestamp": max(0, int(created) - EPOCH) & 0xFFFFFFFF,
                "creator": CREATOR_TAP,
                "creator_version": _CREATOR_VERSION,
                "creator_os": bytes(4),
                "original_size": size,
                "current_size": size,
                "geometry": geometry(size // SECTOR),
                "disk_type": DiskType.DIFFERENCING if differencing else DiskType.DYNAMIC,
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


def header_of(size: int, parent_id: UUID | None, parent_name: str, created: float) -> bytes:
    """A header.

    Args:
        size: of the disk, bytes.
        parent_id: unique id of the parent, or None.
        parent_name: its file's name, in the same directory; "" without one.
        created: the parent's time, seconds since 1970; nobody may rely on it.

    Raises:
        RepositoryError: no header can hold that name.
    """
    name = parent_name.encode("utf-16-be")
    if len(name) > _NAME - 2:
        raise RepositoryError(f"{parent_name!r}: too long for the name of a VHD's parent")
    none = {
        "platform": Platform.NONE,
        "data_space": 0,
        "data_length": 0,
        "reserved": 0,
        "data_offset": 0,
    }
    header = bytearray(
        HEADER.build(
            {
                "cookie": HEADER_COOKIE,
                "data_offset": NO_OFFSET,
                "table_offset": TABLE_AT,
                "version": VERSION,
                "max_table_entries": entries_of(size),
                "block_size": BLOCK,
                "checksum": 0,
                "parent_unique_id": parent_id.bytes if parent_id else bytes(16),
                "parent_timestamp": max(0, int(created) - EPOCH) & 0xFFFFFFFF if parent_id else 0,
                "reserved1": bytes(4),
                "parent_unicode_name": name.ljust(_NAME, b"\0"),
                "locators": [none] * LOCATORS,
                "reserved2": bytes(256),
            }
        )
    )
    header[HEADER_CHECKSUM : HEADER_CHECKSUM + 4] = checksum(header, HEADER_CHECKSUM).to_bytes(4)
    return bytes(header)
