"""Footer and header of a VHD: found, checked, and turned into what a reader needs.

::

    footer at the end      intact: taken
                           damaged, missing: the copy at 0, which only dynamic and differencing
                           disks have
    fixed                  data = [0, current_size)
    dynamic, differencing  header at data_offset, BAT at table_offset

Rules:

* The size is ``current_size``. The geometry is a hint that ends at 127.5 GiB and is rounded in
  either direction by this and that program; it is never used.
* Of two intact footers the one at the end counts: a guest can write what it likes at the
  beginning of its fixed disk.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.formats.vhd.structs import (
    CREATOR_TAP,
    EPOCH,
    FOOTER,
    FOOTER_CHECKSUM,
    FOOTER_COOKIE,
    FOOTER_HIDDEN,
    FOOTER_SIZE,
    HEADER,
    HEADER_CHECKSUM,
    HEADER_COOKIE,
    HEADER_SIZE,
    MAX_SIZE,
    OLD_FOOTER_SIZE,
    SECTOR,
    DiskType,
    bitmap_size,
    checksum,
)

__all__ = [
    "Footer",
    "Header",
    "Place",
    "Readable",
    "intact_footer",
    "parse_footer",
    "parse_header",
    "read_footer",
    "read_header",
]

_FOOTER: Any = FOOTER.compile()
_HEADER: Any = HEADER.compile()
"""Five times as fast, for a chain has a hundred of them; making them takes 3 ms, once."""
_FORGETFUL_TAPDISKS = frozenset({0x00000001, 0x00010001})
"""Versions 0.1 and 1.1 set ``hidden`` without summing the footer up again."""
_LITTLE_ENDIAN_BITMAPS = 0x00000001
"""Version 0.1 of tapdisk used the processor's bit order."""
_CREATOR_XO = b"xo  "
"""Xen Orchestra counts timestamps from 1970."""


class Place(Protocol):
    """What messages are about: a file, or something else that holds a footer."""

    path: str

    def corrupt(self, position: int, what: str) -> CorruptImage:
        """The error to raise."""


class Readable(Place, Protocol):
    """A file; an ``ImageFile``, or one in a bucket."""

    size: int

    def read(self, position: int, length: int, what: str) -> bytes:
        """Exactly these bytes."""

    def read_up_to(self, position: int, length: int) -> bytes:
        """At most these bytes."""


