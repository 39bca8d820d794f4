"""A VHD directory: a VHD whose parts are files.

::

    header             1 024 bytes, as in a VHD; its ``table_offset`` means nothing here
    footer             512 bytes
    bat                1 bit for each block, MSB first: is it in this directory?
                       (Xen Orchestra writes max_table_entries *bytes*; only the bits count)
    blocks/0/0         sector bitmap, 512 bytes, and 2 MiB of data; always whole blocks
    blocks/1/17        block 1017
    chunk-filters.json how each of the others is packed (``filters``); absent: not at all

There is no 2 TiB limit in it: nothing holds a position.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from nbdsrv.errors import CorruptImage, UnsupportedImage
from nbdsrv.formats.vhd.metadata import (
    Footer,
    Header,
    intact_footer,
    parse_footer,
    parse_header,
)
from nbdsrv.formats.vhd.structs import FOOTER_SIZE, HEADER_SIZE, DiskType
from nbdsrv.repository.xo import filters
from nbdsrv.repository.xo.layout import BAT, FILTERS, FOOTER, HEADER, block_path
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.store.store import ObjectMissing

__all__ = [
    "BLOCK_SIZE",
    "MAX_BLOCKS",
    "MAX_BLOCK_SIZE",
    "VhdDirectory",
    "bat_file",
    "open_vhd_directory",
    "packed_limit",
]

BLOCK_SIZE = 2 << 20
"""Bytes of data in the blocks Xen Orchestra writes."""
MAX_BLOCK_SIZE = 32 << 20
"""Bytes; a block is decoded in memory as a whole."""
MAX_BLOCKS = 1 << 26
"""Of a disk: 128 TiB, whose table has 8 MiB."""
MAX_FILTERS_FILE = 4096
_SLACK = 1 << 16


def packed_limit(length: int) -> int:
    """Bytes a file that unpacks to ``length`` may have: no packer makes it much longer."""
    return length + length // 8 + _SLACK


def bat_file(present: Iterable[int], entries: int) -> bytes:
    """The content of ``bat``, not packed, as Xen Orchestra sizes it.

    Args:
        present: the blocks that are there, each less than ``entries``.
        entries: the header's ``max_table_entries``.
    """
    bits = bytearray(entries)
    for block in present:
        bits[block >> 3] |= 0x80 >> (block & 7)
    return bytes(bits)


@dataclass(frozen=True, slots=True)
class VhdDirectory:
    """One that is open. Thread-safe; methods block.

    Attributes:
        remote: where it is.
        directory: its path in there.
        path: the same for messages.
        filter: how its files are packed.
        footer: what it says.
        header: what it says; positions in it mean nothing.
    """

    remote: Remote
    directory: str
    path: str
    filter: str
    footer: Footer
    header: Header

    @property
    def block_length(self) -> int:
        """Bytes of a block with its sector bitmap."""
        return self.header.bitmap_size + self.header.block_size

    @property
    def plain(self) -> bool:
        """Are blocks stored as they are, so that a part of one can be read alone?"""
        return self.filter == filters.NONE and not self.remote.encrypted

    def corrupt(self, position: int, what: str) -> CorruptImage:
        """The error to raise."""
        return CorruptImage(f"corrupt image: {self.path} at {position}: {what}")

    def bat(self) -> bytes:
        """A bit for each block of the disk, MSB first; at least that many.

        Raises:
            CorruptImage: it is missing, damaged, or too short.
            StoreError: it cannot be read.
        """
        wanted = -(-self.header.blocks // 8)
        limit = max(self.header.table_entries, wanted)
        bits = _part(self.remote, self.directory, BAT, self.filter, wanted, packed_limit(limit))
        if len(bits) < wanted:
            text = f"{len(bits)} bytes, too few for {self.header.blocks} blocks"
            raise CorruptImage(f"corrupt image: {self.path}/{BAT} at 0: {text}")
        return bits

    def block_file(self, block: int) -> str:
        """The path of a block's file."""
        return block_path(self.directory, block)

    def block(self, block: int) -> bytes:
        """A block, its sector bitmap first: exactly ``block_length`` bytes.

        Raises:
            ObjectMissing: there is no file of it.
            CorruptImage: it is damaged.
            StoreError: it cannot be read.
        """
        path, length = self.block_file(block), self.block_length
        where = self.remote.full(path)
        packed = self.remote.read(path, packed_limit(length))
        data = filters.unpack(self.filter, packed, length, where)
        if len(data) != length:
            text = f"a block of {len(data)} bytes, should be {length}"
            raise CorruptImage(f"corrupt image: {where} at 0: {text}")
        return data


class _Place:
    """What messages are about while there is no VhdDirectory yet."""

    def __init__(self, path: str) -> None:
        self.path = path

    def corrupt(self, position: int, what: str) -> CorruptImage:
        return CorruptImage(f"corrupt image: {self.path} at {position}: {what}")


def open_vhd_directory(remote: Remote, directory: str) -> VhdDirectory:
    """Read what tells about a VHD directory; not its table yet. Blocking.

    Raises:
        CorruptImage: a part is missing, damaged, or contradicts another.
        UnsupportedImage: made by a later version of the format, or packed by another filter.
        StoreError: it cannot be read.
    """
    path = remote.full(directory)
    packing = _filter(remote, directory)
    place = _Place(f"{path}/{FOOTER}")
    raw = intact_footer(_exactly(remote, directory, FOOTER, packing, FOOTER_SIZE))
    if raw is None:
        raise place.corrupt(0, "no footer with a correct checksum")
    footer = parse_footer(place, raw, 0, FOOTER_SIZE)
    if footer.disk_type == DiskType.FIXED:
        raise place.corrupt(0, "a VHD directory of a fixed disk")
    place = _Place(f"{path}/{HEADER}")
    raw = _exactly(remote, directory, HEADER, packing, HEADER_SIZE)
    header = parse_header(place, footer, raw)
    if header.block_size > MAX_BLOCK_SIZE or header.table_entries > MAX_BLOCKS:
        text = f"a table of {header.table_entries} blocks of {header.block_size} bytes"
        raise UnsupportedImage(f"{path}: {text}: more than is read")
    return VhdDirectory(remote, directory, path, packing, footer, header)


def _filter(remote: Remote, directory: str) -> str:
    path = f"{directory}/{FILTERS}"
    try:
        raw = remote.read(path, MAX_FILTERS_FILE)
    except ObjectMissing:
        return filters.NONE
    return filters.filter_of(raw, remote.full(path))


def _exactly(remote: Remote, directory: str, name: str, packing: str, length: int) -> bytes:
    data = _part(remote, directory, name, packing, length, packed_limit(length))
    if len(data) != length:
        text = f"{len(data)} bytes, should be {length}"
        raise CorruptImage(f"corrupt image: {remote.full(directory)}/{name} at 0: {text}")
    return data


def _part(
    remote: Remote, directory: str, name: str, packing: str, length: int, limit: int
) -> bytes:
    """The first ``length`` bytes of header, footer or bat."""
    path = f"{directory}/{name}"
    where = remote.full(path)
    try:
        packed = remote.read(path, limit)
    except ObjectMissing as error:
        text = f"corrupt image: {where} at 0: is missing, and without it nothing can be read"
        raise CorruptImage(text) from error
    return filters.unpack(packing, packed, length, where, beginning=True)
