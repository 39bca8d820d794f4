"""The header of a qcow image: read, bounded, and turned into types."""

import os
from dataclasses import dataclass

from nbdsrv.errors import UnsupportedImage
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.qcow.structs import (
    HEADER,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L2_BITS,
    MIN_CLUSTER_BITS,
    MIN_L2_BITS,
    VERSION,
)
from protocol.terms import MAX_SIZE

__all__ = ["Header", "read_header"]


@dataclass(frozen=True, slots=True)
class Header:
    """What the image says of itself.

    Attributes:
        size: of the disk, bytes.
        l1_size: entries that the disk needs; the image does not say.
        backing_file: name as it stands in the file, "" if there is none.
    """

    size: int
    cluster_bits: int
    l2_bits: int
    l1_table_offset: int
    l1_size: int
    backing_file: str

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits


def read_header(file: ImageFile) -> Header:
    """Read and check it. Blocking.

    Raises:
        CorruptImage: it contradicts itself or the file.
        UnsupportedImage: encrypted, or another version.
    """
    start = file.read(0, HEADER.sizeof(), "the header")
    if start[:4] != b"QFI\xfb":
        raise file.corrupt(0, f"no qcow header, it begins with {start[:4]!r}")
    raw = HEADER.parse(start)
    if raw.version != VERSION:
        raise UnsupportedImage(f"{file.path}: qcow version {raw.version} is not qcow but qcow2")
    if raw.crypt_method > 1:
        raise file.corrupt(36, f"encryption method {raw.crypt_method}")
    if raw.crypt_method:
        raise UnsupportedImage(
            f"{file.path}: encrypted (AES); decrypt it with qemu-img convert first"
        )
    if not MIN_CLUSTER_BITS <= raw.cluster_bits <= MAX_CLUSTER_BITS:
        raise file.corrupt(32, f"clusters of 2^{raw.cluster_bits} bytes")
    if not MIN_L2_BITS <= raw.l2_bits <= MAX_L2_BITS:
        raise file.corrupt(33, f"L2 tables of 2^{raw.l2_bits} entries")
    if raw.size > MAX_SIZE:
        raise file.corrupt(24, f"a disk of {raw.size} bytes")
    entries = -(-raw.size >> (raw.cluster_bits + raw.l2_bits))
    table = raw.l1_table_offset
    if table < HEADER.sizeof() or table % 8 or table + entries * 8 > file.size:
        raise file.corrupt(40, f"an L1 table of {entries} entries at {table}")
    name = _backing_name(file, raw.backing_file_offset, raw.backing_file_size)
    return Header(raw.size, raw.cluster_bits, raw.l2_bits, table, entries, name)


def _backing_name(file: ImageFile, position: int, length: int) -> str:
    if not position:
        return ""
    if length > MAX_BACKING_NAME or position < HEADER.sizeof():
        raise file.corrupt(8, f"a backing file name of {length} bytes at {position}")
    return os.fsdecode(file.read(position, length, "the backing file's name"))
