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
from nbdsrv.formats.vhd.structs import SECTOR, DiskType
from nbdsrv.formats.vhd.writer_frame import (
    BLOCK,
    MAX_NAME,
    TABLE_AT,
    build_footer,
    build_header,
    entries_of,
)

__all__ = ["BITMAP", "BLOCK", "TABLE_AT", "entries_of", "footer_of", "header_of"]

BITMAP = b"\xff" * SECTOR
"""In front of it: every sector is in this file. Xen Orchestra does not look at it."""
_CREATOR_VERSION = 0x00010001


def footer_of(size: int, unique_id: UUID, created: float, *, differencing: bool) -> bytes:
    """A footer.

    Args:
        size: of the disk, bytes.
        unique_id: its own.
        created: seconds since 1970.
        differencing: has it a parent?
    """
    kind = DiskType.DIFFERENCING if differencing else DiskType.DYNAMIC
    return build_footer(size, unique_id, created, _CREATOR_VERSION, kind)


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
    if len(name) > MAX_NAME - 2:
        raise RepositoryError(f"{parent_name!r}: too long for the name of a VHD's parent")
    return build_header(entries_of(size), parent_id, name, created)
