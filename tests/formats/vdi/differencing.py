"""Differencing VDIs, which qemu-img cannot make: a dynamic one turned into a child.

::

    qemu-img's dynamic VDI ── type 4, parent's UUIDs, entries 0xfffffffe ──> child
"""

import struct
from pathlib import Path

__all__ = ["IDENTITY_AT", "MODIFIED_AT", "discard", "make_child", "table_entry_at", "uuids"]

TYPE_AT, BLOCKS_AT, DATA_AT = 76, 0x154, 0x158
IDENTITY_AT, MODIFIED_AT, PARENT_AT, PARENT_MODIFIED_AT = 0x188, 0x198, 0x1A8, 0x1B8


def uuids(path: str) -> tuple[bytes, bytes]:
    """An image's identity and the mark of its last change."""
    raw = Path(path).read_bytes()[:512]
    return raw[IDENTITY_AT : IDENTITY_AT + 16], raw[MODIFIED_AT : MODIFIED_AT + 16]


def make_child(path: str, parent: str) -> None:
    """Make the VDI at ``path`` a child of the one at ``parent``, as that is now."""
    identity, modified = uuids(parent)
    with open(path, "r+b") as file:
        for at, data in (
            (TYPE_AT, struct.pack("<I", 4)),
            (PARENT_AT, identity),
            (PARENT_MODIFIED_AT, modified),
        ):
            file.seek(at)
            file.write(data)


def table_entry_at(path: str, block: int) -> int:
    """Where in the file the table entry of a block stands."""
    (table,) = struct.unpack_from("<I", Path(path).read_bytes()[:512], BLOCKS_AT)
    return int(table) + 4 * block


def discard(path: str, block: int, entry: int = 0xFFFF_FFFE) -> None:
    """Have the table say so of a block."""
    at = table_entry_at(path, block)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", entry))