@dataclass(frozen=True, slots=True)
class Footer:
    """What the footer says.

    Attributes:
        data_end: everything else of the file lies before it.
        header_at: where the header is; meaningless for a fixed disk.
        least_first: are the bits of sector bitmaps counted from the least significant one?
    """

    data_end: int
    header_at: int
    disk_type: DiskType
    size: int
    unique_id: UUID
    creator: str
    created: str
    least_first: bool


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a dynamic or differencing disk says.

    Attributes:
        position: of the header itself.
        table_at: where the BAT is.
        table_entries: how many it has; ``blocks`` of them are in use.
        block_size: bytes of data in a block.
        bitmap_size: bytes of sector bitmap in front of them.
        parent_id: the unique id its parent must have.
        parent_name: ``parent_unicode_name`` as it stands there.
        locators: (platform, position, length) of the other names the parent goes by.
    """

    position: int
    table_at: int
    table_entries: int
    blocks: int
    block_size: int
    bitmap_size: int
    parent_id: UUID
    parent_name: bytes
    locators: tuple[tuple[int, int, int], ...]


def read_footer(file: Readable) -> Footer:
    """The footer of a VHD, or its copy. Blocking.

    Raises:
        CorruptImage: neither is intact.
        UnsupportedImage: a kind of disk nobody makes any more.
    """
    for length in (FOOTER_SIZE, OLD_FOOTER_SIZE):
        position = file.size - length
        raw = intact_footer(file.read_up_to(position, length)) if position >= 0 else None
        if raw is not None:
            return parse_footer(file, raw, position, position)
    raw = intact_footer(file.read_up_to(0, FOOTER_SIZE))
    if raw is None:
        position = max(file.size - FOOTER_SIZE, 0)
        raise file.corrupt(position, "no footer with a correct checksum here, nor a copy at 0")
    footer = parse_footer(file, raw, 0, file.size)
    if footer.disk_type == DiskType.FIXED:
        raise file.corrupt(file.size, "the footer of a fixed disk is not at the end: truncated?")
    return footer


def intact_footer(raw: bytes) -> bytes | None:
    """The footer if it is one and its checksum is right."""
    if not raw.startswith(FOOTER_COOKIE) or len(raw) < OLD_FOOTER_SIZE:
        return None
    raw = raw.ljust(FOOTER_SIZE, b"\0")
    fields: Any = _FOOTER.parse(raw)
    if fields.checksum == checksum(raw, FOOTER_CHECKSUM):
        return raw
    if fields.creator == CREATOR_TAP and fields.creator_version in _FORGETFUL_TAPDISKS:
        shown = raw[:FOOTER_HIDDEN] + b"\0" + raw[FOOTER_HIDDEN + 1 :]
        if fields.checksum == checksum(shown, FOOTER_CHECKSUM):
            return raw
    return None


def parse_footer(file: Place, raw: bytes, position: int, data_end: int) -> Footer:
    """A footer whose checksum is right.

    Args:
        file: that it is in.
        raw: the footer.
        position: where it stands.
        data_end: everything else of the file lies before that.

    Raises:
        CorruptImage, UnsupportedImage: as ``read_footer``.
    """
    fields: Any = _FOOTER.parse(raw)
    if fields.version >> 16 != 1:
        raise UnsupportedImage(f"{file.path}: VHD version {fields.version >> 16} is not known")
    try:
        disk_type = DiskType(fields.disk_type)
    except ValueError:
        text = f"{file.path}: VHD disk type {fields.disk_type} is not known"
        raise UnsupportedImage(text) from None
    size: int = fields.current_size
    if size > MAX_SIZE:
        raise file.corrupt(position, f"a disk of {size} bytes")
    if disk_type == DiskType.FIXED and size > data_end:
        text = f"{data_end} bytes of a fixed disk of {size}; the file is truncated"
        raise file.corrupt(position, text)
    return Footer(
        data_end=data_end,
        header_at=fields.data_offset,
        disk_type=disk_type,
        size=size,
        unique_id=UUID(bytes=fields.unique_id),
        creator=_creator(fields),
        created=_created(fields),
        least_first=fields.creator == CREATOR_TAP
        and fields.creator_version == _LITTLE_ENDIAN_BITMAPS,
    )


def _creator(fields: Any) -> str:
    name = fields.creator.decode("ascii", "replace").rstrip("\0 ")
    version = fields.creator_version
    return f"{name} {version >> 16}.{version & 0xFFFF}".strip()


def _created(fields: Any) -> str:
    since = 0 if fields.creator == _CREATOR_XO else EPOCH
    return datetime.fromtimestamp(fields.timestamp + since, UTC).isoformat()


def read_header(file: Readable, footer: Footer) -> Header:
    """The header of a dynamic or differencing disk. Blocking.

    Raises:
        CorruptImage: it is damaged, or contradicts the footer or the size of the file.
        UnsupportedImage: made by a later version of the format.
    """
    position = footer.header_at
    header = parse_header(file, footer, file.read(position, HEADER_SIZE, "the VHD header"))
    table_at, entries = header.table_at, header.table_entries
    if table_at + 4 * entries > footer.data_end:
        text = f"a block table of {entries} entries at {table_at}, beyond the end of the file"
        raise file.corrupt(position, text)
    return header


def parse_header(file: Place, footer: Footer, raw: bytes) -> Header:
    """The same of the header alone: whether its table is in the file remains to be seen.

    Raises:
        CorruptImage, UnsupportedImage: as ``read_header``.
    """
    position = footer.header_at
    if not raw.startswith(HEADER_COOKIE):
        raise file.corrupt(position, "no VHD header here")
    fields: Any = _HEADER.parse(raw)
    summed = checksum(raw, HEADER_CHECKSUM)
    if fields.checksum != summed:
        text = f"the checksum of the VHD header is {fields.checksum:#x}, should be {summed:#x}"
        raise file.corrupt(position + HEADER_CHECKSUM, text)
    if fields.version >> 16 != 1:
        text = f"{file.path}: VHD header version {fields.version >> 16} is not known"
        raise UnsupportedImage(text)
    return _header(file, footer, fields)


def _header(file: Place, footer: Footer, fields: Any) -> Header:
    position, block_size, entries = footer.header_at, fields.block_size, fields.max_table_entries
    if block_size < SECTOR or block_size & (block_size - 1):
        raise file.corrupt(position, f"blocks of {block_size} bytes: not a power of 2 from 512 on")
    blocks = -(-footer.size // block_size)
    if blocks > entries:
        text = f"a table of {entries} blocks of {block_size} bytes for a disk of {footer.size}"
        raise file.corrupt(position, text)
    return Header(
        position=position,
        table_at=fields.table_offset,
        table_entries=entries,
        blocks=blocks,
        block_size=block_size,
        bitmap_size=bitmap_size(block_size),
        parent_id=UUID(bytes=fields.parent_unique_id),
        parent_name=fields.parent_unicode_name,
        locators=tuple((loc.platform, loc.data_offset, loc.data_length) for loc in fields.locators),
    )
