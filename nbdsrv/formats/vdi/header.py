"""The header of a VDI, checked once; nothing behind it has to doubt its numbers.

::

    | header | ... | table: 4 bytes a block | ... | block | block | ...
    0              table_at                       data_at
"""

import uuid
from dataclasses import dataclass
from typing import Any

from construct import ConstructError

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.vdi.structs import (
    DIFFERENCING,
    HEADER_SIZE,
    HEADER_SIZE_AT,
    TYPES,
    VERSION,
    VdiHeader,
)

__all__ = ["Header", "read_header"]

SECTOR = 512
MAX_BLOCK_SIZE = 256 << 20
"""Bytes; VirtualBox makes blocks of 1 MiB and lets the user choose others, of a few MiB."""
NIL = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True)
class Header:
    """What a VDI says of itself.

    Attributes:
        kind: dynamic, fixed, differencing.
        size: of the disk, bytes.
        block_size: bytes of the disk in a block.
        block_extra: bytes before them in the file.
        block_count: entries of the table.
        table_at: where the table begins.
        data_at: where block 0 begins, with its extra bytes.
        identity: this image's.
        modified: changes whenever the image's content does.
        parent: the parent's ``identity``; NIL without one.
        parent_modified: the parent's ``modified``; NIL if unknown.
    """

    kind: str
    size: int
    block_size: int
    block_extra: int
    block_count: int
    table_at: int
    data_at: int
    identity: uuid.UUID
    modified: uuid.UUID
    parent: uuid.UUID
    parent_modified: uuid.UUID
    creator: str
    comment: str


def read_header(file: ImageFile) -> Header:
    """Read and check the header. Blocking.

    Raises:
        CorruptImage: it contradicts itself, or the file.
        UnsupportedImage: another version, or an undo image.
    """
    try:
        raw = VdiHeader.parse(file.read(0, HEADER_SIZE, "the VDI header"))
    except ConstructError as error:
        raise file.corrupt(0, "no VDI header") from error
    if raw.version != VERSION:
        version = f"{raw.version >> 16}.{raw.version & 0xFFFF}"
        raise UnsupportedImage(f"{file.path}: VDI version {version} is not served, only 1.1")
    if raw.type not in TYPES:
        raise UnsupportedImage(f"{file.path}: VDI of type {raw.type} is not served, only 1, 2, 4")
    _check(file, raw)
    differencing = raw.type == DIFFERENCING
    return Header(
        kind=TYPES[raw.type],
        size=raw.disk_size,
        block_size=raw.block_size,
        block_extra=raw.block_extra,
        block_count=raw.block_count,
        table_at=raw.blocks_offset,
        data_at=raw.data_offset,
        identity=uuid.UUID(bytes_le=raw.uuid_create),
        modified=uuid.UUID(bytes_le=raw.uuid_modify),
        parent=uuid.UUID(bytes_le=raw.uuid_linkage) if differencing else NIL,
        parent_modified=uuid.UUID(bytes_le=raw.uuid_parent_modify) if differencing else NIL,
        creator=_text(raw.text).strip("<> \n"),
        comment=_text(raw.comment),
    )


def _check(file: ImageFile, raw: Any) -> None:
    if raw.block_size % SECTOR or not SECTOR <= raw.block_size <= MAX_BLOCK_SIZE:
        raise file.corrupt(0x178, f"blocks of {raw.block_size} bytes")
    if raw.block_extra % SECTOR or raw.block_extra > MAX_BLOCK_SIZE:
        raise file.corrupt(0x17C, f"{raw.block_extra} extra bytes in a block")
    needed = -(-raw.disk_size // raw.block_size)
    if needed > raw.block_count:
        what = f"{raw.block_count} blocks of {raw.block_size} bytes for {raw.disk_size} of disk"
        raise file.corrupt(0x180, what)
    if raw.blocks_offset < HEADER_SIZE_AT + raw.header_size or raw.blocks_offset < HEADER_SIZE:
        raise file.corrupt(0x154, f"the block table at {raw.blocks_offset} lies in the header")
    table_end = raw.blocks_offset + 4 * raw.block_count
    if table_end > raw.data_offset:
        raise file.corrupt(0x158, f"blocks at {raw.data_offset} before the table's end {table_end}")
    if table_end > file.size:
        raise file.corrupt(raw.blocks_offset, "the block table reaches beyond the end of the file")
    if raw.type == DIFFERENCING and not any(raw.uuid_linkage):
        raise file.corrupt(0x1A8, "a differencing image without the UUID of a parent")


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")
